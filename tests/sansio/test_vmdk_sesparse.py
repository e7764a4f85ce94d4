"""seSparse extents by bytes alone."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from diskwright.contract import DISCARD, WRITE
from diskwright.errors import (
    CorruptImage,
    ImageError,
    NoSpace,
    NotSupported,
    UnsupportedFeature,
)
from diskwright.extents import DATA, HOLE, ZERO, Data
from diskwright.findings import CheckResult
from diskwright.formats.vmdk.format import Vmdk
from diskwright.formats.vmdk.sesparse.header import new_header
from diskwright.formats.vmdk.sesparse.map import entry_of, grain_of
from diskwright.formats.vmdk.sesparse.part import new_sesparse, open_sesparse
from diskwright.formats.vmdk.sesparse.space import fill, next_clear, next_set
from sansio.machine import Machine, put

MIB = 1 << 20
GRAIN = 4096
DISK = 40 * MIB + 512  # three tables, and a last grain of one sector
SLOT = "file"


def opened(image: Vmdk) -> Any:
    part = yield from open_sesparse(image, SLOT, 0, None)
    image.use_parts([part], [None], ["RW"])
    return image


def start(options: dict[str, Any]) -> tuple[Vmdk, Any]:
    image = Vmdk(options)
    image.has_backing = options.get("has_backing", False)
    return image, opened(image)


ALONE = SimpleNamespace(open=start)


def fresh(size: int = DISK, **options: Any) -> Machine:
    machine = Machine()
    machine.run(new_sesparse(SLOT, size // 512))
    return over(bytes(machine.slots[SLOT]), **options)


def over(file: bytes, backing: bytes | None = None, **options: Any) -> Machine:
    machine = Machine(file, backing)
    machine.open(ALONE, has_backing=backing is not None, **options)
    return machine


def checked(machine: Machine, fix: str = "") -> CheckResult:
    result = CheckResult()
    machine.run(machine.format.parts[0].check(result, fix))
    return result


def field(file: bytes, index: int) -> int:
    return int.from_bytes(file[8 * index : 8 * index + 8], "little")


def changed(file: bytes, at: int, value: int) -> bytes:
    out = bytearray(file)
    put(out, at, value.to_bytes(8, "little"))
    return bytes(out)


def test_layout_of_a_new_extent() -> None:
    """The places that ESXi logs for a disk of 100 MiB."""
    machine = fresh(100 * MIB)
    file = bytes(machine.slots[SLOT])
    assert struct.unpack_from("<26Q", file) == (
        *(0xCAFEBABE, 0x200000001, 204800, 8, 64, 0, 0, 0, 0, 0),
        *(1, 1, 2, 2, 2048, 2048, 4096, 2048, 6144, 2048, 8192, 2048, 10240, 2048),
        *(12288, 204800),
    )
    assert struct.unpack_from("<4Q", file, 512) == (0xCAFECAFE, 0, 0, 0)
    assert len(file) == 12288 * 512
    assert not any(file[1024:])


def test_layout_has_room_for_everything() -> None:
    for size in (0, 512, GRAIN, 16 * MIB, 16 * MIB + 512, 1 << 31, 1 << 41, 62 << 40, 64 << 40):
        header = new_header(size // 512)
        grains = -(-size // GRAIN)
        assert header.directory.size * 512 >= -(-size // (16 * MIB)) * 8
        assert header.tables.size // 64 >= header.table_count
        assert header.bitmap.size * 512 * 8 >= grains
        assert header.backmap.size * 512 >= grains * 8
        assert header.grain_count == grains
        ends = [1]
        for region in header[1:9]:
            assert region.offset >= ends[-1]
            ends.append(region.end)


def test_bytes_of_a_write() -> None:
    machine = fresh(100 * MIB)
    machine.write(20 * MIB + 5, b"hello")
    machine.write(0, b"x" * 9000)
    file = machine.close()
    # The first table is that of the second 16 MiB, which was written first.
    assert struct.unpack_from("<2Q", file, 4096 * 512) == (0x1000000000000001, 0x1000000000000000)
    assert field(file, 64 + 1) == 2
    tables = 6144 * 512
    assert field(file, (tables + 1024 * 8) // 8) == 3 << 60
    assert struct.unpack_from("<4Q", file, tables + 64 * 512) == (
        *(3 << 60 | n << 48 for n in (1, 2, 3)), 0)  # fmt: skip
    assert file[8192 * 512] == 0b1111
    assert struct.unpack_from("<5Q", file, 10240 * 512) == (5120, 0, 1, 2, 0)
    assert file[12288 * 512 + 5 :][:5] == b"hello"
    assert len(file) == (12288 + 4 * 8) * 512


def test_entries() -> None:
    for grain in (0, 1, 4095, 4096, 4097, 1 << 30, (1 << 34) - 1):
        assert grain_of(entry_of(grain)) == grain
    assert entry_of(4095) == 0x3FFF000000000000
    assert entry_of(4096) == 0x3000000000000001


def test_bits() -> None:
    rnd = random.Random(1)
    data = bytearray(64)
    model = [False] * 512
    for _ in range(400):
        a, b = sorted((rnd.randrange(513), rnd.randrange(513)))
        value = rnd.random() < 0.5
        fill(data, a, b, value)
        model[a:b] = [value] * (b - a)
        assert int.from_bytes(data, "little") == sum(1 << i for i, v in enumerate(model) if v)
        at = rnd.randrange(512)
        assert next_clear(data, at) == next((i for i in range(at, 512) if not model[i]), 512)
        assert next_set(data, at) == next((i for i in range(at, 512) if model[i]), 512)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("backed", [False, True])
def test_random_requests(seed: int, backed: bool) -> None:
    rnd = random.Random(seed)
    backing = rnd.randbytes(64 * 1024) * (DISK // 65536 + 1) if backed else None
    model = bytearray(backing[:DISK] if backing else bytes(DISK))
    machine = over(bytes(fresh().slots[SLOT]), backing)
    machine.poison = True
    spots = [0, 16 * MIB - 3 * GRAIN, 32 * MIB, DISK - 5 * GRAIN - 512, DISK // 2]
    for _ in range(150):
        offset = rnd.choice(spots) + rnd.randrange(8 * GRAIN)
        length = min(rnd.choice([1, 512, 700, GRAIN, 5 * GRAIN + 9]), DISK - offset)
        if length <= 0:
            continue
        action = rnd.randrange(8)
        if action < 4:
            data = rnd.randbytes(length)
            machine.write(offset, data)
            model[offset : offset + length] = data
        elif action < 7:
            first, end = offset - offset % GRAIN, -(-(offset + length) // GRAIN) * GRAIN
            end = min(end, DISK)
            if action < 6:
                machine.zero(first, end - first, unmap=action == 5)
                model[first:end] = bytes(end - first)
            else:
                before = list(machine.extents(first, end - first))
                machine.discard(first, end - first)
                for at, extent in before:
                    if extent.kind == DATA:
                        model[at : at + extent.length] = bytes(extent.length)
        else:
            machine.flush()
        at = rnd.choice(spots)
        n = min(8 * GRAIN, DISK - at)
        assert machine.read(at, n) == model[at : at + n]
    assert machine.read(0, DISK) == model
    file = machine.close()
    again = over(file, backing)
    assert again.read(0, DISK) == model
    result = checked(again)
    assert result.findings == []
    assert again.format.parts[0].refuse_write is None


def test_an_aborted_plan_leaves_nothing() -> None:
    machine = fresh()
    machine.write(0, b"1")
    plan = machine._plan([(GRAIN, 10 * GRAIN), (30 * MIB, 1)], WRITE)
    machine.abort(plan)
    machine.write(40 * MIB, b"2")
    again = over(machine.close())
    assert checked(again).findings == []
    assert again.slots[SLOT][8192 * 512] == 0b11


def test_freed_grains_are_used_again_and_only_once_they_are_punched() -> None:
    machine = fresh()
    machine.write(0, b"a" * 8 * GRAIN)
    machine.flush()
    machine.discard(0, 4 * GRAIN)
    machine.write(MIB, b"b" * GRAIN)
    part = machine.format.parts[0]
    (first,) = [e for _, e in machine.extents(MIB, GRAIN)]
    assert isinstance(first, Data)
    assert first.host == part.header.grains.start + 8 * GRAIN
    machine.flush()
    machine.flush()
    machine.write(2 * MIB, b"c" * GRAIN)
    (second,) = [e for _, e in machine.extents(2 * MIB, GRAIN)]
    assert isinstance(second, Data)
    assert second.host == part.header.grains.start
    file = machine.close()
    assert checked(over(file)).findings == []
    # What was discarded is unmapped, and so reads as zeroes over a backing file, too.
    assert struct.unpack_from("<5Q", file, 6144 * 512)[:4] == (1 << 60,) * 4
    again = over(file, b"z" * DISK)
    assert [e.kind for _, e in again.extents(0, 10 * GRAIN)] == [ZERO, DATA, HOLE]


def test_no_space() -> None:
    machine = fresh(64 * GRAIN)
    # Grains that nobody uses leave no room.
    file = bytearray(machine.slots[SLOT])
    file[8192 * 512 : 8192 * 512 + 7] = b"\xff" * 7
    machine = over(bytes(file))
    machine.write(0, bytes(8 * GRAIN))
    with pytest.raises(NoSpace):
        machine.write(40 * GRAIN, b"x")
    machine.zero(0, 8 * GRAIN, unmap=True)
    machine.flush()
    machine.flush()
    machine.write(40 * GRAIN, b"x")
    result = checked(over(machine.close()))
    assert (result.corruptions, result.leaks) == (0, 56)


def test_crash_states_check_clean_and_keep_what_was_flushed() -> None:
    """Any subset of what was written since the last barrier may have reached the disk."""
    rnd = random.Random(7)
    machine = fresh()
    base = bytes(machine.slots[SLOT])
    stable: list[tuple[int, dict[int, bytes]]] = [(0, {})]
    content: dict[int, bytes] = {}
    for _ in range(40):
        grain = rnd.randrange(12) + rnd.choice([0, 4090, 8192])
        action = rnd.randrange(5)
        if action < 3:
            data = rnd.randbytes(GRAIN)
            machine.write(grain * GRAIN, data)
            content[grain] = data
        elif action == 3:
            machine.zero(grain * GRAIN, GRAIN, unmap=True)
            content[grain] = bytes(GRAIN)
        else:
            machine.flush()
            stable.append((len(machine.log), dict(content)))
    states = 0
    image = bytearray(base)
    pending: list[tuple[int, bytes]] = []
    for position, entry in enumerate(machine.log):
        if entry[0] == "write":
            pending.append(entry[1:])
            continue
        for _ in range(3):
            crashed = bytearray(image)
            for at, data in pending:
                if rnd.random() < 0.5:
                    # A torn write has whole sectors.
                    cut = rnd.choice([len(data), len(data), len(data) // 1024 * 512])
                    put(crashed, at, data[:cut])
            states += 1
            again = over(bytes(crashed))
            result = checked(again)
            assert result.corruptions == 0, result.findings
            assert again.format.parts[0].refuse_write is None
            done = [c for p, c in stable if p <= position][-1]
            touched = {g for p, c in stable for g in c if c.get(g) != done.get(g)}
            for grain, data in done.items():
                if grain not in touched and content[grain] == data:
                    assert again.read(grain * GRAIN, GRAIN) == data
            repaired = checked(again, "leaks")
            assert repaired.leaks == repaired.leaks_fixed
            assert checked(again).findings == []
        for at, data in pending:
            put(image, at, data)
        pending.clear()
    assert states > 50


# -- what is refused
HOSTILE = [
    (0, 0xCAFEBABF, "constMagic"),
    (1, 0x200000002, "version 2.2"),
    (2, (64 << 31) + 1, "capacity"),
    (3, 16, "grain size"),
    (4, 128, "table size"),
    (5, 1, "flags"),
    (9, 7, "flags"),
    (10, 0, "volatile"),
    (11, 0, "volatile"),
    (10, 1 << 60, "volatile extent"),
    (16, 1 << 50, "directory extent"),
    (17, 0, "directory extent"),
    (25, 1 << 63, "grains extent"),
    (64, 1, "volatileMagic"),
    (67, 1, "journal"),
]


@pytest.mark.parametrize(("index", "value", "words"), HOSTILE)
def test_hostile_header(index: int, value: int, words: str) -> None:
    file = changed(bytes(fresh().slots[SLOT]), 8 * index, value)
    with pytest.raises(ImageError, match=words):
        over(file)


def test_a_truncated_file() -> None:
    file = bytes(fresh().slots[SLOT])
    for length in (0, 8, 100, 512, 600, MIB, 2 * MIB + 8):
        with pytest.raises(ImageError):
            over(file[:length])
    machine = fresh()
    machine.write(20 * MIB, b"x")
    machine.write(0, b"x" * 3 * GRAIN)
    file = machine.close()
    cut = over(file[: 12288 * 512 + 2 * GRAIN])
    assert cut.read(0, GRAIN) == b"x" * GRAIN
    with pytest.raises(CorruptImage, match="beyond the end"):
        cut.read(GRAIN, 1)
    cut = over(file[: 6144 * 512 + 32768])
    with pytest.raises(CorruptImage, match="behind the end of the file"):
        cut.read(0, 1)


@pytest.mark.parametrize(
    "entry", [1, 1 << 60 | 1 << 32, 2 << 60, 3 << 60, 1 << 60 | 32, (1 << 64) - 1]
)
def test_hostile_directory_entry(entry: int) -> None:
    machine = fresh()
    machine.write(0, b"x")
    file = changed(machine.close(), 4096 * 512, entry)
    for again in (over(file), over(file, writable=True)):
        with pytest.raises(CorruptImage, match="grain directory entry"):
            again.read(0, 1)
        assert checked(again).corruptions >= 1
        assert again.read(16 * MIB, 4) == bytes(4)
    with pytest.raises(ImageError):
        over(file).write(0, b"y")


@pytest.mark.parametrize(
    "entry", [1, 1 << 48, 4 << 60, 8 << 60, (1 << 64) - 1, 3 << 60 | 1, 3 << 60 | 0xFFF << 48]
)
def test_hostile_table_entry(entry: int) -> None:
    machine = fresh()
    machine.write(0, b"x")
    file = changed(machine.close(), 6144 * 512 + 8, entry)
    again = over(file)
    assert again.read(0, 1) == b"x"
    with pytest.raises(CorruptImage, match="grain table entry"):
        again.read(GRAIN, 1)
    with pytest.raises(CorruptImage, match="grain table entry"):
        again.write(GRAIN, b"y")
    assert checked(again).corruptions == 1


def test_regions_that_overlap_are_read_and_not_written() -> None:
    machine = fresh()
    machine.write(0, b"x")
    file = changed(machine.close(), 8 * 22, 6144)  # the reverse map over the tables
    again = over(file)
    assert again.read(0, 1) == b"x"
    with pytest.raises(UnsupportedFeature, match="overlap"):
        again.write(GRAIN, b"y")
    before = bytes(again.slots[SLOT])
    checked(again, "all")
    assert again.slots[SLOT] == before


# -- check and repair
def damaged(at: int, value: int) -> Machine:
    machine = fresh()
    machine.write(0, b"x" * 4 * GRAIN)
    machine.write(20 * MIB, b"y" * GRAIN)
    return over(changed(machine.close(), at, value))


@pytest.mark.parametrize(
    ("at", "value", "corruptions", "leaks"),
    [
        (8192 * 512, 0b10111, 1, 0),
        (8192 * 512, 0b1111111, 0, 2),
        (8192 * 512, 0b1111011, 1, 2),
        (10240 * 512 + 8, 77, 1, 0),
        (520, 1, 1, 0),
    ],
)
def test_repair(at: int, value: int, corruptions: int, leaks: int) -> None:
    machine = damaged(at, value)
    result = checked(machine)
    assert (result.corruptions, result.leaks) == (corruptions, leaks)
    if corruptions:
        with pytest.raises(UnsupportedFeature, match="seSparse"):
            machine.write(MIB, b"z")
    else:
        machine.write(0, b"x")
    result = checked(machine, "leaks")
    assert (result.corruptions_fixed, result.leaks_fixed) == (0, leaks)
    result = checked(machine, "all")
    assert (result.corruptions, result.corruptions_fixed) == (corruptions, corruptions)
    assert checked(machine).findings == []
    machine.write(MIB, b"z")
    again = over(machine.close())
    assert checked(again).findings == []
    assert again.read(0, 4 * GRAIN) == b"x" * 4 * GRAIN
    assert again.read(20 * MIB, GRAIN) == b"y" * GRAIN
    assert again.read(MIB, 2) == b"z\0"


def test_grains_that_are_used_twice() -> None:
    machine = damaged(6144 * 512 + 8, entry_of(0))
    result = checked(machine, "all")
    assert any("used twice" in finding for finding in result.findings)
    assert result.corruptions > result.corruptions_fixed


def test_an_unmapped_entry_may_still_hold_its_grain() -> None:
    machine = damaged(6144 * 512 + 8, 1 << 60 | 1 << 48)
    assert machine.read(GRAIN, 4) == bytes(4)
    assert checked(machine).findings == []
    machine.write(GRAIN, b"n" * GRAIN)
    again = over(machine.close())
    assert checked(again).findings == []
    assert again.slots[SLOT][8192 * 512] == 0b111101


def test_info() -> None:
    assert fresh().format.parts[0].info() == {
        "virtual-size": DISK,
        "cluster-size": 4096,
        "format": "SESPARSE",
    }
    assert fresh().discard(0, MIB) is True
    assert fresh()._plan([(0, GRAIN)], DISCARD).steps == []


# -- sizes
@pytest.mark.parametrize("seed", range(2))
def test_resizing(seed: int) -> None:
    rnd = random.Random(seed)
    machine = fresh(33 * MIB)
    model = bytearray(33 * MIB)
    for _ in range(8):
        for _ in range(6):
            at = rnd.randrange(len(model))
            data = rnd.randbytes(min(rnd.choice([1, 5000, 20000]), len(model) - at))
            machine.write(at, data)
            model[at : at + len(data)] = data
        base = rnd.choice([0, 16 * MIB, 20 * MIB, 32 * MIB, 50 * MIB])
        size = base + rnd.choice([512, 4096, 5120, 100 * 4096])
        file = machine.close()
        machine = over(file)
        part = machine.format.parts[0]
        machine.run(part.resize(size // 512))
        machine.format.use_parts([part], [None], ["RW"])
        model = model[:size].ljust(size, b"\0")
        assert part.length == size
        assert checked(machine).findings == []
        again = over(bytes(machine.slots[SLOT]))
        assert again.format.size == size
        assert again.read(0, size) == model
        assert checked(again).findings == []


def test_no_room_to_grow() -> None:
    machine = fresh(33 * MIB)
    part = machine.format.parts[0]
    before = bytes(machine.slots[SLOT])
    with pytest.raises(NotSupported, match="room for 536870912"):
        machine.run(part.resize((513 << 20) // 512))
    assert machine.slots[SLOT] == before
    machine.run(part.resize((512 << 20) // 512))
    machine.format.use_parts([part], [None], ["RW"])
    machine.write((512 << 20) - 1, b"e")
    assert checked(over(machine.close())).findings == []


def test_making_it_empty() -> None:
    machine = fresh()
    for at in (0, 20 * MIB, DISK - 3):
        machine.write(at, b"abc")
    machine = over(machine.close(), b"p" * DISK)
    part = machine.format.parts[0]
    machine.run(part.empty())
    assert len(machine.slots[SLOT]) == 12288 * 512
    assert checked(machine).findings == []
    assert machine.read(DISK - 3, 3) == b"ppp"
    machine.write(DISK - 3, b"new")
    again = over(machine.close(), b"p" * DISK)
    assert again.read(DISK - 4, 4) == b"pnew"
    assert checked(again).findings == []


def test_tables_that_were_dropped_are_used_again() -> None:
    machine = fresh(512 * MIB)
    part = machine.format.parts[0]
    for turn in range(3):
        for at in range(0, 512 * MIB, 16 * MIB):
            machine.write(at, bytes([turn + 1]))
        machine.flush()
        machine.run(part.resize((16 * MIB) // 512))
        machine.run(part.resize((512 * MIB) // 512))
    machine.format.use_parts([part], [None], ["RW"])
    again = over(machine.close())
    assert checked(again).findings == []
    # The header may say that all are in use although they are not.
    file = changed(bytes(machine.slots[SLOT]), 520, 32)
    again = over(file)
    again.write(300 * MIB, b"x")
    again = over(again.close())
    assert again.read(300 * MIB, 2) == b"x\0"
    assert checked(again).findings == []


@pytest.mark.parametrize("region", ["bitmap", "backmap"])
@pytest.mark.parametrize("data", [True, False])
def test_maps_of_another_meaning_are_left_alone(region: str, data: bool) -> None:
    machine = fresh()
    if data:
        machine.write(0, b"x" * 8 * GRAIN)
    file = bytearray(machine.close())
    place = getattr(new_header(DISK // 512), region)
    length = 8192 if region == "bitmap" else 64 * GRAIN
    put(file, place.start, bytes(b ^ 0xFF for b in file[place.start : place.start + length]))
    again = over(bytes(file))
    result = checked(again, "all")
    assert again.slots[SLOT] == file
    assert not result.leaks_fixed and not result.corruptions_fixed
    if data or region == "bitmap":
        assert any("another meaning" in text for text in result.findings)
