"""Where the bytes of a sparse extent are: grain directory, grain tables and their shortcuts.

Source: "Virtual Disk Format 5.0", "Grain Directory" and "Grain Table".  Entries are sectors of the
extent's file, in 32 bits; 0 is none, and 1 a grain of zeroes where the header says so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ....contract import NeedMeta, Table
from ....errors import CorruptImage
from ....extents import Data, Extent, Hole, Zero
from ....ondisk import little_endian_array, zeros
from ..parts import Image
from .header import SECTOR, Layout
from .space import Runs, Space

TABLE_LOAD = "l2_load"
LIMIT = 1 << 32  # sectors that an entry can name
# Tables asked for at once; a wider window asks again.
_MOST_MISSES = 64


class SparseMap:
    """Geometry, both directories, and the look-up.

    ``directory`` and ``copy`` (empty without one) are arrays of 32 bits and stay in memory; grain
    tables are tables of the engine under the offset of the primary one (of the copy, where only
    that one can be read).
    """

    def __init__(self, image: Image, slot: str, start: int, length: int, layout: Layout) -> None:
        self.image = image
        self.slot = slot
        self.start = start
        self.length = length
        self.directory: array[int] = zeros(32, 0)
        self.copy: array[int] = zeros(32, 0)
        self._short: dict[int, array[int]] = {}
        self._short_write: dict[int, array[int]] = {}
        self._generation = -1
        self._checked: set[int] = set()
        """Places of tables without entries that point at metadata: only through them may data
        be written."""
        self._metadata: Runs | None = None
        self.use_layout(layout, 0)

    def use_layout(self, layout: Layout, sectors: int) -> None:
        """Take the geometry of a header; the file has ``sectors`` sectors (a part counts)."""
        self.layout = layout
        self.unit = layout.grain * SECTOR
        self.bits = self.unit.bit_length() - 1
        self.coverage = self.unit * layout.entries
        self.table_bytes = layout.table_sectors * SECTOR
        self.space = Space(sectors, layout.grain, LIMIT, self.image.zero_beyond_end)
        self.forget()

    def use_directories(self, directory: array[int], copy: array[int]) -> None:
        """Take the directories (``copy`` empty: there is none)."""
        self.directory, self.copy = directory, copy
        # No grain below this one is metadata; most images have all of theirs before the grains.
        ends = [start + length for start, length in self.layout.structures]
        ends += [max(entries) + self.layout.table_sectors for entries in (directory, copy)
                 if entries]  # fmt: skip
        self._top = max(ends)
        self.forget()

    @property
    def weight(self) -> int:
        """Bytes of the directories."""
        return 4 * (len(self.directory) + len(self.copy))

    def forget(self) -> None:
        """Drop all shortcuts (after a procedure changed tables)."""
        self._short.clear()
        self._short_write.clear()
        self._checked.clear()
        self._metadata = None

    # -- tables
    def _is_place(self, sector: int) -> bool:
        return sector > 0 and sector + self.layout.table_sectors <= self.space.end

    def table_at(self, index: int) -> int:
        """The sector of grain table ``index``, 0 without one: of the primary one where its entry
        can be, otherwise of the copy.  Raises CorruptImage when neither can."""
        sector = self.directory[index]
        if self._is_place(sector):
            return sector
        if self.copy and self._is_place(self.copy[index]):
            return self.copy[index]
        if sector:
            raise self._broken(index)
        return 0

    def _broken(self, index: int) -> CorruptImage:
        return CorruptImage(
            f"Grain table {index} is beyond the end of the extent "
            f"(sector {self.directory[index]:#x})",
            field="grain directory entry",
            offset=self.layout.directory * SECTOR + 4 * index,
        )

    def table(self, sector: int) -> Table | None:
        """The table at ``sector``, None when it is not in memory."""
        return self.image.tables.get(self.slot, sector * SECTOR)

    def load(self, offset: int, data: bytes) -> None:
        """Decode a table that was asked for."""
        self._checked.discard(offset // SECTOR)
        values = little_endian_array(32, data)
        self.image.tables.put(self.slot, offset, values, len(data))

    def check_table(self, table: Table) -> None:
        """Raise CorruptImage when a table has an entry that points at metadata or beyond the end
        of the file: nothing is written through it.  It is looked through once after each load,
        when the first write comes."""
        sector = table.offset // SECTOR
        if sector in self._checked:
            return
        data: array[int] = table.data
        first = 1 if self.layout.zeroed else 0
        grains = {entry for entry in data if entry > first}
        if grains and (min(grains) < self._top or max(grains) >= self.space.end):
            metadata = self._metadata_runs()
            size = self.layout.grain
            for index, entry in enumerate(data):
                if entry <= first:
                    continue
                if entry >= self.space.end or metadata.touches(entry, entry + size):
                    raise CorruptImage(
                        f"Preventing invalid write: the grain at sector {entry:#x} overlaps "
                        "metadata or is beyond the end of the extent",
                        field="grain table entry",
                        offset=table.offset + 4 * index,
                    )
        self._checked.add(sector)

    def _metadata_runs(self) -> Runs:
        if self._metadata is None:
            self._metadata = Runs(
                (start, end) for start, end, _ in places(self.layout, self.directory, self.copy)
            )
        return self._metadata

    def is_metadata(self, start: int, end: int) -> None:
        """[start, end) holds tables from now on."""
        self._top = max(self._top, end)
        if self._metadata is not None:
            self._metadata.add(start, end)

    # -- shortcuts
    def _shortcut(self, index: int, write: bool) -> array[int] | None:
        """The table for the shortcuts; None when it is absent, not in memory, has a bad entry or,
        for ``write``, is not checked."""
        if self._generation != self.image.tables.generation:
            self._generation = self.image.tables.generation
            self._short.clear()
            self._short_write.clear()
        short = self._short_write if write else self._short
        found = short.get(index)
        if found is None and index < len(self.directory):
            sector = self.directory[index]
            if self._is_place(sector) and (not write or sector in self._checked):
                table = self.table(sector)
                if table is not None and max(table.data) < self.space.end:
                    found = short[index] = table.data
        return found

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """Host offsets of plain data; -1 where `map` must be asked."""
        if write and not self.image.ready:
            return [-1] * len(offsets)
        if self._generation != self.image.tables.generation:
            self._generation = self.image.tables.generation
            self._short.clear()
            self._short_write.clear()
        short = self._short_write if write else self._short
        bits, coverage, per_table, size = self.bits, self.coverage, self.layout.entries, self.unit
        mask = size - 1
        out: list[int] = []
        append = out.append
        for offset, length in zip(offsets, lengths, strict=True):
            index = offset // coverage
            table = short.get(index)
            if table is None:
                table = self._shortcut(index, write)
                if table is None:
                    append(-1)
                    continue
            entry = table[(offset >> bits) % per_table]
            inside = offset & mask
            if entry > 1 and inside + length <= size:
                append((entry << 9) + inside)
            else:
                append(self.map_one(offset, length, write))
        return out

    def map_one(self, offset: int, length: int, write: bool) -> int:
        """Host offset of one request whose bytes are contiguous plain data; otherwise -1."""
        if write and not self.image.ready:
            return -1
        index = offset // self.coverage
        table = (self._short_write if write else self._short).get(index)
        if table is None or self._generation != self.image.tables.generation:
            table = self._shortcut(index, write)
            if table is None:
                return -1
        per_table = self.layout.entries
        nth = (offset >> self.bits) % per_table
        entry = table[nth]
        if entry < 2:
            return -1
        host = (entry << 9) + (offset & self.unit - 1)
        left = (offset & self.unit - 1) + length - self.unit
        while left > 0:
            entry += self.layout.grain
            nth += 1
            if nth == per_table:
                nth = 0
                index += 1
                table = self._shortcut(index, write)
                if table is None:
                    return -1
            if table[nth] != entry:
                return -1
            left -= self.unit
        return host

    # -- the general map
    def map(self, offset: int, length: int, out: list[Extent]) -> NeedMeta | None:
        """Append extents, up to the first table that is not in memory; see `Part.map`."""
        end = offset + length
        while offset < end:
            index = offset // self.coverage
            stop = min(end, (index + 1) * self.coverage)
            sector = self.table_at(index)
            if not sector:
                out.append(Hole(stop - offset))
                offset = stop
                continue
            table = self.table(sector)
            if table is None:
                return self._misses(offset, end)
            writable = self.image.ready and sector in self._checked
            while offset < stop:
                extent = self._extent(table, offset, stop, writable)
                out.append(extent)
                offset += extent.length
        return None

    def _misses(self, offset: int, end: int) -> NeedMeta:
        found: dict[int, None] = {}
        for index in range(offset // self.coverage, (end - 1) // self.coverage + 1):
            sector = self.directory[index]
            if not self._is_place(sector):
                sector = self.copy[index] if self.copy else 0
            if self._is_place(sector) and self.table(sector) is None:
                found[sector] = None
                if len(found) == _MOST_MISSES:
                    break
        return self.need(found)

    def need(self, sectors: Sequence[int] | dict[int, None]) -> NeedMeta:
        """The request for the tables at ``sectors``."""
        size = self.table_bytes
        return NeedMeta(self.slot, [(sector * SECTOR, size) for sector in sectors], TABLE_LOAD)

    def _extent(self, table: Table, offset: int, stop: int, writable: bool) -> Extent:
        """The longest extent from ``offset``, not beyond ``stop`` (which is in the same table)."""
        data: array[int] = table.data
        grain = self.layout.grain
        first = (offset >> self.bits) % self.layout.entries
        limit = first + ((stop - 1) >> self.bits) - (offset >> self.bits) + 1
        entry = data[first]
        nth = first + 1
        if self.holds_data(entry):
            if entry >= self.space.end:
                raise CorruptImage(
                    f"The grain at sector {entry:#x} is beyond the end of the extent",
                    field="grain table entry",
                    offset=table.offset + 4 * first,
                )
            last = entry + grain
            while nth < limit and data[nth] == last < self.space.end:
                last += grain
                nth += 1
        else:
            while nth < limit and data[nth] == entry:
                nth += 1
        inside = offset & self.unit - 1
        length = min(stop - offset, (nth - first) * self.unit - inside)
        if self.holds_data(entry):
            return Data(self.slot, entry * SECTOR + inside, length, writable)
        return Zero(length) if entry else Hole(length)

    def holds_data(self, entry: int) -> bool:
        """True for an entry that names a grain."""
        return entry > 1 or (entry == 1 and not self.layout.zeroed)


def places(
    layout: Layout, directory: array[int], copy: array[int]
) -> Iterator[tuple[int, int, int]]:
    """(start, end, number) of all structures but grains, in the order of their places.  The number
    is twice the index of a table, one more for a redundant one, and negative for what is none."""
    size = layout.table_sectors
    found = [start << 32 | 2 * i for i, start in enumerate(directory) if start]
    found += [start << 32 | 2 * i + 1 for i, start in enumerate(copy) if start]
    found.sort()
    fixed = sorted(layout.structures, reverse=True)
    for key in found:
        start = key >> 32
        while fixed and fixed[-1][0] <= start:
            at, length = fixed.pop()
            yield at, at + length, -1
        yield start, start + size, key & 0xFFFFFFFF
    for at, length in reversed(fixed):
        yield at, at + length, -1
