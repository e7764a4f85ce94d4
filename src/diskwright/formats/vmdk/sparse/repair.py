"""Mending a sparse extent: both copies of a table alike, and every table and grain in a place of
its own."""

from __future__ import annotations

import struct
from array import array

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Write
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array, little_endian_bytes, zeros
from .header import SECTOR

if TYPE_CHECKING:
    from .part import SparsePart

_BATCH = 256 << 10
_CHUNK = 1 << 20
_GD_FIELD, _RGD_FIELD = 56, 48
_PER_SECTOR = SECTOR // 4


def read_tables(part: SparsePart, sectors: list[int]) -> Procedure:
    """The bytes of the grain tables at ``sectors``; neighbours are read in one piece."""
    size, step = part.table_bytes, part.layout.table_sectors
    runs: list[list[int]] = []  # first sector, tables
    for sector in sectors:
        if runs and sector == runs[-1][0] + runs[-1][1] * step:
            runs[-1][1] += 1
        else:
            runs.append([sector, 1])
    if not runs:
        return []
    ranges = [(sector * SECTOR, count * size) for sector, count in runs]
    raws = yield Read(part.slot, ranges, "l2_load")
    return [raw[at : at + size] for raw in raws for at in range(0, len(raw), size)]


def equalize(part: SparsePart) -> Procedure:
    """Make the copies of every grain table equal, as a crash between two flushes may have left
    them: the primary one is written over a redundant one that differs, and where only one of the
    directories names a table, the other one gets a table, too."""
    size = part.table_bytes
    step = max(_BATCH // size, 1)
    top = part.space.end - part.layout.table_sectors
    single: list[tuple[int, int]] = []
    for start in range(0, len(part.directory), step):
        pairs = []
        for index in range(start, min(start + step, len(part.directory))):
            primary, copy = part.directory[index], part.copy[index]
            if 0 < primary <= top and 0 < copy <= top:
                pairs.append((primary, copy))
            elif max(primary, copy) <= top and primary + copy:
                single.append((index, primary + copy))
        firsts = yield from read_tables(part, [primary for primary, _ in pairs])
        seconds = yield from read_tables(part, [copy for _, copy in pairs])
        writes = [
            MetaWrite(part.slot, copy * SECTOR, first, "l2_update")
            for (_, copy), first, second in zip(pairs, firsts, seconds, strict=True)
            if first != second
        ]
        if writes:
            yield Write(writes)
        yield Progress(start, len(part.directory))
    mender = Mender(part)
    for index, sector in single:
        (raw,) = yield Read(part.slot, [(sector * SECTOR, size)])
        yield from mender.table(index, little_endian_array(32, raw))
    yield from mender.directories()


class Mender:
    """The writing half of a check."""

    def __init__(self, part: SparsePart) -> None:
        self.part = part
        part.space.slack = part.layout.grain - 1
        self.replaced = 0
        """Byte offset of the header's field for a directory that gets a new place."""
        self._links: set[int] = set()

    def replace_directory(self) -> None:
        """Give the directory that is outside the file a new place; its tables follow one by one,
        and the header is told last."""
        part = self.part
        size = -(-part.layout.tables * 4 // SECTOR)
        place = part.space.take_tables(size)
        entries = zeros(32, size * _PER_SECTOR)[: len(part.directory)]
        if part.damaged_field == "gdOffset":
            part.directory, part.copy = entries, part.directory
            part.layout = part.layout._replace(directory=place)
            self.replaced = _GD_FIELD
        else:
            part.copy = entries
            part.layout = part.layout._replace(copy=place)
            self.replaced = _RGD_FIELD

    def table(self, index: int, data: array[int] | None) -> Procedure:
        """Make both copies of grain table ``index`` hold ``data`` (None: there is no table).  One
        that has no place gets one."""
        part = self.part
        size = part.layout.table_sectors
        self._links.add(index // _PER_SECTOR)
        if data is None:
            return
        raw = little_endian_bytes(data)
        fresh: list[MetaWrite] = []
        writes: list[MetaWrite] = []
        for entries in (part.directory, part.copy):
            if not entries:
                continue
            if not entries[index]:
                entries[index] = part.space.take_tables(size)
                part.is_metadata(entries[index], entries[index] + size)
                fresh.append(MetaWrite(part.slot, entries[index] * SECTOR, raw, "l2_alloc_write"))
            else:
                writes.append(MetaWrite(part.slot, entries[index] * SECTOR, raw, "l2_update"))
        if fresh:
            yield Write(fresh)
        yield Barrier()  # also for grains that were given a new place
        if writes:
            yield Write(writes)

    def duplicate(self, sector: int) -> Procedure:
        """Copy the grain at ``sector`` to a new place; returns that."""
        part = self.part
        part.space.check(1, 0)
        start = part.space.take(1)[0][0]
        for at in range(0, part.unit, _CHUNK):
            size = min(_CHUNK, part.unit - at)
            (raw,) = yield Read(part.slot, [(sector * SECTOR + at, size)])
            yield Write([MetaWrite(part.slot, start * SECTOR + at, raw, "cow_write")])
        return start

    def directories(self) -> Procedure:
        """Write the entries of both directories that have changed."""
        part = self.part
        yield Barrier()
        writes = []
        sectors = self._links
        if self.replaced:
            sectors = set(range(-(-len(part.directory) // _PER_SECTOR)))
        for sector in sorted(sectors):
            first, stop = sector * _PER_SECTOR, (sector + 1) * _PER_SECTOR
            for place, entries in (
                (part.layout.directory, part.directory),
                (part.layout.copy, part.copy),
            ):
                if entries:
                    raw = little_endian_bytes(entries, first, stop)
                    at = (place + sector) * SECTOR
                    writes.append(MetaWrite(part.slot, at, raw, "l1_update"))
        if writes:
            yield Write(writes)
            yield Barrier()

    def finish(self) -> Procedure:
        """The directories, and what the header says."""
        yield from self.directories()
        part = self.part
        fields = []
        if self.replaced:
            place = part.layout.directory if self.replaced == _GD_FIELD else part.layout.copy
            fields.append(MetaWrite(part.slot, self.replaced, struct.pack("<Q", place)))
            part.damage = None
        if part.layout.free_at:
            fields.append(
                MetaWrite(part.slot, part.layout.free_at, struct.pack("<I", part.space.end))
            )
        if part.unclean and not part.image.ready:
            fields.append(MetaWrite(part.slot, part.layout.unclean_at, b"\0"))
            part.unclean = False
        if fields:
            yield Write(fields)
            yield Barrier()
