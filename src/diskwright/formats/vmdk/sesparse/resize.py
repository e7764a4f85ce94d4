"""Changing the size of a seSparse extent, and dropping all of its data.

Regions stay where they are: an extent grows as far as they have room, which is at least up to the
next 512 MiB, since ESXi (and we) round them up to a MiB.
"""

from __future__ import annotations

from array import array

from ....contract import Barrier, HostRange, MetaWrite, Procedure, Progress, Punch, Read, Truncate
from ....contract import Write as WriteRequest
from ....errors import NotSupported
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array, zeros
from ....units import SECTOR
from .header import (
    ENTRIES,
    FREE_TABLE_AT,
    GRAIN,
    GRAIN_SECTORS,
    TABLE_BYTES,
    TABLE_SECTORS,
    Header,
)
from .map import ALLOCATED, TABLE_LOAD, grain_of
from .space import BITS, SLICE, fill, runs_of

if TYPE_CHECKING:
    from .part import SesparsePart

_CAPACITY_AT, _GRAINS_SIZE_AT = 16, 200
_PIECE = 256 << 10
_HEADER, _LINKS, _TABLE, _BITMAP = "header_update", "l1_update", "l2_update", "refblock_update"


def check_changeable(part: SesparsePart) -> None:
    """Raise NotSupported where the extent is not written."""
    if part.refuse_write is not None:
        raise NotSupported(f"The seSparse extent is not changed: {part.refuse_write}")


def room(header: Header) -> int:
    """Sectors of the largest disk that the regions have room for."""
    grains = min(header.bitmap.size * SECTOR * 8, header.backmap.size * SECTOR // 8)
    tables = min(header.tables.size // TABLE_SECTORS, header.directory.size * SECTOR // 8)
    behind = [r.offset for r in header[1:8] if r.offset >= header.grains.end and r.size]
    most = (min(behind) - header.grains.offset) // GRAIN_SECTORS if behind else grains
    return min(grains, tables * ENTRIES, most) * GRAIN_SECTORS


def check_resize(part: SesparsePart, sectors: int) -> None:
    """Raise NotSupported where the extent cannot become one of ``sectors``."""
    check_changeable(part)
    most = room(part.header)
    if sectors > max(most, part.header.capacity):
        raise NotSupported(
            f"The tables of the seSparse extent have room for {most * SECTOR} bytes: a larger "
            "image has to be made, and this one converted"
        )


def resize_sesparse(part: SesparsePart, sectors: int) -> Procedure:
    """Make the extent one of ``sectors``, with nothing dirty.  Raises NotSupported before anything
    is written when that does not go."""
    check_resize(part, sectors)
    if sectors > part.header.capacity:
        yield from _grow(part, sectors)
    elif sectors < part.header.capacity:
        yield from _shrink(part, sectors)
    part.length = sectors * SECTOR


def _grow(part: SesparsePart, sectors: int) -> Procedure:
    """Whatever is in the tables behind the old end goes, then the header says the new size."""
    header = part.header
    yield from _clear_behind(part, header.capacity, header._replace(capacity=sectors).table_count)
    grains = max(header.grains.size, -(-sectors // GRAIN_SECTORS) * GRAIN_SECTORS)
    yield from _set_capacity(part, sectors, grains)


def _shrink(part: SesparsePart, sectors: int) -> Procedure:
    """The header first: what is behind the new end is nobody's then."""
    old = part.header
    new = old._replace(capacity=sectors)
    lost: list[int] = []
    first = -(-sectors // GRAIN_SECTORS)
    for number in range(first // ENTRIES, old.table_count):
        place = part.table_at(number)
        if not place:
            continue
        (raw,) = yield Read(part.slot, [(place, TABLE_BYTES)], TABLE_LOAD)
        entries = little_endian_array(64, raw)
        for index in range(max(first - number * ENTRIES, 0), ENTRIES):
            grain = grain_of(entries[index])
            if entries[index] >> 60 == ALLOCATED and grain < old.grain_count:
                lost.append(grain)
        yield Progress(number, old.table_count)
    yield from _set_capacity(part, sectors, old.grains.size)
    yield from _clear_behind(part, sectors, old.table_count)
    del part.directory[new.table_count :]
    part.weight = 8 * new.table_count
    numbers = [entry & 0xFFFFFFFF for entry in part.directory if entry]
    yield from _set_free_table(part, max(numbers, default=-1) + 1)
    yield from _free(part, lost)


def _set_capacity(part: SesparsePart, sectors: int, grains: int) -> Procedure:
    # Both are in the one sector of the header.
    yield WriteRequest(
        [
            MetaWrite(part.slot, _CAPACITY_AT, sectors.to_bytes(8, "little"), _HEADER),
            MetaWrite(part.slot, _GRAINS_SIZE_AT, grains.to_bytes(8, "little"), _HEADER),
        ]
    )
    yield Barrier()
    header = part.header
    part.header = part.space.header = header._replace(
        capacity=sectors, grains=header.grains._replace(size=grains)
    )
    missing = part.header.table_count - len(part.directory)
    if missing > 0:
        part.directory.extend(zeros(64, missing))
    part.weight = 8 * len(part.directory)


def _clear_behind(part: SesparsePart, sectors: int, tables: int) -> Procedure:
    """Clear what lies behind a disk of ``sectors``: the rest of its last grain, entries of its last
    table, and of the directory as far as ``tables``."""
    writes = []
    kept = -(-sectors // GRAIN_SECTORS)
    number, index = divmod(kept, ENTRIES)
    if sectors % GRAIN_SECTORS and (place := part.table_at((kept - 1) // ENTRIES)):
        at = (kept - 1) % ENTRIES
        (raw,) = yield Read(part.slot, [(place + 8 * at, 8)], TABLE_LOAD)
        host = part.host_of(int.from_bytes(raw, "little"), place, at)
        if host >= 0:
            used = sectors % GRAIN_SECTORS * SECTOR
            writes.append(MetaWrite(part.slot, host + used, bytes(GRAIN - used)))
    if index and (place := part.table_at(number)):
        writes.append(MetaWrite(part.slot, place + 8 * index, bytes(8 * (ENTRIES - index)), _TABLE))
    first = number + bool(index)
    start = part.header.directory.start
    for at in range(8 * first, 8 * tables, _PIECE):
        length = min(_PIECE, 8 * tables - at)
        writes.append(MetaWrite(part.slot, start + at, bytes(length), _LINKS))
    if writes:
        yield WriteRequest(writes)
        yield Barrier()


def _set_free_table(part: SesparsePart, number: int) -> Procedure:
    if number != part.free_table:
        at = part.header.volatile.start + FREE_TABLE_AT
        yield WriteRequest([MetaWrite(part.slot, at, number.to_bytes(8, "little"), _HEADER)])
        part.free_table = number


def _free(part: SesparsePart, grains: list[int]) -> Procedure:
    """Clear the bits of grains that nothing refers to, and punch them."""
    runs = runs_of(grains)
    start = part.header.bitmap.start
    for number in sorted({grain // BITS for grain in grains}):
        (raw,) = yield Read(part.slot, [(start + number * SLICE, SLICE)], _BITMAP)
        bits = bytearray(raw)
        first = number * BITS
        for a, b in runs:
            if a < first + BITS and b > first:
                fill(bits, max(a - first, 0), min(b - first, BITS), False)
        yield WriteRequest([MetaWrite(part.slot, start + number * SLICE, bytes(bits), _BITMAP)])
    yield Barrier()
    if runs:
        at = part.header.grains.start
        yield Punch([HostRange(part.slot, at + a * GRAIN, (b - a) * GRAIN) for a, b in runs])
        part.space.cursor = min(part.space.cursor, runs[0][0])


def empty_sesparse(part: SesparsePart) -> Procedure:
    """Drop all data, with nothing dirty: first the directory, then what it led to."""
    check_changeable(part)
    header = part.header
    length = 8 * header.table_count
    for at in range(0, length, _PIECE):
        raw = bytes(min(_PIECE, length - at))
        yield WriteRequest([MetaWrite(part.slot, header.directory.start + at, raw, _LINKS)])
    yield Barrier()
    yield from _set_free_table(part, 0)
    size = -(-header.grain_count // BITS) * SLICE
    for at in range(0, size, _PIECE):
        place = header.bitmap.start + at
        (raw,) = yield Read(part.slot, [(place, min(_PIECE, size - at))], _BITMAP)
        if any(raw):
            yield WriteRequest([MetaWrite(part.slot, place, bytes(len(raw)), _BITMAP)])
        yield Progress(at, size)
    yield Barrier()
    ends = [region.end * SECTOR for region in header[1:8]]
    if max(ends) <= header.grains.start:
        yield Truncate(part.slot, header.grains.start)
        part.file_end = header.grains.start
    part.directory = array("Q", bytes(length))
    part.space.cursor = 0
