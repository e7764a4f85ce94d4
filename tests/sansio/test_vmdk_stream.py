"""streamOptimized by bytes alone: a strict reader of the format's description walks what is
written, marker by marker; images made by hand are read."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from diskwright.errors import CorruptImage, ImageError, UnsupportedFeature, UsageError
from diskwright.extents import HOLE, PACKED, ZERO, Packed
from diskwright.findings import CheckResult
from diskwright.formats.vmdk import DRIVER
from diskwright.formats.vmdk.stream.part import GrainCodec, longest
from diskwright.formats.vmdk.stream.writer import StreamOptimized
from sansio.machine import Machine
from sansio.streamwalk import HEADER, walk

MIB = 1 << 20
GRAIN = 65536
TEXT = b"""# Disk DescriptorFile
version=1
CID=01020304
parentCID=ffffffff
createType="streamOptimized"

RW %d SPARSE "x.vmdk"
"""


def written(size: int, grains: dict[int, bytes], level: int = 4, text: bytes = b"") -> bytes:
    writer = StreamOptimized(size, text or TEXT % (size // 512), level)
    parts = [*writer.head()]
    for index in sorted(grains):
        parts += writer.put(index, writer.codec.pack(grains[index].ljust(GRAIN, b"\0")))
    return b"".join([*parts, *writer.end()])


class Reader(Machine):
    """A machine that can read packed extents."""

    def read(self, offset: int, length: int) -> bytes:
        out = bytearray()
        for _, extent in self.extents(offset, length):
            if isinstance(extent, Packed):
                raw = self.pread(extent.slot, extent.host, extent.host_length)
                assert extent.host + extent.host_length <= len(self.slots["file"])
                try:
                    unit = extent.codec.unpack(raw, extent.unit)
                except ValueError as error:
                    raise CorruptImage(str(error)) from error
                assert len(unit) == extent.unit
                out += unit[extent.skip : extent.skip + extent.length]
            else:
                assert extent.kind in (HOLE, ZERO)
                out += bytes(extent.length)
        return bytes(out)


def reader(file: bytes, **options: Any) -> Reader:
    machine = Reader(file)
    machine.open(DRIVER, **{"file-name": "x.vmdk", **options})
    return machine


def checked(machine: Machine) -> CheckResult:
    result: CheckResult = machine.run(machine.format.check())
    return result


def some(size: int, seed: int, share: float = 0.4) -> dict[int, bytes]:
    rnd = random.Random(seed)
    out = {}
    for index in range(-(-size // GRAIN)):
        if rnd.random() < share:
            data = rnd.randbytes(GRAIN) if rnd.random() < 0.3 else rnd.randbytes(64) * 1024
            out[index] = data[: size - index * GRAIN]
    return out


def disk(size: int, grains: dict[int, bytes]) -> bytes:
    out = bytearray(size)
    for index, data in grains.items():
        out[index * GRAIN : index * GRAIN + len(data)] = data
    return bytes(out)


# -- writing
SIZES = [0, 512, GRAIN - 512, GRAIN, GRAIN + 512, 5 * MIB, 32 * MIB, 32 * MIB + 512, 70 * MIB]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_follows_the_description(size: int) -> None:
    grains = some(size, size)
    if size > 40 * MIB:  # a table in the middle that is not there
        grains = {i: data for i, data in grains.items() if i // 512 != 1}
    file = written(size, grains)
    capacity, found = walk(file)
    assert capacity * 512 == size
    assert found == {i: data.ljust(GRAIN, b"\0") for i, data in grains.items()}
    if size:
        machine = reader(file)
        assert machine.format.size == size
        assert machine.read(0, size) == disk(size, grains)
        assert checked(machine).findings == []


def test_an_empty_image() -> None:
    file = written(100 << 30, {})
    assert walk(file) == (200 << 20, {})
    # Header, overhead, directory of 3,200 entries and two markers, footer, end.
    assert len(file) == 65536 + 512 * (1 + 25 + 1 + 1 + 1)


def test_created_and_streamed_images_are_alike() -> None:
    machine = Machine()
    options = {"size": 5 * MIB, "subformat": "streamOptimized", "file-name": "y.vmdk"}
    machine.run(DRIVER.create(options))  # type: ignore[misc]
    assert walk(bytes(machine.slots["file"])) == (5 * MIB // 512, {})
    assert DRIVER.stream is not None
    writer = DRIVER.stream(options)
    assert isinstance(writer, StreamOptimized)
    assert DRIVER.stream({**options, "subformat": "monolithicSparse"}) is None


def test_a_large_descriptor_moves_the_grains() -> None:
    text = TEXT % 2048 + b"#" * 70_000
    file = written(MIB, {3: b"x"}, text=text)
    assert walk(file)[1] == {3: b"x".ljust(GRAIN, b"\0")}
    assert file[512:].startswith(text)


def test_levels() -> None:
    rnd = random.Random(2)
    words = [rnd.randbytes(rnd.randrange(2, 9)) for _ in range(500)]
    data = {0: b" ".join(rnd.choices(words, k=20_000))[:GRAIN]}
    lengths = [len(written(GRAIN, data, level)) for level in (1, 9)]
    assert lengths[0] > lengths[1]
    for level in (0, 10, -1):
        with pytest.raises(UsageError, match="level"):
            StreamOptimized(GRAIN, b"", level)


def test_what_cannot_be_written() -> None:
    for size in (-512, 100, (64 << 40) + 512):
        with pytest.raises(UsageError):
            StreamOptimized(size, b"")
    writer = StreamOptimized(10 * GRAIN, b"")
    list(writer.head())
    list(writer.put(3, b"x"))
    for index in (3, 2, 10):
        with pytest.raises(ValueError, match="grain"):
            list(writer.put(index, b"x"))


# -- reading
def by_hand(
    grains: dict[int, bytes],
    size: int = 4 * MIB,
    grain: int = 128,
    entries: int = 512,
    flags: int = 0x30001,
    order: Callable[[list[int]], list[int]] = sorted,
    fields: dict[str, int] | None = None,
) -> bytearray:
    """An image with its directory in front, as QEMU writes it, its grains in any order."""
    chosen = {
        "version": 3,
        "flags": flags,
        "capacity": size // 512,
        "grain": grain,
        "d_offset": 1,
        "d_size": 4,
        "entries": entries,
        "rgd": 0,
        "gd": 8,
        "overhead": 64,
        "unclean": 0,
    } | (fields or {})
    count = -(-size // (grain * 512 * entries))
    out = bytearray(
        HEADER.pack(b"KDMV", *chosen.values(), b"\n \r\n", 1).ljust(512, b"\0")
        + (TEXT % (size // 512)).ljust(2048, b"\0")
    )
    table_sectors = -(-entries * 4 // 512)
    out = out.ljust(512 * (8 + 8 + count * table_sectors), b"\0")
    places = dict.fromkeys(range(count * entries), 0)
    for index in order(list(grains)):
        places[index] = len(out) // 512
        packed = grains[index]
        if flags & 1 << 17:
            packed = struct.pack("<QI", index * grain, len(packed)) + packed
        out += packed.ljust(-(-len(packed) // 512) * 512, b"\0")
    for number in range(count):
        at = 16 + number * table_sectors
        struct.pack_into("<I", out, 8 * 512 + 4 * number, at)
        struct.pack_into(
            f"<{entries}I", out, at * 512, *(places[number * entries + i] for i in range(entries))
        )
    return out


@pytest.mark.parametrize("grain", [1, 8, 16, 128, 256, 4096])
@pytest.mark.parametrize("marked", [False, True])
def test_other_grain_sizes_and_images_without_markers(grain: int, marked: bool) -> None:
    rnd = random.Random(grain)
    unit = grain * 512
    size = 4 * MIB + 512 if grain > 1 else 128 * 1024
    count = -(-size // unit)
    plain = {i: rnd.randbytes(unit) for i in rnd.sample(range(count), min(count, 20))}
    packed = {i: zlib.compress(data, rnd.choice([0, 1, 9])) for i, data in plain.items()}

    def shuffled(found: list[int]) -> list[int]:
        return rnd.sample(found, len(found))

    flags = 0x30001 if marked else 0x10001
    file = by_hand(packed, size, grain, 128, flags, shuffled)
    machine = reader(bytes(file))
    expected = bytearray(count * unit)
    for index, data in plain.items():
        expected[index * unit : (index + 1) * unit] = data
    assert machine.read(0, size) == expected[:size]
    for _ in range(20):
        at = rnd.randrange(size)
        n = min(rnd.randrange(1, 3 * unit), size - at)
        assert machine.read(at, n) == expected[at : at + n]
    assert checked(machine).findings == []


def test_a_read_takes_no_more_than_it_needs() -> None:
    grains = {i: random.Random(i).randbytes(200 * (i + 1)) * 40 for i in range(8)}
    file = written(MIB, {i: g[:GRAIN] for i, g in grains.items()})
    machine = reader(file)
    found = [e for _, e in machine.extents(0, 7 * GRAIN)]
    for extent, following in pairwise(found):
        assert isinstance(extent, Packed) and isinstance(following, Packed)
        assert extent.host + extent.host_length == following.host
    ((_, last),) = machine.extents(7 * GRAIN + 5, 10)
    assert isinstance(last, Packed)
    assert (last.skip, last.length) == (5, 10)
    assert last.host_length <= longest(GRAIN)


def test_a_short_last_grain_and_zeroed_grains() -> None:
    size = MIB + 512
    file = by_hand({16: zlib.compress(b"z" * 512)}, size, flags=0x30005)
    struct.pack_into("<2I", file, 16 * 512, 1, 0)
    machine = reader(bytes(file))
    assert machine.read(MIB, 512) == b"z" * 512
    kinds = [extent.kind for _, extent in machine.extents(0, size)]
    assert kinds == [ZERO, HOLE, PACKED]


def test_an_image_that_qemu_laid_out_with_empty_tables() -> None:
    file = by_hand({}, 64 * MIB)
    struct.pack_into("<I", file, 8 * 512 + 4, 0)
    machine = reader(bytes(file))
    assert machine.read(0, 64 * MIB) == bytes(64 * MIB)


# -- damage
def broken(change: Callable[[bytearray], Any]) -> Reader:
    file = by_hand({0: zlib.compress(b"a" * GRAIN), 1: zlib.compress(b"b" * GRAIN)})
    change(file)
    return reader(bytes(file))


def place(file: bytearray, index: int = 0) -> int:
    return int(struct.unpack_from("<I", file, 16 * 512 + 4 * index)[0]) * 512


DAMAGES: list[tuple[Callable[[bytearray], Any], str, bool]] = [
    (lambda f: struct.pack_into("<Q", f, place(f), 128), "belongs to sector 128, not 0", True),
    (lambda f: struct.pack_into("<I", f, place(f) + 8, 0), "marker", True),
    (lambda f: struct.pack_into("<I", f, place(f) + 8, 1 << 30), "end behind", True),
    (lambda f: struct.pack_into("<I", f, place(f) + 8, 600), "end behind", False),
    (lambda f: struct.pack_into("<I", f, place(f) + 8, 20), "cut off", False),
    (lambda f: f.__setitem__(place(f) + 12, 0), "damaged", False),
    (lambda f: f.__setitem__(place(f) + 30, f[place(f) + 30] ^ 8), "damaged|holds", False),
    (lambda f: struct.pack_into("<I", f, 16 * 512, place(f, 1) // 512), "belongs to", True),
    (lambda f: struct.pack_into("<I", f, 16 * 512, 1 << 31), "behind the end", True),
    (lambda f: struct.pack_into("<I", f, 16 * 512, len(f) // 512), "behind the end", True),
    (lambda f: struct.pack_into("<I", f, 8 * 512, 1 << 31), "cut off", True),
]


@pytest.mark.parametrize(("change", "words", "found"), DAMAGES)
def test_damaged_grains(change: Callable[[bytearray], Any], words: str, found: bool) -> None:
    machine = broken(change)
    with pytest.raises(CorruptImage, match=words):
        machine.read(0, 100)
    assert checked(machine).corruptions == found


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zlib.compress(b"x" * (GRAIN + 1)), "more than 65536"),
        (zlib.compress(b"x" * (GRAIN - 1)), "65535 bytes instead of 65536"),
        (zlib.compress(bytes(1 << 24)), "more than 65536"),
        (zlib.compress(b"x" * GRAIN)[:-1], "cut off"),
        (zlib.compress(b"x" * GRAIN)[:-1] + b"?", "damaged"),
        (zlib.compress(b"x" * GRAIN)[2:], "damaged"),
        (b"", "marker"),
    ],
)
def test_what_a_grain_must_be(data: bytes, words: str) -> None:
    codec = GrainCodec(7, GRAIN, True)
    with pytest.raises(ValueError, match=words):
        codec.unpack(struct.pack("<QI", 7, len(data)) + data, GRAIN)
    with pytest.raises(ValueError, match="header"):
        codec.unpack(b"\7" + bytes(10), GRAIN)
    assert codec.unpack(codec.pack(b"y" * GRAIN), GRAIN) == b"y" * GRAIN


@pytest.mark.parametrize("cut", [512, 1024, 1536, 4096, 100_000])
def test_a_download_that_was_cut_off_names_what_is_missing(cut: int) -> None:
    file = written(40 * MIB, some(40 * MIB, 3))
    with pytest.raises(ImageError, match="footer"):
        reader(file[:-cut])


def test_a_directory_that_is_missing() -> None:
    file = bytearray(written(40 * MIB, some(40 * MIB, 3)))
    struct.pack_into("<Q", file, len(file) - 1024 + 56, len(file) // 512 + 7)
    with pytest.raises(ImageError, match=r"directory.*missing"):
        reader(bytes(file))


@pytest.mark.parametrize(
    "fields",
    [
        {"grain": 0},
        {"grain": 3},
        {"grain": 1 << 16},
        {"grain": 1 << 63},
        {"entries": 0},
        {"entries": 1 << 31},
        {"capacity": (1 << 64) - 1},
        {"gd": 1 << 63},
        {"gd": 0},
        {"version": 4},
        {"d_offset": 1 << 62},
    ],
)
def test_hostile_header(fields: dict[str, int]) -> None:
    with pytest.raises(ImageError):
        reader(bytes(by_hand({0: b"x"}, fields=fields)))


def test_random_damage_is_never_a_traceback() -> None:
    rnd = random.Random(11)
    grains = {i: random.Random(i).randbytes(300) * 30 for i in range(20)}
    whole = written(2 * MIB, {i: g[:GRAIN] for i, g in grains.items()})
    for _ in range(150):
        file = bytearray(whole)
        for _ in range(rnd.randrange(1, 6)):
            spot = rnd.choice([0, 65536, len(file) - 5 * 512 - 2048, rnd.randrange(len(file))])
            file[min(spot + rnd.randrange(600), len(file) - 1)] = rnd.randrange(256)
        try:
            machine = reader(bytes(file))
            checked(machine)
            machine.read(0, min(machine.format.size, 2 * MIB))
        except ImageError:
            pass


def test_the_end_of_stream_marker_is_checked() -> None:
    file = bytearray(written(MIB, {1: b"x"}))
    file[-500] = 1
    assert checked(reader(bytes(file))).corruptions == 1


# -- it is not written
def test_writing_is_refused_by_name() -> None:
    machine = reader(written(MIB, {0: b"x" * GRAIN}))
    with pytest.raises(UnsupportedFeature, match="convert"):
        machine.write(0, b"y")
    with pytest.raises(UnsupportedFeature, match="convert"):
        machine.zero(0, GRAIN)
    assert machine.discard(0, GRAIN) is False


def test_info() -> None:
    machine = reader(written(MIB, {}))
    info = machine.format.info()
    assert info["create-type"] == "streamOptimized"
    assert info["extents"][0]["compressed"] is True
    assert info["extents"][0]["cluster-size"] == GRAIN


def test_the_level_is_a_create_option() -> None:
    assert DRIVER.stream is not None
    options = {"size": MIB, "subformat": "streamOptimized"}
    writer: Any = DRIVER.stream({**options, "compression_level": 9})
    assert writer.codec.level == 9
    for wrong in ({"compression_level": 10}, {"compression_level": 0}):
        with pytest.raises(UsageError, match="level"):
            DRIVER.stream({**options, **wrong})
    with pytest.raises(UsageError, match="not compressed"):
        Machine().run(DRIVER.create({"size": MIB, "compression_level": 1}))  # type: ignore[misc]
