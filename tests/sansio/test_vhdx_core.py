"""VHDX by bytes alone: what is written in which order, what a log does, what a crash leaves."""

from __future__ import annotations

import bz2
import hashlib
import random
import uuid
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from diskwright.codecs.crc32c import crc32c
from diskwright.contract import DISCARD, WRITE, WRITE_ZERO, ZERO_UNMAP
from diskwright.errors import CorruptImage, ImageError, NotSupported, UnsupportedFeature, UsageError
from diskwright.extents import DATA, HOLE, INLINE
from diskwright.extents import ZERO as ZERO_EXTENT
from diskwright.formats import vhdx
from diskwright.formats.vhdx import log as vlog
from diskwright.formats.vhdx import structures as st
from diskwright.formats.vhdx.creation import automatic_block_size
from house import tinyvhdx as tiny
from house.tinyvhdx import FULL, MIB, NOT_PRESENT, PARTIAL, ZERO, TinyVhdx
from sansio import oracle
from sansio.machine import Machine, put

DRIVER = vhdx.DRIVER
SECTOR = 512
PARENT = "{11111111-2222-4333-8444-555555555555}"
FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"


class VhdxMachine(Machine):
    """A machine that reads what a log in memory holds, too, and whose GUIDs are the same in every
    run."""

    def read(self, offset: int, length: int) -> bytes:
        extents = list(self.extents(offset, length))
        if not any(extent.kind == INLINE for _, extent in extents):
            return super().read(offset, length)
        out = b""
        for at, extent in extents:
            if extent.kind == INLINE:
                out += extent.data  # type: ignore[union-attr]
            elif extent.kind == DATA:
                out += self.pread("file", extent.host, extent.length)  # type: ignore[union-attr]
            else:
                backing = "backing" in self.slots and extent.kind == HOLE
                out += self.pread("backing", at, extent.length) if backing else bytes(extent.length)
        return out

    def open(self, driver: Any = DRIVER, **options: Any) -> Any:
        if "backing" in self.slots:
            options.setdefault("backing", "given")
        return super().open(driver, **options)


def created(size: int, backing: bytes | None = None, **options: Any) -> bytes:
    """The bytes of a new image."""
    if backing is not None:
        options |= {"backing_file": "base.vhdx", "backing_identity": PARENT}
    machine = VhdxMachine()
    machine.run(DRIVER.create({"size": size, **options}))  # type: ignore[misc]
    return bytes(machine.slots["file"])


def made(size: int, backing: bytes | None = None, **options: Any) -> VhdxMachine:
    """A machine with a new image, open."""
    machine = VhdxMachine(created(size, backing, **options), backing)
    machine.open()
    return machine


def opened(data: bytes, backing: bytes | None = None, **options: Any) -> VhdxMachine:
    machine = VhdxMachine(data, backing)
    machine.open(**options)
    return machine


def headers(data: bytes | bytearray) -> list[st.Header | None]:
    return [
        st.parse_header(bytes(data[at : at + 4096]), slot) for slot, at in enumerate(st.HEADERS)
    ]


def current(data: bytes | bytearray) -> st.Header:
    return max([h for h in headers(data) if h], key=lambda h: h.sequence)


def no_corruption(machine: Machine) -> None:
    result = machine.run(machine.format.check())
    assert not result.corruptions and not result.check_errors, result.findings


# -- the checksum
def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    rng = random.Random(3)
    for length in [*range(70), 255, 256, 257, 1027, 4096, 70001]:
        data = rng.randbytes(length) + bytes(rng.choice([0, 3, 4096]))
        assert crc32c(data) == tiny.crc32c(data)
        cut = rng.randrange(len(data) + 1)
        assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


# -- creation
CREATED = [
    {"size": 64 * MIB},
    {"size": 3 * MIB + 512, "block_size": MIB},
    {"size": 40 * MIB, "subformat": "fixed", "block_size": 8 * MIB},
    {"size": 100 * MIB, "block_state_zero": False, "log_size": 3 * MIB},
    {"size": 5 << 30, "block_size": MIB},
    {"size": 101 << 30},
    {"size": 64 << 40},
]


@oracle.needs_qemu
@pytest.mark.parametrize("options", CREATED, ids=str)
def test_created_images_are_clean_elsewhere(options: dict[str, Any], tmp_path: Path) -> None:
    image = tmp_path / "a.vhdx"
    image.write_bytes(created(**options))
    oracle.check(image)
    info = oracle.ok("qemu-img", "info", "--output=json", str(image))
    wanted = automatic_block_size(options["size"])
    assert f'"cluster-size": {options.get("block_size", wanted)}' in info
    assert f'"virtual-size": {options["size"]}' in info


def test_every_structure_is_required_and_there_twice() -> None:
    data = created(8 * MIB)
    first, second = headers(data)
    assert first and second and abs(first.sequence - second.sequence) == 1
    assert first.log_guid == st.NO_GUID and first.version == 1 and not first.log_version
    assert data[192 << 10 : 256 << 10] == data[256 << 10 : 320 << 10]
    regions = st.parse_regions(data[192 << 10 : 256 << 10], 192 << 10)
    assert all(region.required for region in regions) and len(regions) == 2
    machine = opened(data)
    assert all(item.flags & 4 for item in machine.format.items)
    assert machine.format.parameters.disk_id != bytes(16)


def test_a_disk_of_no_size() -> None:
    data = created(0)
    assert len(data) == 67 * MIB  # QEMU wants room for the bitmaps of 2^32 blocks
    machine = opened(data)
    assert machine.format.size == 0 and machine.close() == data
    no_corruption(machine)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 65 << 40},
        {"size": 1, "block_size": 3 * MIB},
        {"size": 1, "block_size": 1 << 19},
        {"size": 1, "block_size": 512 * MIB},
        {"size": 1, "log_size": 5},
        {"size": 1, "log_size": 1 << 32},
        {"size": 1, "subformat": "sparse"},
        {"size": 1, "subformat": "differencing"},
        {"size": 1, "logical_sector_size": 1024},
        {"size": 1, "preallocation": "metadata"},
        {"size": 1, "backing_file": "x"},
        {"size": 1, "backing_file": "x", "backing_identity": PARENT, "subformat": "fixed"},
        {"size": 1, "backing_file": "x", "backing_identity": PARENT, "backing_fmt": "raw"},
    ],
    ids=str,
)
def test_options_that_no_image_can_have(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        VhdxMachine().run(DRIVER.create(options))  # type: ignore[misc]


# -- what a guest sees
CASES: list[dict[str, Any]] = [
    {"size": 6 * MIB + 512, "block_size": MIB},
    {"size": 20 * MIB, "block_size": 8 * MIB},
    {"size": 6 * MIB + 512, "block_size": MIB, "subformat": "fixed"},
    {"size": 6 * MIB + 4096, "block_size": MIB, "logical_sector_size": 4096},
    {"size": 9 * MIB, "block_size": 2 * MIB, "block_state_zero": False, "log_size": 2 * MIB},
]


def work(machine: Machine, model: bytearray, rng: random.Random, steps: int) -> None:
    unit, size = machine.format.unit, len(model)
    for _ in range(steps):
        what = rng.random()
        length = min(rng.choice([1, 511, 512, 4096, 70_001, unit, unit + 5000]), size)
        offset = rng.randrange(size - length + 1)
        if what < 0.6:
            data = rng.randbytes(length)
            machine.write(offset, data)
            model[offset : offset + length] = data
        elif what < 0.8:
            offset -= offset % unit
            length = min(unit * rng.choice([1, 2]), size - offset)
            kind = rng.choice([WRITE_ZERO, ZERO_UNMAP, DISCARD])
            assert machine.change(offset, length, kind)
            model[offset : offset + length] = bytes(length)
        elif what < 0.9:
            machine.flush()
        else:
            assert machine.read(offset, length) == model[offset : offset + length]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_random_requests(
    options: dict[str, Any], backing: bool, poison: bool, tmp_path: Path
) -> None:
    if backing and options.get("subformat"):
        return
    rng = random.Random(str((options, backing, poison)))
    base = rng.randbytes(options["size"]) if backing else None
    model = bytearray(base or options["size"])
    machine = made(**options, backing=base)
    machine.poison = poison
    for _ in range(3):
        work(machine, model, rng, 40 if machine.format.unit == MIB else 12)
        data = machine.close()
        machine = opened(data, base)
        machine.poison = poison
        assert machine.read(0, len(model)) == model
        no_corruption(machine)
    if (
        not backing
        and oracle.shutil.which("qemu-img")
        and options.get("logical_sector_size") is None
    ):
        image = tmp_path / "a.vhdx"
        image.write_bytes(data)
        oracle.check(image)
        assert oracle.raw(image, tmp_path / "a.raw") == model


def test_a_block_that_is_wholly_written_is_wholly_present() -> None:
    base = bytes([7]) * (3 * MIB)
    machine = made(3 * MIB, base, block_size=MIB)
    machine.write(MIB + 100, b"x")
    kinds = [(at, extent.kind, extent.length) for at, extent in machine.extents(MIB, MIB)]
    assert kinds == [(MIB, DATA, 512), (MIB + 512, HOLE, MIB - 512)]
    machine.write(MIB + 512, bytes(MIB - 512))
    assert [extent.kind for _, extent in machine.extents(MIB, MIB)] == [DATA]
    machine.write(0, bytes(MIB))
    data = machine.close()
    image = machine.format
    states = [data[image.bat.offset + 8 * block] & 7 for block in range(3)]
    assert states == [FULL, FULL, NOT_PRESENT]
    assert machine.read(MIB, 512) == bytes([7]) * 100 + b"x" + bytes([7]) * 411


def test_stale_bits_of_a_block_say_nothing() -> None:
    """A block that is not partially present may have any bits; they are set anew when it is."""
    sectors = set(range(2048, 4096))
    start = TinyVhdx(
        blocks={0: (PARTIAL, b"a" * 512), 1: (NOT_PRESENT, b"")},
        parent=[("parent_linkage", PARENT), ("relative_path", "base.vhdx")],
        bitmap={0} | sectors,
    )
    base = b"p" * (4 * MIB)
    machine = opened(start.data, base)
    assert machine.read(MIB, MIB) == base[MIB : 2 * MIB]
    machine.write(MIB + 1024, b"new")
    wanted = base[:1024] + b"new" + base[1027:MIB]
    assert machine.read(MIB, MIB) == wanted
    assert opened(machine.close(), base).read(MIB, MIB) == wanted


def test_zero_and_discard_hide_the_parent() -> None:
    base = b"p" * (4 * MIB)
    machine = made(4 * MIB, base, block_size=MIB)
    machine.zero(0, MIB)
    machine.discard(MIB, MIB)
    machine.zero(2 * MIB, MIB, unmap=True)
    machine.write(3 * MIB, b"q" * 512)
    machine.zero(3 * MIB, MIB)
    data = machine.close()
    assert opened(data, base).read(0, 4 * MIB) == bytes(4 * MIB)
    bat = machine.format.bat.offset
    assert [data[bat + 8 * i : bat + 8 * i + 8] for i in range(3)] == [
        ZERO.to_bytes(8, "little")
    ] * 3
    machine.format.has_backing = False
    machine.write(MIB + 512, b"r" * 512)
    assert opened(machine.close(), base).read(MIB, 1536) == bytes(512) + b"r" * 512 + bytes(512)


def test_states_of_blocks() -> None:
    blocks = {n: (n if n != FULL else 2, b"") for n in (0, 1, 2, 3, 5)}
    blocks[6] = (FULL, b"six")
    machine = opened(TinyVhdx(8 * MIB, blocks=blocks).data, **{"read-only": True})
    found = [type(extent).__name__ for _, extent in machine.extents(0, 8 * MIB)]
    assert found == ["Hole", "Zero", "Zero", "Zero", "Hole", "Zero", "Data", "Hole"]
    for state in (4, PARTIAL):
        machine = opened(TinyVhdx(blocks={0: (FULL, b"x"), 1: (state, b"")}).data)
        assert machine.read(0, 1) == b"x"
        with pytest.raises(CorruptImage, match="BAT entry 1 has state"):
            machine.read(MIB, 1)
        with pytest.raises(CorruptImage, match="offset"):
            machine.write(MIB, b"y")


@pytest.mark.parametrize("place", [0, 64 << 10, MIB, 2 * MIB, 3 * MIB, 1 << 40])
def test_entries_that_point_at_structures(place: int) -> None:
    made = TinyVhdx()
    entry = tiny.BAT + 8 * 1
    data = made.with_field(entry, 8, place // MIB * MIB | FULL)
    machine = opened(data, check=True)
    for action in (lambda: machine.read(MIB, 1), lambda: machine.write(MIB, b"x")):
        with pytest.raises(CorruptImage) as caught:
            action()
        assert caught.value.field == "BAT entry" and caught.value.offset == entry
    assert machine.format.map_one(MIB, 1, False) == -1
    if place > len(data):
        with pytest.raises(CorruptImage, match="behind the end"):
            opened(data)


# -- the headers
def test_headers_change_before_data_do() -> None:
    machine = made(4 * MIB, block_size=MIB, subformat="fixed")
    before = current(machine.slots["file"])
    assert before == machine.format.header
    identity = machine.format.identity
    extents = list(machine.extents(0, MIB))
    assert not extents[0][1].writable  # type: ignore[union-attr]
    assert machine.format.map_one(0, 512, True) == -1
    machine.write(0, b"x" * 512)
    writes = [entry for entry in machine.log if entry[0] != "barrier"]
    assert [offset for _, offset, _ in writes[:2]] == [st.HEADERS[1 - before.slot], before.offset]
    assert machine.log[1] == machine.log[3] == ("barrier",) and writes[2][2] == b"x" * 512
    after = current(machine.slots["file"])
    assert after.sequence == before.sequence + 2
    assert after.file_guid != before.file_guid and after.data_guid != before.data_guid
    assert after.log_guid == st.NO_GUID and machine.format.identity != identity
    assert machine.format.identity == "{" + str(uuid.UUID(bytes_le=after.data_guid)) + "}"
    count = len(machine.log)
    machine.write(512, b"y" * 512)
    machine.flush()
    assert len(machine.log) == count + 2  # one write, one barrier: nothing else changed
    machine.close()
    assert current(machine.slots["file"]) == after


def test_reading_changes_nothing() -> None:
    data = TinyVhdx().data
    machine = opened(data)
    machine.read(0, 4 * MIB)
    assert machine.close() == data and not [e for e in machine.log if e[0] == "write"]


def test_the_log_is_in_use_while_it_holds_something() -> None:
    machine = made(8 * MIB, block_size=MIB)
    machine.write(0, b"x")
    machine.flush()
    guid = current(machine.slots["file"]).log_guid
    assert guid != st.NO_GUID
    assert all(h and h.log_guid == guid for h in headers(machine.slots["file"]))
    machine.write(MIB, b"x")
    machine.flush()
    assert current(machine.slots["file"]).log_guid == guid
    machine.close()
    assert all(h and h.log_guid == st.NO_GUID for h in headers(machine.slots["file"]))


def test_which_header_counts() -> None:
    data = bytearray(TinyVhdx().data)
    newer = data[128 << 10 : (128 << 10) + 4096]
    assert opened(bytes(data)).format.header.slot == 1
    data[(128 << 10) + 100] ^= 1
    assert opened(bytes(data)).format.header.slot == 0
    data[64 << 10 : (64 << 10) + 4096] = data[128 << 10 : (128 << 10) + 4096] = newer
    assert opened(bytes(data)).format.header.slot == 0
    other = st.parse_header(bytes(newer), 1)
    assert other
    data[64 << 10 : (64 << 10) + 4096] = other._replace(file_guid=bytes([9]) * 16).encode()
    with pytest.raises(CorruptImage, match="same sequence number and differ"):
        opened(bytes(data))
    data[64 << 10 : (128 << 10) + 4096] = bytes((64 << 10) + 4096)
    with pytest.raises(CorruptImage, match="No valid VHDX header"):
        opened(bytes(data))


def test_the_second_region_table() -> None:
    data = bytearray(TinyVhdx().data)
    data[(192 << 10) + 20] ^= 1
    assert opened(bytes(data)).read(0, 1) == b"\x11"
    data[(256 << 10) + 20] ^= 1
    with pytest.raises(ImageError, match="no valid region table"):
        opened(bytes(data))


def test_what_is_required_and_unknown_is_refused_by_name() -> None:
    made = TinyVhdx()
    name = uuid.UUID("01020304-0506-0708-090a-0b0c0d0e0f10")
    data = bytearray(made.data)
    at = tiny.METADATA + 32 * 5
    data[at : at + 16] = name.bytes_le
    with pytest.raises(UnsupportedFeature, match=str(name)):
        opened(bytes(data))
    regions = [
        *st.parse_regions(made.data[192 << 10 : 256 << 10], 0),
        st.Region(name.bytes_le, 100 * MIB, MIB, True),
    ]
    data = bytearray(made.data)
    data[192 << 10 : 256 << 10] = st.encode_regions(regions)
    with pytest.raises(UnsupportedFeature, match=str(name)):
        opened(bytes(data))
    regions[2] = regions[2]._replace(required=False)
    data[192 << 10 : 256 << 10] = st.encode_regions(regions)
    assert opened(bytes(data)).read(0, 1) == b"\x11"


# -- the log
def with_log(image: TinyVhdx, entries: list[tuple[int, bytes]], guid: bytes = b"") -> bytes:
    """The image with (offset in the log, entry) in its log, going around its end."""
    data = bytearray(image.data)
    for at, entry in entries:
        for i in range(0, len(entry), 4096):
            place = tiny.LOG + (at + i) % MIB
            data[place : place + 4096] = entry[i : i + 4096]
    header = current(data)._replace(log_guid=guid or tiny.LOG_GUID.bytes_le)
    data[header.offset : header.offset + 4096] = header.encode()
    return bytes(data)


def entry_of(changes: dict[int, bytes | None], sequence: int, tail: int, end: int) -> bytes:
    return TinyVhdx.log_entry(changes, sequence, tail, end)


def replayed(data: bytes, backing: bytes | None = None) -> bytes:
    """The guest's bytes after a replay into the file, which are those after one in memory."""
    reader = opened(data, backing, **{"read-only": True})
    size = reader.format.size
    content = reader.read(0, size)
    assert reader.slots["file"] == data and not reader.log
    writer = opened(data, backing)
    assert current(writer.slots["file"]).log_guid == st.NO_GUID
    assert writer.read(0, size) == content
    file = bytes(writer.slots["file"])
    assert opened(file, backing).slots["file"] == file
    no_corruption(reader)
    no_corruption(writer)
    return content


def page(byte: int) -> bytes:
    return bytes([byte]) * 4096


def test_the_newest_sequence_is_replayed_around_the_end_of_the_ring() -> None:
    image = TinyVhdx()
    at = image.places[0]
    first = MIB - 3 * 4096
    entries = [
        (first, entry_of({at: page(1), at + 4096: page(2)}, 41, first, image.end)),
        (0, entry_of({at: page(3), at + 8192: None}, 42, first, image.end)),
        (8192, entry_of({at + 12288: page(4)}, 43, first, image.end)),
        # An older sequence, and one that has lost its tail.
        (65536, entry_of({at: page(9)}, 17, 65536, image.end)),
        (131072, entry_of({at: page(8)}, 99, 122880, image.end)),
    ]
    content = replayed(with_log(image, entries))
    wanted = page(3) + page(2) + bytes(4096) + page(4)
    assert content[: len(wanted)] == wanted
    assert content[len(wanted) : MIB] == image.model[len(wanted) : MIB]


def test_a_torn_entry_is_not_replayed() -> None:
    image = TinyVhdx()
    at = image.places[0]
    entries = [
        (0, entry_of({at: page(1)}, 5, 0, image.end)),
        (8192, entry_of({at: page(2), at + 4096: page(2)}, 6, 0, image.end)),
    ]
    whole = with_log(image, entries)
    assert replayed(whole)[:8192] == page(2) * 2
    for sector in range(3 * 8):
        torn = bytearray(whole)
        place = tiny.LOG + 8192 + sector * 512
        if not any(torn[place : place + 512]):
            continue
        torn[place : place + 512] = bytes(512)
        assert replayed(bytes(torn))[:8192] == page(1) + b"\x11" * 4096
    old = bytearray(whole)
    place = tiny.LOG + 8192 + 2 * 4096  # a data sector of an entry that was there before
    old[place : place + 4096] = b"data" + bytes(4092)
    assert replayed(bytes(old))[:4096] == page(1)


def test_sequence_numbers_must_follow_each_other() -> None:
    image = TinyVhdx()
    at = image.places[0]
    entries = [
        (0, entry_of({at: page(1)}, 5, 0, image.end)),
        (8192, entry_of({at + 4096: page(2)}, 7, 0, image.end)),
    ]
    assert replayed(with_log(image, entries))[:8192] == page(1) + b"\x11" * 4096


def test_a_log_without_a_valid_entry_is_corrupt() -> None:
    image = TinyVhdx()
    for data in (
        with_log(image, []),
        with_log(image, [(0, entry_of({image.places[0]: page(1)}, 5, 4096, image.end))]),
        with_log(image, [(0, entry_of({image.places[0]: page(1)}, 5, 0, image.end))], b"x" * 16),
    ):
        for options in ({}, {"read-only": True}):
            with pytest.raises(CorruptImage, match="log"):
                opened(data, **options)


def test_lengths_of_the_file_in_a_log() -> None:
    image = TinyVhdx()
    entry = vlog.encode_entry(
        [vlog.Change(tiny.BAT, 4096, (image.end | FULL).to_bytes(8, "little").ljust(4096, b"\0"))],
        tiny.LOG_GUID.bytes_le, 5, 0, image.end, image.end + MIB,
    )  # fmt: skip
    data = with_log(image, [(0, entry)])
    assert replayed(data)[:MIB] == bytes(MIB)
    writer = opened(data)
    assert len(writer.slots["file"]) == image.end + MIB
    with pytest.raises(CorruptImage, match="log asks for"):
        opened(data[:-MIB])


@pytest.mark.parametrize("place", [0, 64 << 10, 128 << 10, MIB, MIB + 4096, 1 << 63])
def test_a_log_does_not_change_headers_or_itself(place: int) -> None:
    image = TinyVhdx()
    data = with_log(image, [(0, entry_of({place: page(0)}, 5, 0, image.end))])
    for options in ({}, {"read-only": True}):
        with pytest.raises(CorruptImage, match="descriptor 0"):
            opened(data, **options)


def test_a_log_over_every_structure() -> None:
    """Region tables, metadata, BAT and bitmaps are read as the log leaves them."""
    start = TinyVhdx(
        blocks={0: (PARTIAL, b"a" * MIB), 1: (FULL, b"b" * MIB)},
        parent=[("parent_linkage", PARENT), ("relative_path", "base.vhdx")],
        bitmap={0, 1},
    )
    base = b"p" * (4 * MIB)
    other = TinyVhdx(
        8 * MIB,
        blocks={0: (PARTIAL, b"a" * MIB), 1: (ZERO, b"b")},
        parent=[("parent_linkage", PARENT), ("relative_path", "base.vhdx")],
        bitmap={0, 5},
    )
    pages = {}
    for at in [192 << 10, 256 << 10, tiny.METADATA, tiny.METADATA + 65536, tiny.BAT]:
        pages[at] = other.data[at : at + 4096]
    bitmap = other.data[other.bitmaps[0] : other.bitmaps[0] + 4096]
    pages[start.bitmaps[0]] = bitmap
    damaged = bytearray(start.data)
    for at in pages:
        damaged[at : at + 4096] = page(0xDD)
    start.data = bytes(damaged)
    content = replayed(with_log(start, [(0, entry_of(pages, 5, 0, start.end))]), base * 2)
    model = bytearray(base * 2)
    model[:512] = model[5 * 512 : 6 * 512] = b"a" * 512
    model[MIB : 2 * MIB] = bytes(MIB)
    assert content == model


def test_entries_of_ours() -> None:
    """Never longer than a third of the log, never around its end, one behind the other."""
    machine = made(4 << 30, block_size=MIB, log_size=MIB)
    for turn in range(3):
        for block in range(turn, 4096, 512):
            machine.write(block * MIB, b"x")
        machine.flush()
    machine.change(0, 4 << 30, ZERO_UNMAP)
    machine.flush()
    at = machine.format.header.log_offset
    writes = [entry for entry in machine.log if entry[0] == "write"]
    entries = [(offset - at, data) for _, offset, data in writes if at <= offset < at + MIB]
    assert len(entries) >= 4
    parsed = [
        vlog.parse_entry_header(data, machine.format.header.log_guid, MIB) for _, data in entries
    ]
    for (place, data), header in zip(entries, parsed, strict=True):
        assert header and header.length == len(data) <= MIB // 3
        assert header.tail == place and place + len(data) <= MIB
        assert st.is_sealed(data)
        assert header.flushed <= header.last
    for (place, data), (following, _) in pairwise(entries):
        assert following == place + len(data) or (following == 0 and place + 2 * len(data) > 0)
    assert [h.sequence for h in parsed if h] == list(range(1, len(entries) + 1))


def test_zeroes_in_the_log_and_many_descriptors() -> None:
    changes = [vlog.Change(i * 8192, 4096, page(i & 0xFF)) for i in range(200)]
    changes.append(vlog.Change(1 << 30, 1 << 20, None))
    data = vlog.encode_entry(changes, b"g" * 16, 1 << 33 | 5, 0, MIB, MIB)
    header = vlog.parse_entry_header(data, b"g" * 16, 2 * MIB)
    assert header and header.length == len(data) and header.descriptor_bytes == 8192
    assert st.is_sealed(data)
    found = vlog.parse_descriptors(data, header)
    assert found and [(d.offset, d.length) for d in found] == [c[:2] for c in changes]
    for i in range(200):
        sector = data[8192 + 4096 * i : 8192 + 4096 * (i + 1)]
        assert vlog.sector_of(sector, 1 << 33 | 5)
        assert vlog.restore(sector, found[i]) == page(i & 0xFF)
    batches = vlog.batches(changes, 85)
    assert [c for batch in batches for c in batch] == changes
    assert all(
        vlog.sectors_for(sum(c.data is None for c in b), sum(c.data is not None for c in b)) <= 85
        for b in batches
    )


# -- crashes
class Recorder:
    """For every sector the values it may have after a crash."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.marks: list[tuple[int, bytes]] = [(0, content)]
        self.steps: list[tuple[int, int, bytes]] = []
        """(entries in the log before, guest offset, bytes) of every request."""

    def admissible(self, cut: int) -> tuple[bytes, list[tuple[int, bytes]]]:
        at, content = [mark for mark in self.marks if mark[0] <= cut][-1]
        return content, [(o, d) for before, o, d in self.steps if at <= before <= cut]

    def accept(self, content: bytes, cut: int) -> None:
        flushed, later = self.admissible(cut)
        if content == flushed:
            return
        for at in range(0, len(flushed), SECTOR):
            found = content[at : at + SECTOR]
            if found == flushed[at : at + SECTOR]:
                continue
            allowed = {flushed[at : at + SECTOR]}
            for offset, data in later:
                if offset <= at < offset + len(data):
                    allowed.add(data[at - offset : at - offset + SECTOR])
            assert found in allowed, (cut, at)


def crash(start: bytes, log: list[tuple[Any, ...]], cut: int, rng: random.Random) -> bytes:
    """The file after a crash with ``cut`` entries issued: what no barrier covers is there, absent
    or torn at a sector."""
    file = bytearray(start)
    last = max((i for i in range(cut) if log[i][0] == "barrier"), default=-1)
    chance = rng.choice([0.0, 0.5, 1.0])
    tear = rng.choice([512, 4096])
    for i, entry in enumerate(log[:cut]):
        if entry[0] == "truncate" and (i <= last or rng.random() >= chance):
            del file[entry[1] :]
            file.extend(bytes(entry[1] - len(file)))
        if entry[0] != "write":
            continue
        _, offset, data = entry
        if i > last:
            if rng.random() < chance:
                continue
            if rng.random() < 0.4:
                kept = [at for at in range(0, len(data), tear) if rng.random() < 0.5]
                for at in kept:
                    put(file, offset + at, data[at : at + tear])
                continue
        put(file, offset, data)
    return bytes(file)


CRASHES: list[dict[str, Any]] = [
    {"size": 5 * MIB + 512, "block_size": MIB},
    {"size": 5 * MIB, "block_size": MIB, "subformat": "fixed"},
    {"size": 5 * MIB, "block_size": MIB, "logical_sector_size": 4096},
]


@pytest.mark.parametrize("options", CRASHES, ids=str)
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_crash_states(options: dict[str, Any], backing: bool, poison: bool, tmp_path: Path) -> None:
    if backing and options.get("subformat"):
        return
    rng = random.Random(str((options, backing, poison)))
    size = options["size"]
    base = rng.randbytes(size) if backing else None
    machine = made(**options, backing=base)
    machine.poison = poison
    unit = machine.format.unit
    sector = machine.format.sector_size
    recorder = Recorder(base or bytes(size))
    start = bytes(machine.slots["file"])
    machine.log.clear()
    for _ in range(30):
        before = len(machine.log)
        what = rng.random()
        if what < 0.25:
            machine.flush()
            recorder.marks.append((len(machine.log), bytes(recorder.now)))
            continue
        if what < 0.75:
            length = rng.choice([sector, 3 * sector, 64 << 10])
            offset = rng.randrange((size - length) // sector + 1) * sector
            data = bytes([rng.randrange(1, 256)]) * length
            machine.write(offset, data)
        else:
            offset = rng.randrange(-(-size // unit)) * unit
            data = bytes(min(unit, size - offset))
            assert machine.change(offset, len(data), rng.choice([WRITE_ZERO, ZERO_UNMAP, DISCARD]))
        recorder.now[offset : offset + len(data)] = data
        recorder.steps.append((before, offset, data))
    machine.close()
    recorder.marks.append((len(machine.log), bytes(recorder.now)))
    log = machine.log
    for turn in range(40):
        cut = rng.randrange(len(log) + 1)
        state = crash(start, log, cut, rng)
        reader = opened(state, base, **{"read-only": True})
        content = reader.read(0, size)
        recorder.accept(content, cut)
        no_corruption(reader)
        writer = opened(state, base)
        assert writer.read(0, size) == content
        no_corruption(writer)
        if turn % 8 == 0:
            # A crash while the log is replayed, too.
            again = crash(state, writer.log, rng.randrange(len(writer.log) + 1), rng)
            assert opened(again, base).read(0, size) == content
            if not backing and sector == 512 and oracle.shutil.which("qemu-img"):
                image = tmp_path / "a.vhdx"
                image.write_bytes(state)
                oracle.ok("qemu-img", "check", "-r", "all", str(image))
                assert oracle.raw(image, tmp_path / "a.raw") == content


def test_space_comes_back_when_the_log_is_on_disk() -> None:
    machine = made(8 * MIB, block_size=MIB)
    machine.write(0, b"a" * MIB)
    machine.flush()
    length = len(machine.slots["file"])
    machine.discard(0, MIB)
    machine.write(MIB, b"b" * 512)  # not there: the freed block is still in the BAT on disk
    assert len(machine.slots["file"]) == length + MIB
    machine.flush()
    machine.write(2 * MIB, b"c" * 512)
    assert len(machine.slots["file"]) == length + MIB
    assert machine.read(2 * MIB, MIB) == b"c" * 512 + bytes(MIB - 512)


def test_an_aborted_write_leaves_no_trace_of_its_bytes() -> None:
    base = b"p" * (4 * MIB)
    for backing in (None, base):
        machine = made(4 * MIB, backing, block_size=MIB)
        plan = machine._plan([(100, 5000)], WRITE)
        for step in plan.steps:
            machine.pwrite(step.host, b"\xbb" * step.length)
        machine.abort(plan)
        want = bytes(4 * MIB) if backing is None else base
        assert machine.read(0, 4 * MIB) == want
        machine.write(MIB, b"x" * 512)
        assert machine.read(MIB, MIB) == b"x" * 512 + want[512:MIB]
        data = machine.close()
        reader = opened(data, backing)
        assert reader.read(0, 4 * MIB) == want[:MIB] + b"x" * 512 + want[MIB + 512 :]
        no_corruption(reader)


def test_emptied_images_show_their_parent() -> None:
    base = random.Random(1).randbytes(4 * MIB)
    machine = made(4 * MIB, base, block_size=MIB)
    empty = len(machine.slots["file"])
    work(machine, bytearray(base), random.Random(2), 30)
    machine.flush()
    identity = machine.format.identity
    machine.run(machine.format.make_empty())
    assert machine.read(0, 4 * MIB) == base and len(machine.slots["file"]) == empty
    assert machine.format.identity == identity
    machine.write(MIB, b"x")
    model = bytearray(base)
    model[MIB] = ord("x")
    assert opened(machine.close(), base).read(0, 4 * MIB) == model


# -- images of others
@oracle.needs_qemu
@pytest.mark.parametrize("name", ["iotest-dynamic-1G.vhdx", "iotest-dirtylog-10G-4M.vhdx"])
def test_images_of_hyper_v(name: str, tmp_path: Path) -> None:
    packed = FIXTURES / f"{name}.bz2"
    if not packed.exists():
        pytest.skip("the fixtures are not beside this checkout")
    data = bz2.decompress(packed.read_bytes())
    reader = opened(data, **{"read-only": True})
    writer = opened(data)
    found = {}
    for machine in (reader, writer):
        no_corruption(machine)
        extents = [
            (at, extent)
            for start in range(0, machine.format.size, 1 << 30)
            for at, extent in machine.extents(start, min(1 << 30, machine.format.size - start))
        ]
        found[machine] = {
            at: hashlib.sha256(machine.read(at, extent.length)).digest()
            for at, extent in extents
            if extent.kind not in (ZERO_EXTENT, HOLE)
        }
        lengths = {at: extent.length for at, extent in extents if at in found[machine]}
    assert found[reader] == found[writer] and reader.slots["file"] == data and found[reader]
    image, raw = tmp_path / name, tmp_path / "raw"
    image.write_bytes(data)
    oracle.ok("qemu-img", "check", "-r", "all", str(image))
    oracle.ok("qemu-img", "convert", "-O", "raw", str(image), str(raw))
    with raw.open("rb") as file:
        for at, digest in found[reader].items():
            file.seek(at)
            assert hashlib.sha256(file.read(lengths[at])).digest() == digest
        seen = sum(lengths.values())
        assert raw.stat().st_blocks * 512 <= seen


def test_space_between_blocks_is_found_when_an_image_is_opened() -> None:
    machine = made(8 * MIB, block_size=MIB)
    for block in range(4):
        machine.write(block * MIB, bytes([block + 1]) * MIB)
    machine.discard(MIB, 2 * MIB)
    machine.poison = True
    data = machine.close()
    again = opened(data)
    again.write(5 * MIB + 100, b"new")
    again.write(6 * MIB, b"new")
    assert len(again.slots["file"]) == len(data)
    again.write(7 * MIB, b"new")
    assert len(again.slots["file"]) == len(data) + MIB
    model = bytes([1]) * MIB + bytes(2 * MIB) + bytes([4]) * MIB + bytes(MIB)
    model += bytes(100) + b"new" + bytes(MIB - 103) + (b"new" + bytes(MIB - 3)) * 2
    assert again.read(0, 8 * MIB) == model
    last = opened(again.close())
    assert last.read(0, 8 * MIB) == model
    no_corruption(last)


def test_free_space_at_the_end_of_the_file_goes_when_it_is_closed() -> None:
    machine = made(8 * MIB, block_size=MIB)
    for block in range(4):
        machine.write(block * MIB, bytes([block + 1]) * MIB)
    length = len(machine.slots["file"])
    machine.discard(0, MIB)
    machine.discard(2 * MIB, 2 * MIB)
    data = machine.close()
    assert len(data) == length - 2 * MIB
    again = opened(data)
    assert again.read(0, 4 * MIB) == bytes(MIB) + bytes([2]) * MIB + bytes(2 * MIB)
    result = again.run(again.format.check())
    assert not result.leaks and not result.corruptions


def test_a_device_is_used_up_to_its_end_and_holds_what_it_held() -> None:
    machine = VhdxMachine(b"\xcc" * (8 * MIB + 4096))
    serve = machine._serve

    def device(request: Any) -> Any:
        if type(request).__name__ == "Truncate":
            raise NotSupported("Cannot resize device files")
        return serve(request)

    machine._serve = device  # type: ignore[method-assign]
    machine.run(DRIVER.create({"size": 8 * MIB, "block_size": MIB}))  # type: ignore[misc]
    machine.open(zero_beyond_end=False)
    assert machine.read(0, 8 * MIB) == bytes(8 * MIB)
    for block in range(4):
        machine.write(block * MIB + 100, b"x")
    with pytest.raises(OSError, match="No space"):
        machine.write(5 * MIB, b"x")
    machine.discard(0, MIB)
    machine.flush()
    machine.write(5 * MIB + 100, b"x")
    data = machine.close()
    assert len(data) == 8 * MIB + 4096
    one = bytes(100) + b"x" + bytes(MIB - 101)
    model = bytes(MIB) + one * 3 + bytes(MIB) + one + bytes(2 * MIB)
    assert opened(data, zero_beyond_end=False).read(0, 8 * MIB) == model


def test_a_last_block_that_is_cut_off() -> None:
    image = TinyVhdx(blocks={0: (FULL, b"x" * 512)})
    machine = opened(image.data[: image.places[0] + 512])
    assert machine.read(0, MIB) == b"x" * 512 + bytes(MIB - 512)
    machine.write(MIB, b"y")
    machine.write(4096, b"z")
    assert machine.read(0, 2 * MIB) == (
        b"x" * 512 + bytes(3584) + b"z" + bytes(MIB - 4097) + b"y" + bytes(MIB - 1)
    )
    no_corruption(opened(machine.close()))
