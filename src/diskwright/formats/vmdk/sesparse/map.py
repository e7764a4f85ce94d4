"""Where the bytes of a seSparse extent are.

An entry of the grain directory is 0, or 0x10000000 in its upper and the number of a grain table
in its lower half.  An entry of a table has its kind in the upper four bits: 0 (and nothing else in
it) is not there, 1 was unmapped by the guest, 2 is zero, 3 is a grain of the file, whose number is
in the bits 0-47 (upper part) and 48-59 (lower twelve bits).  1 and 2 both read as zeroes, whatever
their other bits are, and hide a backing file (as QEMU reads them).
"""

from __future__ import annotations

from array import array

from ....contract import NeedMeta, Table
from ....errors import CorruptImage
from ....extents import Data, Extent, Hole, Zero
from ....ondisk import little_endian_array, zeros
from ....units import SECTOR
from ..parts import Image
from .header import COVERAGE, ENTRIES, GRAIN, GRAIN_SECTORS, TABLE_BYTES, Header
from .space import SesparseSpace

ABSENT, UNMAPPED, ZEROED, ALLOCATED = range(4)
UNMAPPED_ENTRY, ZERO_ENTRY = UNMAPPED << 60, ZEROED << 60
TABLE_LOAD = "l2_load"
_LINK = 0x10000000 << 32
_MOST_TABLES = 64  # asked for at once
_LOW = (1 << 48) - 1


def entry_of(grain: int) -> int:
    """The entry of a table that names a grain of the file."""
    return ALLOCATED << 60 | (grain & 0xFFF) << 48 | grain >> 12


def grain_of(entry: int) -> int:
    """The grain that an entry names (also that which one of another kind still holds)."""
    return (entry & _LOW) << 12 | entry >> 48 & 0xFFF


class SesparseMap:
    """Directory (an array of 64 bits, always in memory) and tables (of the engine)."""

    unit = GRAIN

    def __init__(
        self, image: Image, slot: str, start: int, header: Header, file_length: int
    ) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.header = header
        self.length = header.capacity * SECTOR
        self.file_end = file_length
        """The end of the file, as far as this part knows it."""
        self.directory: array[int] = zeros(64, 0)
        self.weight = 8 * header.table_count
        self.refuse_write: str | None = None
        """Why this extent is not written; None when nothing speaks against it."""
        self.space = SesparseSpace(image, slot, header)

    # -- tables
    def table_at(self, number: int) -> int:
        """Where the grain table for entry ``number`` of the directory is (bytes), 0 without one.
        Raises CorruptImage."""
        entry = self.directory[number]
        if not entry:
            return 0
        index = entry ^ _LINK
        tables = self.header.tables
        if index >> 32 or (index + 1) * TABLE_BYTES > tables.size * SECTOR:
            raise CorruptImage(
                f"entry {entry:#x} does not name a grain table",
                field="grain directory entry",
                offset=self.header.directory.start + 8 * number,
            )
        place = tables.start + index * TABLE_BYTES
        if place + TABLE_BYTES > self.file_end:
            raise CorruptImage(
                f"grain table {index} is behind the end of the file, which was cut off",
                field="grain directory entry",
                offset=self.header.directory.start + 8 * number,
            )
        return place

    def link_to(self, index: int) -> int:
        """The entry of the directory that names grain table ``index``."""
        return _LINK | index

    def table(self, place: int) -> Table | None:
        """The table at ``place``, None when it is not in memory."""
        return self.image.tables.get(self.slot, place)

    def need(self, places: list[int]) -> NeedMeta:
        """The request for the grain tables at ``places``."""
        return NeedMeta(self.slot, [(place, TABLE_BYTES) for place in places], TABLE_LOAD)

    def load(self, offset: int, data: bytes) -> None:
        """Decode a grain table or a slice of the free maps."""
        if self.space.owns(offset):
            self.space.load(offset, data)
        else:
            self.image.tables.put(self.slot, offset, little_endian_array(64, data), TABLE_BYTES)

    def host_of(self, entry: int, table: int, index: int) -> int:
        """The host offset of an allocated grain; -1 for an entry of another kind.  ``table`` and
        ``index`` say where the entry is.  Raises CorruptImage."""
        kind = entry >> 60
        if kind == ALLOCATED:
            grain = grain_of(entry)
            host = self.header.grains.start + grain * GRAIN
            if (grain + 1) * GRAIN_SECTORS <= self.header.grains.size and host < self.file_end:
                return host
        elif kind in (UNMAPPED, ZEROED) or not entry:
            return -1
        what = "does not name a grain" if kind != ALLOCATED else "is beyond the end of the extent"
        raise CorruptImage(
            f"entry {entry:#x} {what}", field="grain table entry", offset=table + 8 * index
        )

    # -- the map
    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """See `Part.map`."""
        end = offset + length
        while offset < end:
            number = offset // COVERAGE
            stop = min(end, (number + 1) * COVERAGE)
            place = self.table_at(number)
            if not place:
                out.append(Hole(stop - offset))
                offset = stop
                continue
            table = self.table(place)
            if table is None:
                return self.need(self._absent(number, end))
            while offset < stop:
                extent = self._extent(table, offset, stop)
                out.append(extent)
                offset += extent.length
        return None

    def _absent(self, number: int, end: int) -> list[int]:
        """The tables for the range up to ``end`` that are not in memory."""
        out = [self.table_at(number)]
        for other in range(number + 1, min(-(-end // COVERAGE), number + _MOST_TABLES)):
            try:
                place = self.table_at(other)
            except CorruptImage:
                break  # told of when the map gets there
            if place and self.table(place) is None:
                out.append(place)
        return out

    @property
    def writable(self) -> bool:
        """Data may be overwritten in place."""
        return self.image.ready and self.image.writable and self.refuse_write is None

    def _extent(self, table: Table, offset: int, stop: int) -> Extent:
        """The longest extent from ``offset`` in one table."""
        data: array[int] = table.data
        index = first = offset // GRAIN % ENTRIES
        inside = offset % GRAIN
        limit = first - (-(stop - offset + inside) // GRAIN)
        entry = data[first]
        host = self.host_of(entry, table.offset, first)
        index += 1
        if host >= 0:
            grain = grain_of(entry) + 1
            most = min(limit, first + -(-(self.file_end - host) // GRAIN))
            while index < most and data[index] == entry_of(grain):
                grain += 1
                index += 1
        elif entry:
            while index < limit and data[index] >> 60 in (UNMAPPED, ZEROED):
                index += 1
        else:
            while index < limit and not data[index]:
                index += 1
        length = min(stop - offset, (index - first) * GRAIN - inside)
        if host >= 0:
            return Data(self.slot, host + inside, length, self.writable)
        return Zero(length) if entry else Hole(length)
