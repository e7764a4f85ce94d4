"""Where guest bytes are: the block allocation table, the sector bitmaps, and the column shortcuts
(MS-VHDX 2.5)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ...contract import NeedMeta, Range
from ...errors import CorruptImage
from ...extents import Data, Extent, Hole, Inline, Zero, shorten
from ...ondisk import little_endian_array
from .core import (
    BAT_LOAD,
    ENTRIES,
    FULL,
    NOT_PRESENT,
    OFFSET,
    PART,
    PARTIAL,
    SB_PRESENT,
    STATE,
    UNDEFINED,
    UNMAPPED,
    UNMAPPED_095,
    ZERO,
    Core,
)
from .structures import SLOT

# Tables asked for at once; a wider window asks again.
_MOST_MISSES = 64
_READS_ZERO = (ZERO, UNMAPPED, UNMAPPED_095, UNDEFINED)


class Mapping(Core):
    """`map`, `load` and the shortcuts."""

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Decode a table that was asked for."""
        if self.overlay is not None:
            data = self.overlay.lay(offset, data)
        if self.bat.offset <= offset < self.bat.end:
            self._short.pop((offset - self.bat.offset) // PART, None)
            self.tables.put(slot, offset, little_endian_array(64, data), PART)
        else:
            self.tables.put(slot, offset, bytearray(data), PART)

    # -- shortcuts
    def _shortcut(self, number: int) -> array[int] | None:
        """By entry of a BAT slice the host offset of a block that is wholly there, -1 for all
        others; None when the slice is not in memory.

        What is kept is dropped at every eviction, which also keeps the slices in use from looking
        unused.
        """
        if self._generation != self.tables.generation:
            self._generation = self.tables.generation
            self._short.clear()
        found = self._short.get(number)
        if found is None:
            table = self.slice_table(number)
            if table is None:
                return None
            found = array("q", [-1]) * ENTRIES
            size, end = self.block_size, self.fresh
            for i, entry in enumerate(table.data):
                host = entry & OFFSET
                if entry & STATE == FULL and host < end and not self.overlaps(host, size):
                    found[i] = host
            self._short[number] = found
        return found

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """Host offsets of plain data; -1 where `map` must be asked."""
        if self.opaque or (write and not self.ready):
            return [-1] * len(offsets)
        if self._generation != self.tables.generation:
            self._generation = self.tables.generation
            self._short.clear()
        short = self._short
        bits, ratio_bits, size = self.block_bits, self.ratio_bits, self.block_size
        mask = size - 1
        out: list[int] = []
        append = out.append
        for offset, length in zip(offsets, lengths, strict=True):
            block = offset >> bits
            index = block + (block >> ratio_bits)
            found = short.get(index >> 9)
            if found is not None:
                host = found[index & 511]
                inside = offset & mask
                if host >= 0 and inside + length <= size:
                    append(host + inside)
                    continue
            append(self.map_one(offset, length, write))
        return out

    def map_one(self, offset: int, length: int, write: bool) -> int:
        """Host offset of one request whose bytes are contiguous plain data; otherwise -1."""
        block = offset >> self.block_bits
        if self.opaque or (write and not self.ready) or block >= self.blocks:
            return -1
        index = block + (block >> self.ratio_bits)
        found = self._short.get(index >> 9)
        if found is None or self._generation != self.tables.generation:
            found = self._shortcut(index >> 9)
            if found is None:
                return -1
        host = found[index & 511]
        size = self.block_size
        inside = offset & (size - 1)
        if host < 0 or inside + length <= size:
            return host + inside if host >= 0 else -1
        left = inside + length - size
        following = host
        while left > 0:
            block += 1
            following += size
            index = self.bat_index(block)
            found = self._shortcut(index >> 9) if block < self.blocks else None
            if found is None or found[index & 511] != following:
                return -1
            left -= size
        return host + inside

    # -- the general map
    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Extents of ``ranges``, up to the first table that is not in memory.

        Raises CorruptImage at an entry that breaks the specification; what is before it is
        answered first.
        """
        out: list[Extent] = []
        for position, (offset, length) in enumerate(ranges):
            end = offset + length
            while offset < end:
                try:
                    found = self._extents(offset, end)
                except Exception:
                    if out:
                        return out, None
                    raise
                if isinstance(found, NeedMeta):
                    rest = [(offset, end - offset), *ranges[position + 1 :]]
                    return out, self._misses(rest, found)
                if self.opaque:
                    found = [piece for extent in found for piece in self._overlaid(extent)]
                out += found
                offset += sum([extent.length for extent in found])
        return out, None

    def _misses(self, ranges: Sequence[Range], first: NeedMeta) -> NeedMeta:
        """What is missing first, and more slices of the BAT for ``ranges``."""
        found = dict(first.ranges)
        for offset, length in ranges:
            low = self.bat_index(offset >> self.block_bits) // ENTRIES
            last = min((offset + length - 1) >> self.block_bits, self.blocks - 1)
            for number in range(low, self.bat_index(last) // ENTRIES + 1):
                if len(found) >= _MOST_MISSES:
                    break
                if self.slice_table(number) is None:
                    found[self.slice_offset(number)] = PART
        return NeedMeta(SLOT, list(found.items()), first.tag)

    def _extents(self, guest: int, end: int) -> list[Extent] | NeedMeta:
        """What is known from ``guest`` on, as far as one chunk and one slice of the BAT go."""
        bits = self.block_bits
        block = guest >> bits
        index = self.bat_index(block)
        table = self.slice_table(index // ENTRIES)
        if table is None:
            place = self.slice_offset(index // ENTRIES)
            return NeedMeta(SLOT, [(place, PART)], BAT_LOAD)
        entries: array[int] = table.data
        at = index % ENTRIES
        in_chunk = (1 << self.ratio_bits) - (block & ((1 << self.ratio_bits) - 1))
        limit = at + min(((end - 1) >> bits) - block + 1, in_chunk, ENTRIES - at)
        entry = entries[at]
        state = entry & STATE
        nth = at + 1
        size = self.block_size
        inside = guest & (size - 1)
        if state == FULL:
            host = self.host_of(entry, index, size)
            hosts = self._shortcut(index // ENTRIES)
            assert hosts is not None
            expected = host + size
            while nth < limit and hosts[nth] == expected:
                expected += size
                nth += 1
            length = min(end - guest, (nth - at) * size - inside)
            return [Data(SLOT, host + inside, length, self.ready)]
        if state == PARTIAL and self.differencing:
            host = self.host_of(entry, index, size)
            length = min(end - guest, size - inside)
            return self._partial(block, host, guest, length)
        if state != NOT_PRESENT and state not in _READS_ZERO:
            raise self.bad_state(entry, index)
        while nth < limit and entries[nth] & STATE == state:
            nth += 1
        length = min(end - guest, (nth - at) * size - inside)
        return [Hole(length) if state == NOT_PRESENT else Zero(length)]

    # -- partially present blocks
    def bitmap_of(self, chunk: int) -> int | NeedMeta:
        """Where a chunk's sector bitmap block is; 0 without one.  Raises CorruptImage."""
        index = self.bitmap_index(chunk)
        table = self.slice_table(index // ENTRIES)
        if table is None:
            place = self.slice_offset(index // ENTRIES)
            return NeedMeta(SLOT, [(place, PART)], BAT_LOAD)
        entry = table.data[index % ENTRIES]
        if entry & STATE == NOT_PRESENT:
            return 0
        if entry & STATE != SB_PRESENT:
            raise self.bad_state(entry, index)
        return self.host_of(entry, index, 1 << 20)

    def missing_parts(self, bitmap: int, start: int, length: int) -> list[Range]:
        """The parts of a bitmap block's bytes [start, start + length) that are not in memory."""
        return [
            (place, PART)
            for place in self.bitmap_tables(bitmap, start, length)
            if self.tables.get(SLOT, place) is None
        ]

    def _partial(self, block: int, host: int, guest: int, length: int) -> list[Extent] | NeedMeta:
        start, chunk = self.bitmap_part(block)
        bitmap = self.bitmap_of(chunk)
        if isinstance(bitmap, NeedMeta):
            return bitmap
        if not bitmap:
            raise self.no_bitmap(block)
        base = block << self.block_bits
        first = (guest - base) >> self.sector_bits
        last = (guest + length - 1 - base) >> self.sector_bits
        low = start + (first >> 3)
        missing = self.missing_parts(bitmap, low, start + (last >> 3) + 1 - low)
        if missing:
            return NeedMeta(SLOT, missing, BAT_LOAD)
        out: list[Extent] = []
        for present, begin, stop in self._runs(bitmap, start, first, last + 1):
            a = max(guest, base + (begin << self.sector_bits))
            b = min(guest + length, base + (stop << self.sector_bits))
            out.append(Data(SLOT, host + a - base, b - a, self.ready) if present else Hole(b - a))
        return out

    def no_bitmap(self, block: int) -> CorruptImage:
        """The sector bitmap is missing that a partially present block needs."""
        index = self.bitmap_index(block >> self.ratio_bits)
        return CorruptImage(
            f"Block {block} is partially present, and BAT entry {index} has no sector bitmap",
            field="BAT entry",
            offset=self.entry_field(index),
        )

    def _runs(
        self, bitmap: int, start: int, first: int, stop: int
    ) -> Iterator[tuple[bool, int, int]]:
        """(present, first sector, end) of the sectors [first, stop) of the block whose bits begin
        at byte ``start`` of the block at ``bitmap``.  Neighbours differ, except where a part of
        the bitmap ends."""
        while first < stop:
            byte = start + (first >> 3)
            table = self.tables.get(SLOT, bitmap + byte // PART * PART)
            assert table is not None
            inside = byte % PART
            # Sectors up to the end of the part, or of what is asked for.
            count = min(stop - first, (PART - inside) * 8 - (first & 7))
            bits = int.from_bytes(table.data[inside : inside + (count + 14 >> 3)], "little")
            bits = bits >> (first & 7) & (1 << count) - 1
            end = first + count
            while first < end:
                present = bool(bits & 1)
                # Complementing the zeroes of a present run makes both cases a search for a one.
                flipped = bits ^ (1 << end - first) - 1 if present else bits
                run = (flipped & -flipped).bit_length() - 1 if flipped else end - first
                yield present, first, first + run
                bits >>= run
                first += run

    # -- a log in memory
    def _overlaid(self, extent: Extent) -> Iterator[Extent]:
        """``extent`` with what the log has in its place."""
        if not isinstance(extent, Data) or self.overlay is None:
            yield extent
            return
        done = 0
        for at, length, piece in self.overlay.pieces(extent.host, extent.host + extent.length):
            skip = at - extent.host
            if skip > done:
                yield shorten(extent, done, skip - done)
            yield Zero(length) if piece is None else Inline(piece)
            done = skip + length
        if done < extent.length:
            yield shorten(extent, done, extent.length - done)
