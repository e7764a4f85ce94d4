"""Marking in stored bitmaps what a repair changes for whoever reads the disk.

An incremental backup copies what its bitmap calls dirty.  A part that could not be read and reads
as zeroes now has to be copied, or the backup would differ from the disk for good.
"""

from __future__ import annotations

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Write
from ....errors import MalformedImage
from ....hints import TYPE_CHECKING
from ..machine.core import SLOT
from .directory import ALL_ONES, AUTO, ENTRY_OFFSET, IN_USE, usable
from .use import Directory, read_directory

if TYPE_CHECKING:
    from ..repair.places import Places

_SECTOR = 512


class Marker:
    """Marks ranges of the disk in all bitmaps that follow writes; ``places`` gives clusters.

    Bits are only added, and are durable before `mark` returns.  What is in use already is not to be
    relied on anyway; what this version cannot keep true becomes so.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.image = places.image
        self._directory: Directory | None = None
        self._begun = False

    def mark(self, start: int, end: int) -> Procedure:
        """The bytes [start, end) of the disk may read as something else from now on."""
        if not self._begun:
            self._begun = True
            yield from self._begin()
        if self._directory is None:
            return
        end = min(end, self.image.size)
        for entry in self._directory.stored:
            if start < end and entry.flags & AUTO and not entry.flags & IN_USE:
                bits = entry.granularity_bits
                yield from self._set(entry.table_offset, start >> bits, (end - 1 >> bits) + 1)

    def _begin(self) -> Procedure:
        try:
            self._directory = yield from read_directory(self.image)
        except MalformedImage:
            return  # mended before: none is relied on
        if self._directory is None:
            return
        writes = []
        for entry in self._directory.stored:
            if not usable(entry, self.image.size, self.image.cluster_bits) and entry.flags & AUTO:
                entry.flags |= IN_USE
                writes.append(self._directory.flags_write(entry, entry.flags))
        if writes:
            yield Write(writes)
            yield Barrier()

    def _set(self, table: int, first: int, stop: int) -> Procedure:
        """Set the bits [first, stop) of the bitmap whose table is at ``table``."""
        size = self.image.cluster_size
        per_cluster = 8 * size
        while first < stop:
            index = first // per_cluster
            end = min(stop, (index + 1) * per_cluster)
            at = table + 8 * index
            (raw,) = yield Read(SLOT, [(at, 8)])
            value = int.from_bytes(raw, "big")
            if value != ALL_ONES:
                low, high = first % per_cluster, (end - 1) % per_cluster + 1
                yield from self._add(at, value & ENTRY_OFFSET, low, high)
            yield Progress(first, stop)
            first = end

    def _add(self, at: int, host: int, low: int, high: int) -> Procedure:
        """Set bits of the cluster of bits at ``host``, or of one that the entry at ``at`` gets."""
        size = self.image.cluster_size
        if (low, high) == (0, 8 * size):
            yield Write([MetaWrite(SLOT, at, ALL_ONES.to_bytes(8, "big"))])
            yield Barrier()
            return
        start = (low >> 3) & -_SECTOR
        stop = ((high - 1 >> 3) | _SECTOR - 1) + 1
        old = bytes(size)
        if host:
            (old,) = yield Read(SLOT, [(host, size)])
        value = int.from_bytes(old, "little") | (1 << high) - (1 << low)
        data = value.to_bytes(size, "little")
        if host:
            yield Write([MetaWrite(SLOT, host + start, data[start:stop])])
        else:
            (cluster,) = yield from self.places.take(1)
            host = cluster << self.image.cluster_bits
            yield Write([MetaWrite(SLOT, host, data)])
            yield Barrier()
            yield Write([MetaWrite(SLOT, at, host.to_bytes(8, "big"))])
        yield Barrier()
