"""Sparse extents: growing, shrinking and emptying them.

All of it runs with nothing dirty, under the lease on everything.  A header is one sector, so the
moment at which a new size or a new place of the directories counts is one write.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence

from ....contract import (
    Barrier,
    HostRange,
    Length,
    MetaWrite,
    Procedure,
    Progress,
    Punch,
    Range,
    Read,
    Truncate,
    Write,
)
from ....errors import CorruptImage, NoSpace, NotSupported, UsageError
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array, little_endian_bytes, zeros
from ....units import align_up
from .header import MAX_DIRECTORY, SECTOR, Esx, Hosted, read_header
from .space import Runs

if TYPE_CHECKING:
    from .part import SparsePart

_PIECE = 1 << 20
_TABLES = 256  # read at once
_LAST = 1 << 32  # sectors that an entry can name
_HOSTED_BYTES = 79  # of the header's fields
_MAX_COWD_DIRECTORY = 4 << 20


def check_changeable(part: SparsePart) -> None:
    """Raise NotSupported or CorruptImage where the structure of an extent cannot be changed."""
    if part.layout.refuse_write is not None:
        raise NotSupported(part.layout.refuse_write)
    if part.damage is not None:
        raise CorruptImage(part.damage)


# -- growing
def grow(part: SparsePart, sectors: int) -> Procedure:
    """Give an extent ``sectors``.  The directories move to the end of the file when they must; a
    ``KDMV`` extent gets all of its tables at once, which other programs count on.

    Raises UsageError for a size that the kind of extent cannot have, NoSpace.
    """
    header = yield from read_header(part.slot)
    tables = -(-sectors // (part.layout.grain * part.layout.entries))
    most = MAX_DIRECTORY if isinstance(header, Hosted) else _MAX_COWD_DIRECTORY
    if tables * 4 > most or (isinstance(header, Esx) and sectors >= _LAST):
        raise UsageError(f"A sparse extent of {sectors} sectors is too large")
    yield from _zero_last_grain(part)
    if isinstance(header, Hosted):
        yield from _grow_hosted(part, header, sectors, tables)
    else:
        yield from _grow_esx(part, header, sectors, tables)


def _grow_hosted(part: SparsePart, header: Hosted, sectors: int, tables: int) -> Procedure:
    old = len(part.directory)
    size = part.layout.table_sectors
    move = tables * 4 > align_up(old * 4, SECTOR)
    room = -(-tables * 4 // SECTOR) if move else 0
    count = 2 if part.copy else 1
    at = yield from _behind(part)
    end = at + count * (room + (tables - old) * size)
    if end >= _LAST:
        raise NoSpace("A sparse extent has less than 2 TiB in its file")
    if tables > old:
        yield from _extend(part, at, end)
    writes = []
    places = []
    # The copy comes first, as in a new extent.
    for place, entries in ((header.redundant, part.copy), (header.directory, part.directory)):
        if not entries and entries is not part.directory:
            places.append(place)
            continue
        target = at if move else place
        first = at + room
        grown = entries[:] + array("I", range(first, first + (tables - old) * size, size))
        at = first + (tables - old) * size
        writes += _entries(part, target, grown, 0 if move else old)
        places.append(target)
    if writes:
        yield Write(writes)
        yield Barrier()
    redundant, directory = places
    new = header._replace(capacity=sectors, redundant=redundant, directory=directory)
    yield from write_header(part, new)


def _grow_esx(part: SparsePart, header: Esx, sectors: int, tables: int) -> Procedure:
    old = len(part.directory)
    place, free = header.directory, header.free
    count = max(tables, header.tables)
    grown = part.directory[:] + zeros(32, count - old)
    move = tables * 4 > align_up(header.tables * 4, SECTOR)
    if move:
        place = yield from _behind(part)
        free = place + -(-count * 4 // SECTOR)
        if free >= _LAST:
            raise NoSpace("A COWD extent has less than 2 TiB in its file")
        yield from _extend(part, place, free)
    writes = _entries(part, place, grown, 0 if move else old)
    if writes:
        yield Write(writes)
        yield Barrier()
    new = header._replace(capacity=sectors, directory=place, tables=count, free=free)
    yield from write_header(part, new)


def _behind(part: SparsePart) -> Procedure:
    """The first sector behind all that the file holds (on 4 KiB where grains are not smaller)."""
    length = yield Length(part.slot)
    return align_up(max(-(-length // SECTOR), part.space.end), min(part.layout.grain, 8))


def _extend(part: SparsePart, start: int, end: int) -> Procedure:
    """Sectors [start, end) behind the end of the file are there and zero."""
    yield Truncate(part.slot, end * SECTOR)
    if part.image.zero_beyond_end:
        return
    yield from _zero(part, start * SECTOR, (end - start) * SECTOR)


def _zero(part: SparsePart, offset: int, length: int) -> Procedure:
    for at in range(offset, offset + length, _PIECE):
        yield Write([MetaWrite(part.slot, at, bytes(min(_PIECE, offset + length - at)))])
        yield Progress(at - offset, length)


def _entries(part: SparsePart, place: int, entries: array[int], first: int) -> list[MetaWrite]:
    """Entries from ``first`` to the end of their last sector, of the directory at ``place``."""
    if first == len(entries):
        return []
    raw = little_endian_bytes(entries, first)
    raw = raw.ljust(align_up(first * 4 + len(raw), SECTOR) - first * 4, b"\0")
    return [MetaWrite(part.slot, place * SECTOR + first * 4, raw, "l1_grow_write_table")]


def write_header(part: SparsePart, header: Hosted | Esx) -> Procedure:
    """Switch to ``header``: its first sector is written, what it does not know stays."""
    (old,) = yield Read(part.slot, [(0, SECTOR)])
    if isinstance(header, Hosted):
        # The file says that it is in use, whatever the header was when it was read.
        raw = bytearray(header.encode()[:_HOSTED_BYTES] + old[_HOSTED_BYTES:])
        raw[part.layout.unclean_at] = old[part.layout.unclean_at]
    else:
        raw = bytearray(old)
        struct.pack_into(
            "<5I", raw, 12, header.capacity, header.grain, header.directory, header.tables,
            header.free,
        )  # fmt: skip
    yield Barrier()
    yield Write([MetaWrite(part.slot, 0, bytes(raw), "l1_grow_activate_table")])
    yield Barrier()


def _zero_last_grain(part: SparsePart) -> Procedure:
    """What the last grain holds behind the end of the disk becomes zero: a larger disk shows it."""
    inside = part.length % part.unit
    if not inside:
        return
    grain = part.length // part.unit
    table = part.table_at(grain // part.layout.entries)
    if not table:
        return
    place = table * SECTOR + 4 * (grain % part.layout.entries)
    (raw,) = yield Read(part.slot, [(place, 4)])
    entry = int.from_bytes(raw, "little")
    if part.holds_data(entry):
        yield from _zero(part, entry * SECTOR + inside, part.unit - inside)
        yield Barrier()


# -- shrinking
def cut(part: SparsePart, sectors: int) -> Procedure:
    """Drop the entries of the last table that stays, behind ``sectors``; returns the grains that
    they named."""
    keep = -(-sectors // part.layout.grain)
    index, nth = divmod(keep, part.layout.entries)
    if not nth or index >= len(part.directory):
        return []
    found: list[Range] = []
    writes = []
    for entries in (part.directory, part.copy):
        if not entries or not entries[index]:
            continue
        place = entries[index] * SECTOR
        (raw,) = yield Read(part.slot, [(place, part.table_bytes)])
        table = little_endian_array(32, raw)
        if not found:
            found = list(_grains(part, table[nth:]))
        tail = bytes(len(raw) - 4 * nth)
        writes.append(MetaWrite(part.slot, place + 4 * nth, tail, "l2_update"))
    if writes:
        yield Barrier()
        yield Write(writes)
        yield Barrier()
    return found


def shrink(part: SparsePart, sectors: int, dropped: Sequence[Range]) -> Procedure:
    """Give an extent fewer ``sectors``, once nothing refers to the others any more; ``dropped``:
    grains that `cut` found."""
    header = yield from read_header(part.slot)
    metadata = _metadata(part)
    yield from write_header(part, header._replace(capacity=sectors))
    yield from _punch(part, dropped, metadata)
    first = -(-sectors // (part.layout.grain * part.layout.entries))
    for tables in _batches(part, first):
        raws = yield Read(part.slot, [(sector * SECTOR, part.table_bytes) for sector in tables])
        for raw in raws:
            grains = list(_grains(part, little_endian_array(32, raw)))
            yield from _punch(part, grains, metadata)
        yield Progress(0, 0)


def _batches(part: SparsePart, first: int) -> Iterator[list[int]]:
    """The places of the tables from number ``first`` on, some at a time."""
    for start in range(first, len(part.directory), _TABLES):
        stop = min(start + _TABLES, len(part.directory))
        found = [part.table_at(index) for index in range(start, stop)]
        yield [sector for sector in found if sector]


def _grains(part: SparsePart, entries: array[int]) -> Iterator[Range]:
    """The host ranges (bytes) that ``entries`` name, neighbours joined."""
    start = end = 0
    for entry in entries:
        # One beyond the end of the file names nothing.
        if not part.holds_data(entry) or entry >= part.space.end:
            continue
        if entry != end:
            if end:
                yield start * SECTOR, (end - start) * SECTOR
            start = entry
        end = entry + part.layout.grain
    if end:
        yield start * SECTOR, (end - start) * SECTOR


def _punch(part: SparsePart, ranges: Sequence[Range], metadata: Runs) -> Procedure:
    """Give back host ranges that nothing refers to, but for those that touch metadata: an entry
    may say anything."""
    found = [
        HostRange(part.slot, offset, length)
        for offset, length in ranges
        if not metadata.touches(offset // SECTOR, (offset + length) // SECTOR)
    ]
    if found:
        yield Punch(found)


def _metadata(part: SparsePart) -> Runs:
    """The sectors of the file that hold no grains."""
    size = part.layout.table_sectors
    runs = [(start, start + length) for start, length in part.layout.structures]
    for entries in (part.directory, part.copy):
        runs += [(sector, sector + size) for sector in entries if sector]
    return Runs(runs)


# -- emptying
def empty(part: SparsePart) -> Procedure:
    """Drop all grains: the tables become zeroes, copies and all, and the file ends behind what is
    left."""
    done = 0
    metadata = _metadata(part)
    for tables in _batches(part, 0):
        raws = yield Read(part.slot, [(sector * SECTOR, part.table_bytes) for sector in tables])
        used = [sector for sector, raw in zip(tables, raws, strict=True) if raw.strip(b"\0")]
        writes = [
            MetaWrite(part.slot, sector * SECTOR, bytes(part.table_bytes), "empty_image_prepare")
            for sector in _with_copies(part, used)
        ]
        if writes:
            yield Write(writes)
            yield Barrier()
            for raw in raws:
                grains = list(_grains(part, little_endian_array(32, raw)))
                yield from _punch(part, grains, metadata)
        done += len(tables)
        yield Progress(done, len(part.directory))
    header = yield from read_header(part.slot)
    end = metadata.ends[-1]
    if isinstance(header, Hosted):
        end = align_up(max(end, header.overhead), header.grain)
    length = yield Length(part.slot)
    if end * SECTOR < length:
        yield Truncate(part.slot, end * SECTOR)
    if isinstance(header, Esx):
        yield from write_header(part, header._replace(free=end))


def _with_copies(part: SparsePart, tables: Sequence[int]) -> list[int]:
    """``tables`` and their redundant copies."""
    if not part.copy:
        return list(tables)
    wanted = set(tables)
    out = list(tables)
    for first, second in zip(part.directory, part.copy, strict=True):
        if first in wanted and second and second != first:
            out.append(second)
    return out
