"""Mending a sparse extent: both copies of a table alike, and every table and grain in a place of
its own."""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING

from ...contract import Barrier, MetaWrite, Procedure, Progress, Read, Write
from ...findings import CheckResult
from ...ondisk import little_endian_bytes, zeros
from .sparse_header import SECTOR

if TYPE_CHECKING:
    from .sparse import SparsePart

_BATCH = 256 << 10
_CHUNK = 1 << 20
_GD_FIELD, _RGD_FIELD = 56, 48
_PER_SECTOR = SECTOR // 4


def equalize(part: SparsePart) -> Procedure:
    """Write the primary copy of every grain table over a redundant one that differs, as a crash
    between two flushes may have left them."""
    size = part.table_bytes
    step = max(_BATCH // size, 1)
    top = part.space.end - part.layout.table_sectors
    for start in range(0, len(part.directory), step):
        pairs = [
            (a, b)
            for a, b in zip(
                part.directory[start : start + step], part.copy[start : start + step], strict=True
            )
            if 0 < a <= top and 0 < b <= top and a != b
        ]
        firsts = (yield Read(part.slot, [(a * SECTOR, size) for a, _ in pairs])) if pairs else []
        seconds = (yield Read(part.slot, [(b * SECTOR, size) for _, b in pairs])) if pairs else []
        writes = [
            MetaWrite(part.slot, b * SECTOR, first, "l2_update")
            for (_, b), first, second in zip(pairs, firsts, seconds, strict=True)
            if first != second
        ]
        if writes:
            yield Write(writes)
        yield Progress(start, len(part.directory))
    yield Barrier()


class Mender:
    """The writing half of a check."""

    def __init__(self, part: SparsePart, result: CheckResult) -> None:
        self.part, self.result = part, result
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

    def finish(self) -> Procedure:
        """The directories, and what the header says."""
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
        fields = []
        if self.replaced:
            place = part.layout.directory if self.replaced == _GD_FIELD else part.layout.copy
            fields.append(MetaWrite(part.slot, self.replaced, struct.pack("<Q", place)))
            part.damage = None
            self.result.corruptions_fixed += 1
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
