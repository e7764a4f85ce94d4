"""VHDX images at the borders of what the specification allows, by bytes alone."""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest

from diskwright.contract import OP_ZERO, WRITE, MetaWrite
from diskwright.errors import CorruptImage, UsageError
from diskwright.formats.vhdx import DRIVER, replay
from diskwright.formats.vhdx import log as vlog
from diskwright.formats.vhdx import structures as st
from diskwright.formats.vhdx.alloc import FreeSpace
from diskwright.formats.vhdx.core import PART
from house import tinyvhdx as tiny
from house.tinyvhdx import FULL, PARTIAL, TinyVhdx

from .test_vhdx_core import (
    MIB,
    PARENT,
    VhdxMachine,
    created,
    current,
    made,
    no_corruption,
    opened,
    page,
    with_log,
)

OTHER = "{99999999-2222-4333-8444-555555555555}"


# -- parents
def child(*entries: tuple[str, str], **options: Any) -> TinyVhdx:
    return TinyVhdx(
        blocks={1: (PARTIAL, b"c" * MIB)},
        bitmap={2048},
        parent=[*entries, ("relative_path", "base.vhdx")],
        **options,
    )


def test_a_parent_may_have_one_of_two_identities() -> None:
    image = child(("parent_linkage", OTHER.upper()), ("parent_linkage2", PARENT))
    machine = opened(image.data, bytes(4 * MIB))
    assert machine.format.parent_identities == (OTHER, PARENT)
    # Another name changes nothing about what is known of it; another identity does.
    machine.run(machine.format.change_backing("other.vhdx", "vhdx"))
    machine = opened(machine.close(), bytes(4 * MIB))
    assert machine.format.parent_identities == (OTHER, PARENT)
    machine.run(machine.format.change_backing("other.vhdx", "vhdx", PARENT))
    machine = opened(machine.close(), bytes(4 * MIB))
    assert machine.format.parent_identities == (PARENT,)


def test_an_image_with_a_parent_is_not_fixed() -> None:
    """The flag that says so is ignored then (2.6.2.1)."""
    image = child(("parent_linkage", PARENT), fixed=True)
    machine = opened(image.data, b"p" * (4 * MIB))
    assert machine.format.subformat == "differencing"
    assert machine.read(MIB - 512, 1536) == b"p" * 512 + b"c" * 512 + b"p" * 512
    machine.discard(MIB, MIB)
    assert machine.read(MIB, MIB) == bytes(MIB)


@pytest.mark.parametrize(("asked", "parents"), [(0, 4096), (4096, 4096), (512, 512), (0, None)])
def test_a_child_has_the_sectors_of_its_parent(asked: int, parents: int | None) -> None:
    options = {"logical_sector_size": asked, "backing_sector_size": parents}
    machine = made(MIB, bytes(MIB), **options)
    assert machine.format.sector_size == (parents or 512)


def test_a_child_cannot_have_other_sectors_than_its_parent() -> None:
    with pytest.raises(UsageError, match="sectors of 512"):
        created(MIB, b"", logical_sector_size=4096, backing_sector_size=512)


# -- structures
@pytest.mark.parametrize("place", st.REGION_TABLES)
def test_region_tables_are_the_same_before_anything_is_written(place: int) -> None:
    """A crash while the BAT moves leaves them different; other readers may go by either."""
    image = TinyVhdx()
    data = bytearray(image.data)
    good = data[st.REGION_TABLES[0] :][: st.REGION_TABLE_BYTES]
    if place == st.REGION_TABLES[0]:
        data[place] ^= 1  # torn
    else:
        regions = st.parse_regions(bytes(good), place)
        moved = [regions[0]._replace(offset=image.end), regions[1]]
        data[place : place + st.REGION_TABLE_BYTES] = st.encode_regions(moved)
    before = current(data)
    reader = opened(bytes(data), **{"read-only": True})
    assert reader.slots["file"] == data
    checker = opened(bytes(data), check=True)
    assert checker.slots["file"] == data
    writer = opened(bytes(data))
    file = writer.slots["file"]
    for at in st.REGION_TABLES:
        assert file[at : at + st.REGION_TABLE_BYTES] == good
    assert current(file).file_guid != before.file_guid
    assert current(file).data_guid == before.data_guid
    no_corruption(writer)


def test_a_place_on_a_structure_is_found_among_many() -> None:
    machine = made(4 * MIB, block_size=MIB)
    image = machine.format
    image.regions += [
        st.Region(uuid.uuid4().bytes_le, place * MIB, MIB, False) for place in range(10, 90, 4)
    ]
    image.reserve_structures()
    for place in range(100):
        for length in (1, 2, 4):
            lies = any(
                start < (place + length) * MIB and place * MIB < end
                for start, end in image.reserved
            )
            assert image.overlaps(place * MIB, length * MIB) == lies


def test_free_space_is_the_lowest_that_is_long_enough() -> None:
    rng = random.Random(1)
    space = FreeSpace()
    model: set[int] = set()
    for _ in range(3000):
        length = rng.randrange(1, 6)
        if rng.random() < 0.5:
            start = rng.randrange(200)
            units = set(range(start, start + length))
            if not units & model:
                space.add(start, length)
                model |= units
            continue
        fits = [s for s in range(205) if set(range(s, s + length)) <= model]
        assert space.take(length) == (fits[0] if fits else None)
        if fits:
            model -= set(range(fits[0], fits[0] + length))


# -- writing
def test_a_block_that_is_written_whole_is_not_zeroed_before() -> None:
    image = TinyVhdx(blocks={0: (FULL, b"a" * MIB), 1: (FULL, b"b" * MIB)})
    machine = opened(image.data)
    machine.poison = True
    machine.discard(0, MIB)
    machine.flush()
    for length, zeroes in ((MIB, 0), (MIB - 512, 1)):
        plan = machine._plan([(2 * MIB, length)], WRITE)
        assert plan.steps[-1].host == image.places[0], "the space is used again"
        assert [step.op for step in plan.steps].count(OP_ZERO) == zeroes
        machine.abort(plan)


def test_a_large_freeze_is_made_in_small_pieces() -> None:
    """A checksum over all of it would stop everybody else for seconds."""
    machine = made(64 * MIB, bytes(64 * MIB), block_size=MIB, log_size=64 * MIB)
    rng = random.Random(2)
    for block in range(64):
        machine.write(block * MIB + 512, b"x" * 512)
    start, _ = machine.format.bitmap_part(0)
    bitmap = machine.format.bitmap_of(0)
    for part in range(MIB // PART):
        table = machine.format._part(bitmap + start + part * PART)
        table.data[:] = rng.randbytes(PART)
        machine.store.mark(table)
    groups = machine.format.freeze().groups
    assert len(groups) > 6
    for number, group in enumerate(groups):
        assert all(isinstance(write, MetaWrite) for write in group)
        assert sum(len(write.data) for write in group) <= 80 * vlog.SECTOR
        assert groups[number] == group, "what could not be written is asked for again"
    assert groups[::-1] == list(groups)[::-1]


# -- the log
def zeroing(image: TinyVhdx, ranges: list[tuple[int, int]], last: int) -> bytes:
    changes: list[vlog.Change] = [vlog.Change(at, length, None) for at, length in ranges]
    entry = vlog.encode_entry(changes, tiny.LOG_GUID.bytes_le, 5, 0, image.end, last)
    return with_log(image, [(0, entry)])


def test_zeroes_of_a_log_behind_the_end_cost_nothing() -> None:
    image = TinyVhdx()
    last = image.end + 8 * MIB
    machine = opened(zeroing(image, [(image.end - MIB, 9 * MIB), (1 << 46, 1 << 40)], last))
    assert len(machine.slots["file"]) == last
    data_end = max(entry[1] + len(entry[2]) for entry in machine.log if entry[0] == "write")
    assert data_end <= image.end


def test_a_log_that_zeroes_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_ZEROED", 0)
    image = TinyVhdx()
    places = [(tiny.DATA, image.end - tiny.DATA)] * 60
    with pytest.raises(CorruptImage, match="again and again"):
        opened(zeroing(image, places, image.end))
    opened(zeroing(image, places, image.end), **{"read-only": True})


def test_entries_of_another_log_are_none() -> None:
    image = TinyVhdx()
    mine = TinyVhdx.log_entry({tiny.DATA: page(1)}, 5, 0, image.end)
    other = TinyVhdx.log_entry({tiny.DATA: page(2)}, 6, 0, image.end, b"\x07" * 16)
    data = with_log(image, [(0, mine), (len(mine), other)])
    assert opened(data).read(0, 4096) == page(1)
    with pytest.raises(CorruptImage, match="no valid sequence"):
        opened(with_log(image, [(0, other)]))


def test_a_disk_of_one_sector() -> None:
    machine = VhdxMachine()
    machine.run(DRIVER.create({"size": 1}))  # type: ignore[misc]
    machine.open()
    assert machine.format.size == 512
    machine.write(0, b"s" * 512)
    assert opened(machine.close()).read(0, 512) == b"s" * 512
