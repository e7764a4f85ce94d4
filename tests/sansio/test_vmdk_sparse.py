"""Sparse VMDK extents by bytes alone: map, plans, both directories, crashes, repair."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from diskwright.contract import DISCARD, WRITE, WRITE_ZERO, ZERO_UNMAP, Groups, NeedMeta
from diskwright.errors import CorruptImage, ImageError, NoSpace, UnsupportedFeature
from diskwright.extents import Data, Hole, Zero
from diskwright.findings import CheckResult
from diskwright.formats import vmdk
from diskwright.formats.vmdk.sparse import check as checking
from diskwright.formats.vmdk.sparse.part import SparsePart
from diskwright.formats.vmdk.sparse.space import Runs, Space
from house import tinyvmdk
from house.tinyvmdk import SECTOR, Reading
from sansio.machine import Machine
from sansio.test_qcow2_crash import History, crash, grow_history

SIZE = 96 * 1024 + 1536


class VmdkMachine(Machine):
    """A machine that has a base in its slot when one is given, and lets an ESX extent be written
    by itself."""

    def open(self, driver: Any = vmdk.DRIVER, **options: Any) -> Any:
        options.setdefault("writable", True)
        options["backing"] = "given" if "backing" in self.slots else None
        format = super().open(driver, **options)
        if self.slots["file"][:4] == b"COWD":
            format.refuse_write = None
        return format

    @property
    def part(self) -> SparsePart:
        part: SparsePart = self.format.parts[0]
        return part

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        procedure = self.format.close()
        if procedure is not None:
            self.run(procedure)


def opened(file: bytes, base: bytes | None = None, **options: Any) -> VmdkMachine:
    machine = VmdkMachine(file, base)
    machine.open(**options)
    return machine


def checked(file: bytes | bytearray, fix: str = "") -> tuple[CheckResult, VmdkMachine]:
    machine = opened(bytes(file), check=True)
    return machine.run(machine.format.check(fix)), machine


FLAVOURS: dict[str, Any] = {
    "plain": tinyvmdk.hosted,
    "zeroed": lambda size, **more: tinyvmdk.hosted(size, zeroed=True, **more),
    "one copy": lambda size, **more: tinyvmdk.hosted(size, copy=False, **more),
    "no tables": lambda size, **more: tinyvmdk.hosted(size, tables=False, **more),
    "grains of 64 KiB": lambda size, **more: tinyvmdk.hosted(size, 128, 512, **more),
    "three entries": lambda size, **more: tinyvmdk.hosted(size, 8, 3, **more),
    "COWD": lambda size, **more: tinyvmdk.cowd(size),
    "COWD, 4 KiB": lambda size, **more: tinyvmdk.cowd(size, 8),
}
PLAIN = tinyvmdk.hosted


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> Any:
    return FLAVOURS[request.param]


# -- reading and writing
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_random_requests(flavour: Any, backing: bool, poison: bool) -> None:
    rng = random.Random(7)
    base = rng.randbytes(SIZE - 3000) if backing else None
    machine = opened(flavour(SIZE), base)
    machine.poison = poison
    content = bytearray((base or b"").ljust(SIZE, b"\0"))
    unit = machine.format.unit
    for step in range(150):
        offset = rng.randrange(SIZE)
        length = min(rng.choice([1, 512, 4096, 20000]), SIZE - offset)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            machine.write(offset, data)
        else:
            offset -= offset % unit
            length = min(-(-length // unit) * unit, SIZE - offset)
            data = bytes(length)
            kind = rng.choice([WRITE_ZERO, ZERO_UNMAP, DISCARD])
            if not machine.change(offset, length, kind):
                continue
        content[offset : offset + length] = data
        if rng.random() < 0.2:
            machine.flush()
        where = rng.randrange(SIZE)
        span = min(30000, SIZE - where)
        assert machine.read(where, span) == content[where : where + span], step
    machine.close()
    file = machine.slots["file"]
    padded = (base or b"").ljust(SIZE, b"\0")
    assert Reading(file).content(padded) == content
    if file[:4] == b"KDMV":
        assert not Reading(file).unclean
        if Reading(file).flags & 2:
            assert Reading(file, copy=True).content(padded) == content
    else:
        assert Reading(file).free == -(-len(file) // SECTOR)
    again = opened(bytes(file), base)
    assert again.read(0, SIZE) == content
    result, _ = checked(file)
    assert result.corruptions == 0, result.findings
    if not poison:
        assert result.leaks == 0, result.findings


def test_an_extent_of_nothing() -> None:
    machine = opened(PLAIN(0))
    assert machine.format.size == 0
    assert machine.run(machine.format.check("all")).corruptions == 0


def test_kinds_of_zero() -> None:
    unit = 4096
    for zeroed in (False, True):
        for base in (None, b"\x11" * SIZE):
            machine = opened(PLAIN(SIZE, zeroed=zeroed), base)
            machine.write(0, b"\x22" * 3 * unit)
            machine.flush()
            before = len(machine.slots["file"])
            possible = zeroed or base is None
            # In place: the space stays.
            assert machine.change(0, unit, WRITE_ZERO)
            assert machine.read(0, unit) == bytes(unit)
            # Given back where something else can say that there are zeroes.
            assert machine.change(unit, unit, ZERO_UNMAP)
            assert machine.read(unit, unit) == bytes(unit)
            assert machine.change(2 * unit, unit, DISCARD) == possible
            expected = bytes(unit) if possible else b"\x22" * unit
            assert machine.read(2 * unit, unit) == expected
            # A hole shows what is below.
            assert machine.change(5 * unit, unit, ZERO_UNMAP) == possible
            assert machine.read(5 * unit, unit) == bytes(unit) if possible else base[:unit]
            machine.flush()
            assert len(machine.slots["file"]) == before
            entries = [Reading(machine.slots["file"]).entry(n) for n in range(6)]
            assert entries[0] > 1
            assert (entries[1] > 1) == (not possible)
            if possible and base is not None:
                assert entries[1] == entries[2] == entries[5] == 1
            if base is None:
                assert entries[1] == entries[2] == entries[5] == 0


def test_freed_grains_are_used_again_once_they_are_free() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"a" * 4096)
    machine.flush()
    (first,) = [e for _, e in machine.extents(0, 4096)]
    machine.discard(0, 4096)
    machine.write(4096, b"b" * 4096)
    (second,) = [e for _, e in machine.extents(4096, 4096)]
    assert isinstance(first, Data) and isinstance(second, Data) and second.host != first.host
    machine.flush()
    machine.write(8192, b"c" * 512)
    (third,) = [e for _, e in machine.extents(8192, 512)]
    assert isinstance(third, Data) and third.host == first.host
    machine.poison = True
    machine.discard(8192, 4096)
    machine.flush()
    machine.write(8192 + 1024, b"d" * 512)
    assert machine.read(8192, 4096) == bytes(1024) + b"d" * 512 + bytes(2560)


def test_an_aborted_write_leaves_nothing(flavour: Any) -> None:
    machine = opened(flavour(SIZE))
    plan = machine._plan([(1000, 9000)], WRITE)
    machine.abort(plan)
    assert machine.read(0, SIZE) == bytes(SIZE)
    machine.write(0, b"x" * 512)
    machine.flush()
    assert Reading(machine.slots["file"]).content() == b"x" * 512 + bytes(SIZE - 512)


def test_the_file_reaches_to_the_end_of_its_grains() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(4096 + 100, b"x" * 10)
    machine.write(SIZE - 5, b"y" * 5)
    assert len(machine.slots["file"]) % 4096 == 0
    machine.flush()
    result, _ = checked(machine.slots["file"])
    assert (result.corruptions, result.leaks) == (0, 0)


def test_the_use_is_announced_before_the_map_changes_and_withdrawn_at_the_close() -> None:
    machine = opened(PLAIN(SIZE))
    assert not Reading(machine.slots["file"]).unclean
    machine.write(0, b"x" * 512)
    assert Reading(machine.slots["file"]).unclean
    first = next(i for i, entry in enumerate(machine.log) if entry[:2] == ("write", 72))
    assert ("barrier",) in machine.log[first : first + 4]
    machine.close()
    assert not Reading(machine.slots["file"]).unclean


def test_copies_are_made_equal_when_an_extent_was_not_closed() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 512)
    machine.flush()
    file = bytearray(machine.slots["file"])
    place = Reading(file, copy=True).entry_place(0)
    file[place : place + 4] = bytes(4)
    opened(bytes(file), writable=False)
    again = opened(bytes(file))
    assert Reading(again.slots["file"], copy=True).entry(0) == Reading(file).entry(0)
    kept = opened(bytes(file), check=True)
    assert kept.slots["file"] == file


# -- one directory for the other
def test_a_lost_table_is_read_through_its_copy() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 4096)
    machine.close()
    for value in (0, 0xFFFFFFF):
        file = bytearray(machine.slots["file"])
        struct.pack_into("<I", file, Reading(file).directory * SECTOR, value)
        again = opened(bytes(file))
        assert again.read(0, 4096) == b"x" * 4096
        with pytest.raises(CorruptImage):
            again.write(0, b"y" * 512)


def test_a_lost_directory_is_read_through_its_copy() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 4096)
    machine.close()
    for field in (tinyvmdk.GD, tinyvmdk.RGD):
        file = bytearray(machine.slots["file"])
        struct.pack_into("<Q", file, field, 1 << 40)
        again = opened(bytes(file))
        assert again.read(0, 4096) == b"x" * 4096
        with pytest.raises(CorruptImage, match="outside the file"):
            again.write(0, b"y" * 512)


# -- bad entries
def test_no_write_goes_through_a_table_that_points_at_metadata() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 8192)
    machine.close()
    for value, readable in ((3, True), (21, True), (1, True), (0xFFFFFF, False)):
        file = bytearray(machine.slots["file"])
        struct.pack_into("<I", file, Reading(file).entry_place(1), value)
        again = opened(bytes(file))
        assert again.read(0, 4096) == b"x" * 4096
        if not readable:
            with pytest.raises(CorruptImage, match="beyond the end"):
                again.read(4096, 4096)
        with pytest.raises(CorruptImage, match=r"Preventing invalid write|beyond the end"):
            again.write(4096, b"y" * 512)
        with pytest.raises(CorruptImage, match="Preventing invalid write"):
            again.discard(4096, 4096)


def test_a_table_beyond_the_end() -> None:
    file = bytearray(PLAIN(SIZE, copy=False))
    struct.pack_into("<I", file, Reading(file).directory * SECTOR, 0xFFFFFFF)
    machine = opened(bytes(file))
    with pytest.raises(CorruptImage, match="Grain table 0"):
        machine.read(0, 512)
    with pytest.raises(CorruptImage, match="Grain table 0"):
        machine.write(0, b"x" * 512)
    assert machine.read(16 * 4096, 512) == bytes(512)


BAD: list[tuple[int, bytes]] = [
    (4, struct.pack("<I", 0)),
    (4, struct.pack("<I", 4)),
    (12, struct.pack("<Q", 1 << 60)),
    (12, struct.pack("<Q", 1 << 40)),
    (20, struct.pack("<Q", 0)),
    (20, struct.pack("<Q", 3)),
    (20, struct.pack("<Q", 1 << 22)),
    (20, struct.pack("<Q", (1 << 64) - 1)),
    (28, struct.pack("<Q", 1 << 55)),
    (44, struct.pack("<I", 0)),
    (44, struct.pack("<I", 513)),
    (44, struct.pack("<I", 0xFFFFFFFF)),
    (48, struct.pack("<QQ", 1 << 40, 1 << 41)),
    (56, struct.pack("<Q", (1 << 64) - 1)),
    (73, b"\n \n\n"),
    (77, struct.pack("<H", 9)),
]


@pytest.mark.parametrize(("at", "value"), BAD)
def test_bad_headers_are_refused(at: int, value: bytes) -> None:
    file = bytearray(PLAIN(SIZE))
    file[at : at + len(value)] = value
    with pytest.raises(ImageError) as caught:
        opened(bytes(file))
    assert caught.value.offset is not None


@pytest.mark.parametrize(
    ("at", "value"), [(4, 2), (12, 0xFFFFFFFF), (16, 0), (16, 5), (20, 1), (20, 1 << 30), (24, 0)]
)
def test_bad_esx_headers_are_refused(at: int, value: int) -> None:
    file = bytearray(tinyvmdk.cowd(SIZE))
    struct.pack_into("<I", file, at, value)
    with pytest.raises(ImageError):
        opened(bytes(file))


def test_a_version_that_tracks_changes_is_read_alone() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 4096)
    machine.close()
    file = bytearray(machine.slots["file"])
    file[4] = 3
    assert opened(bytes(file), writable=False).read(0, 4096) == b"x" * 4096
    with pytest.raises(UnsupportedFeature, match="changed blocks are tracked"):
        opened(bytes(file))
    assert checked(file, "all")[1].slots["file"] == file


def test_a_directory_at_the_end() -> None:
    machine = opened(PLAIN(SIZE))
    machine.write(0, b"x" * 4096)
    machine.close()
    file = bytearray(machine.slots["file"])
    footer = bytes(file[:SECTOR])
    struct.pack_into("<Q", file, tinyvmdk.GD, (1 << 64) - 1)
    again = opened(bytes(file) + footer + bytes(SECTOR), writable=False)
    assert again.read(0, SIZE) == b"x" * 4096 + bytes(SIZE - 4096)
    with pytest.raises(UnsupportedFeature, match="grain directory at the end"):
        opened(bytes(file) + footer + bytes(SECTOR))
    with pytest.raises(ImageError, match="footer"):
        opened(bytes(file) + bytes(1024))


# -- borders
def test_no_grain_behind_what_an_entry_can_name() -> None:
    machine = opened(PLAIN(SIZE))
    part = machine.part
    part.space.end = (1 << 32) - 8
    plan = machine._plan([(0, 512)], WRITE)
    machine.abort(plan)
    machine._plan([(0, 512)], WRITE)
    with pytest.raises(NoSpace):
        machine._plan([(4096, 512)], WRITE)
    fresh = opened(PLAIN(SIZE, tables=False))
    fresh.part.space.end = (1 << 32) - 8
    with pytest.raises(NoSpace):
        fresh._plan([(0, 512)], WRITE)
    assert fresh.part.directory[0] == 0


def test_high_entries_are_not_signed() -> None:
    machine = opened(PLAIN(SIZE))
    part = machine.part
    part.space.end = 1 << 32
    for sector in ((1 << 31) - 8, 1 << 31, (1 << 32) - 8):
        file = bytearray(PLAIN(SIZE))
        struct.pack_into("<I", file, Reading(file).entry_place(0), sector)
        again = opened(bytes(file))
        again.part.space.end = 1 << 32
        ((_, extent),) = again.extents(512, 512)
        assert isinstance(extent, Data) and extent.host == sector * SECTOR + 512


def test_a_large_directory_is_bounded_and_a_border_is_crossed() -> None:
    size = 1 << 41
    machine = opened(PLAIN(size, 2048, 512))
    for offset in ((1 << 31) - 512, (1 << 40) - 512, size - 1024):
        machine.write(offset, b"z" * 1024)
    machine.close()
    again = opened(bytes(machine.slots["file"]))
    for offset in ((1 << 31) - 512, (1 << 40) - 512, size - 1024):
        assert again.read(offset, 1024) == b"z" * 1024
    ((_, hole),) = again.extents(1 << 35, 4096)
    assert isinstance(hole, Hole)


# -- what maps show
def test_extents_of_runs() -> None:
    machine = opened(PLAIN(SIZE, zeroed=True), b"\x33" * SIZE)
    machine.write(0, b"x" * 20 * 4096)
    machine.change(4096, 2 * 4096, ZERO_UNMAP)
    found = list(machine.extents(0, 24 * 4096))
    kinds = [type(extent) for _, extent in found]
    assert kinds[:3] == [Data, Zero, Data]
    assert kinds[-1] is Hole
    assert sum(extent.length for _, extent in found) == 24 * 4096


def test_misses_are_asked_for_at_once() -> None:
    machine = opened(PLAIN(1 << 20))
    machine.write(0, b"x" * 512)
    machine.flush()
    machine.store.clear()
    _, miss = machine.format.map([(0, 1 << 20)])
    assert isinstance(miss, NeedMeta) and len(miss.ranges) == 16


# -- crashes
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_crash_states(flavour: Any, backing: bool, poison: bool) -> None:
    explore(flavour, backing, poison, 2, 25)


def explore(flavour: Any, backing: bool, poison: bool, seeds: int, states: int) -> None:
    rng = random.Random(str((backing, poison)))
    for seed in range(seeds):
        size = 288 * 1024 + seed * SECTOR
        base = rng.randbytes(size) if backing else None
        machine = opened(flavour(size), base)
        machine.poison = poison
        start = bytes(machine.slots["file"])
        machine.log.clear()
        history = History(base or bytes(size))
        grow_history(machine, history, rng, 60)
        if seed:
            machine.close()
        log = list(machine.log)
        for cut in rng.sample(range(len(log) + 1), min(states, len(log))):
            state = crash(start, log, cut, rng)
            result, _ = checked(state)
            assert result.corruptions == 0, (cut, result.findings[:3])
            again = opened(state, base)
            content = again.read(0, size)
            allowed = history.admissible(cut)
            for at in range(0, size, SECTOR):
                sector = content[at : at + SECTOR]
                assert any(c[at : at + SECTOR] == sector for c in allowed), (cut, hex(at))
            file = again.slots["file"]
            if file[:4] == b"KDMV" and Reading(file).flags & 2:
                assert Reading(file).content(base or b"") == content
                assert Reading(file, copy=True).content(base or b"") == content


def test_the_crash_states_see_a_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the barrier between data and tables the suite above must fail."""
    freeze = vmdk.format.Vmdk.freeze

    def at_once(self: Any) -> Groups:
        groups = freeze(self)
        writes = [write for group in groups.groups for write in group]
        return Groups([], groups.token, [*groups.lead, *writes])

    monkeypatch.setattr(vmdk.format.Vmdk, "freeze", at_once)
    with pytest.raises((AssertionError, ImageError)):
        for seed in range(5):
            explore(FLAVOURS["plain"], False, False, seed + 1, 100)


# -- check and repair
def damaged(**more: Any) -> tuple[bytearray, bytes]:
    machine = opened(PLAIN(SIZE, **more))
    content = random.Random(5).randbytes(12 * 4096)
    for grain in (0, 2, 1, 3, *range(5, 12)):
        machine.write(grain * 4096, content[grain * 4096 : (grain + 1) * 4096])
    machine.close()
    file = machine.slots["file"]
    return file, Reading(file).content()


def mended(file: bytearray, corruptions: int) -> bytes:
    """Check, repair, check again; the content afterwards, the same by both directories."""
    found, machine = checked(file)
    assert found.corruptions == corruptions, found.findings
    assert machine.slots["file"] == file
    fixed, machine = checked(file, "all")
    assert fixed.corruptions_fixed == corruptions, fixed.findings
    out = bytes(machine.slots["file"])
    again, _ = checked(out)
    assert (again.corruptions, again.leaks) == (0, 0), again.findings
    content = Reading(out).content()
    if Reading(out).flags & 2:
        assert Reading(out, copy=True).content() == content
    writable = opened(out)
    writable.write(SIZE - 512, b"!" * 512)
    assert writable.read(0, SIZE - 512) == content[:-512]
    # A repair that ends early can be run again.
    log = list(machine.log)
    for cut in range(len(log)):
        state = crash(bytes(file), [e for e in log if e[0] != "truncate"], cut, random.Random(cut))
        try:
            twice, _ = checked(state, "all")
        except ImageError:
            continue
        assert twice.corruptions == twice.corruptions_fixed
    return content


def put(file: bytearray, at: int, value: int) -> None:
    struct.pack_into("<I", file, at, value)


def test_an_entry_beyond_the_end_is_taken_from_the_copy() -> None:
    file, content = damaged()
    put(file, Reading(file).entry_place(2), 0xFFFFFF)
    assert mended(file, 2) == content
    put(file, Reading(file, copy=True).entry_place(2), 0xFFFFFE)
    lost = bytearray(content)
    lost[2 * 4096 : 3 * 4096] = bytes(4096)
    assert mended(file, 2) == lost


def test_a_copy_that_differs_is_made_equal() -> None:
    file, content = damaged()
    put(file, Reading(file, copy=True).entry_place(2), 0)
    assert mended(file, 1) == content


def test_a_grain_inside_metadata() -> None:
    file, content = damaged(copy=False)
    put(file, Reading(file).entry_place(2), 22)
    lost = bytearray(content)
    lost[2 * 4096 : 3 * 4096] = bytes(4096)
    assert mended(file, 1) == lost


def test_grains_that_share_their_place_get_one_each() -> None:
    file, _ = damaged()
    for copy in (False, True):
        put(file, Reading(file, copy).entry_place(4), Reading(file).entry(0))
        put(file, Reading(file, copy).entry_place(20), Reading(file).entry(1) + 3)
    before = Reading(file).content()
    assert mended(file, 2) == before


def test_a_lost_table_is_taken_from_the_other() -> None:
    for copy in (False, True):
        for value in (0, 0xFFFFFF, 3):
            file, content = damaged()
            put(file, Reading(file, copy).directory * SECTOR, value)
            assert mended(file, 1) == content


def test_two_entries_of_the_directory_at_one_table() -> None:
    file, content = damaged()
    reading = Reading(file)
    put(file, reading.directory * SECTOR + 4, reading.table_place(0))
    assert mended(file, 1) == content


def test_a_lost_directory_is_taken_from_the_other() -> None:
    for field in (tinyvmdk.GD, tinyvmdk.RGD):
        file, content = damaged()
        struct.pack_into("<Q", file, field, 1 << 40)
        assert mended(file, 1) == content


def test_a_table_lost_in_both_copies() -> None:
    file, content = damaged()
    for copy in (False, True):
        put(file, Reading(file, copy).directory * SECTOR, 0xFFFFFF)
    lost = bytes(16 * 4096) + content[16 * 4096 :]
    assert mended(file, 2) == lost


def test_leaks_are_given_back_but_not_beside_broken_tables() -> None:
    file, content = damaged()
    file += b"l" * 8192
    found, _ = checked(file)
    assert (found.corruptions, found.leaks) == (0, 2)
    found, machine = checked(file, "leaks")
    assert found.leaks_fixed == 2
    assert len(machine.slots["file"]) == len(file) - 8192
    assert Reading(machine.slots["file"]).content() == content
    put(file, Reading(file).entry_place(2), 0xFFFFFF)
    found, machine = checked(file, "leaks")
    assert found.leaks_fixed == 0
    assert machine.slots["file"] == file


def test_what_reads_as_zeroes_is_no_leak() -> None:
    file, _ = damaged()
    found, _ = checked(file + bytes(1 << 20))
    assert found.leaks == 0


def test_not_all_of_the_space_without_references_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, _ = damaged()
    monkeypatch.setattr(checking, "_MOST_LOOKED", 1 << 20)
    found, _ = checked(file + bytes(2 << 20) + b"x" * 4096)
    assert found.leaks == 0
    (text,) = found.uncovered
    assert text.endswith(" bytes without references") and int(text.split()[0]) > 1 << 20


def test_grains_are_counted_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_WINDOW", 3)
    file, content = damaged()
    assert checked(file)[0].allocated_clusters == 11
    for copy in (False, True):
        put(file, Reading(file, copy).entry_place(4), Reading(file).entry(0))
        put(file, Reading(file, copy).entry_place(20), Reading(file).entry(1) + 3)
        put(file, Reading(file, copy).entry_place(21), 5)
    del content
    before = Reading(file).content()
    after = bytearray(before)
    after[21 * 4096 : 22 * 4096] = bytes(4096)
    assert mended(file, 3) == after


def test_an_extent_in_use_is_told_of_and_no_corruption() -> None:
    file, _ = damaged()
    file[tinyvmdk.UNCLEAN] = 1
    put(file, Reading(file, copy=True).entry_place(2), 0)
    found, _ = checked(file)
    assert found.corruptions == 0
    assert any("not closed" in text for text in found.findings)
    _, machine = checked(file, "all")
    assert not Reading(machine.slots["file"]).unclean
    assert Reading(machine.slots["file"], copy=True).entry(2) == Reading(file).entry(2)


def test_check_of_an_esx_extent() -> None:
    machine = opened(tinyvmdk.cowd(SIZE))
    machine.write(0, b"x" * 4096)
    machine.close()
    file = machine.slots["file"]
    found, _ = checked(file)
    assert (found.corruptions, found.leaks, found.allocated_clusters) == (0, 0, 8)
    put(file, 28, 5)
    put(file, Reading(file).entry_place(3), 2)
    found, _ = checked(file)
    assert found.corruptions == 2
    found, machine = checked(file, "all")
    assert found.corruptions_fixed == 2
    assert checked(machine.slots["file"])[0].corruptions == 0


# -- the small parts
def test_runs() -> None:
    rng = random.Random(3)
    runs, known = Runs(), set[int]()
    for _ in range(300):
        start = rng.randrange(200)
        end = start + rng.randrange(1, 12)
        assert runs.touches(start, end) == bool(known & set(range(start, end)))
        if rng.random() < 0.3:
            runs.add(start, end)
            known |= set(range(start, end))
    assert {i for start, end in runs for i in range(start, end)} == known
    assert list(runs) == sorted(runs)


def test_space_takes_what_was_freed_first() -> None:
    space = Space(104, 8, 1000, True)
    assert space.take(2) == [(104, 120, True)]
    space.give(200, 232, False)
    assert space.take(5) == [(200, 232, False), (120, 128, True)]
    space.check(109, 0)
    with pytest.raises(NoSpace):
        space.check(110, 0)


def test_space_leaves_room_for_a_grain_that_was_cut_short() -> None:
    space = Space(101, 8, 1000, True)
    assert space.take(1) == [(112, 120, True)]
    assert space.take_tables(3) == 120
