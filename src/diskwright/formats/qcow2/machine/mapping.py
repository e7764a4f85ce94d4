"""Where guest bytes are: the L1/L2 lookup and its column shortcuts (qcow2 specification, "Cluster
mapping")."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import NeedMeta, Range
from ....errors import CorruptImage
from ....extents import Data, Extent, Hole, Packed, Zero
from ....ondisk import big_endian_array
from ..header import MAX_OFFSET
from .core import COPIED, L2_LOAD, OFFSET, PACKED, SLOT, ZERO_FLAG
from .overlap import Guard

# Tables asked for at once; a wider window asks again.
_MOST_MISSES = 64


class Mapping(Guard):
    """`map`, `load` and the shortcuts."""

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Decode an L2 table that was asked for."""
        self._checked.discard(offset)
        self.tables.put(slot, offset, big_endian_array(64, data), self.cluster_size)

    def owned(self, guest: int) -> bool:
        """True when the cluster at ``guest`` has data that no snapshot shares.  Its L2 table is in
        memory, where there is one."""
        l1_index = guest >> self.l1_shift
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        if not entry & COPIED:
            return False
        table = self.l2_table(entry & OFFSET)
        assert table is not None
        found: int = table.data[(guest >> self.cluster_bits & self.l2_mask) * self.stride]
        return bool(found & COPIED)

    # -- shortcuts
    def _shortcut(self, l1_index: int, write: bool) -> array[int] | None:
        """The L2 table for the shortcuts; None when it is absent, not in memory or, for ``write``,
        not checked.

        The dict of tables is dropped at every eviction, which also keeps the tables in use from
        looking unused.  Tables of extended entries have shortcuts of their own.
        """
        if self._generation != self.tables.generation:
            self._drop_shortcuts()
        short = self._short_write if write else self._short
        found = short.get(l1_index)
        if found is None and not self.extended:
            found = self._words(l1_index, write)
            if found is not None:
                short[l1_index] = found
        return found

    def _drop_shortcuts(self) -> None:
        self._generation = self.tables.generation
        for shortcuts in (self._short, self._short_write, self._wide, self._wide_write):
            shortcuts.clear()

    def _words(self, l1_index: int, write: bool) -> array[int] | None:
        """What `_shortcut` answers, looked up."""
        if l1_index < len(self.l1) and self.refuse_io is None:
            offset = self.l1[l1_index] & OFFSET
            if offset and (not write or offset in self._checked):
                table = self.tables.get(SLOT, offset)
                if table is not None and type(table.data) is array:
                    return table.data
        return None

    def map_batch(
        self, offsets: Sequence[int], lengths: Sequence[int], write: bool
    ) -> Sequence[int]:
        """Host offsets of plain data; -1 where `map` must be asked."""
        if self.refuse_io is not None or (write and not self.ready):
            return [-1] * len(offsets)
        if self.extended:
            wide = self.map_wide
            return [wide(o, n, write) for o, n in zip(offsets, lengths, strict=True)]
        if self._generation != self.tables.generation:
            self._drop_shortcuts()
        short = self._short_write if write else self._short
        bits, l1_shift, l2_mask = self.cluster_bits, self.l1_shift, self.l2_mask
        size = self.cluster_size
        mask = size - 1
        out: list[int] = []
        append = out.append
        for offset, length in zip(offsets, lengths, strict=True):
            table = short.get(offset >> l1_shift)
            if table is None:
                table = self._shortcut(offset >> l1_shift, write)
                if table is None:
                    append(-1)
                    continue
            # A standard cluster of our own is its host offset and COPIED alone.
            entry = table[offset >> bits & l2_mask] ^ COPIED
            inside = offset & mask
            if mask < entry < MAX_OFFSET and not entry & mask and inside + length <= size:
                append(entry + inside)
            else:
                append(self.map_one(offset, length, write))
        return out

    def map_one(self, offset: int, length: int, write: bool) -> int:
        """Host offset of one request whose bytes are contiguous plain data; otherwise -1."""
        l1_index = offset >> self.l1_shift
        table = (self._short_write if write else self._short).get(l1_index)
        if table is None or self._generation != self.tables.generation:
            if self.extended:
                return self.map_wide(offset, length, write)
            table = self._shortcut(l1_index, write)
            if table is None:
                return -1
        mask = self.cluster_mask
        inside = offset & mask
        entry = table[offset >> self.cluster_bits & self.l2_mask] ^ COPIED
        if mask < entry < MAX_OFFSET and not entry & mask:
            if write and not self.ready:
                return -1
        else:
            # Not ours alone, but it can be read in place.
            entry ^= COPIED
            if write or not mask < entry < MAX_OFFSET or entry & mask:
                return -1
        if inside + length > mask + 1:
            left = inside + length - mask - 1
            return self._contiguous(offset - inside, entry, left, entry + inside, write)
        return entry + inside

    def _contiguous(self, guest: int, entry: int, left: int, host: int, write: bool) -> int:
        """``host`` if the clusters behind ``guest`` (at ``entry``) continue it for ``left``."""
        size = self.cluster_size
        while left > 0:
            guest += size
            entry += size
            table = self._shortcut(guest >> self.l1_shift, write)
            if table is None:
                return -1
            found = table[guest >> self.cluster_bits & self.l2_mask]
            if found != entry | COPIED and (write or found != entry):
                return -1
            left -= size
        return host

    def map_wide(self, offset: int, length: int, write: bool) -> int:
        """`map_one` of extended L2 entries."""
        raise NotImplementedError

    # -- the general map
    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """Extents of ``ranges``, up to the first L2 table that is not in memory.

        Raises CorruptImage at an entry that breaks the specification; a range before it is answered
        first.
        """
        self.check_read()
        extent_of = self._wide_extent if self.extended else self._extent
        out: list[Extent] = []
        for position, (offset, length) in enumerate(ranges):
            end = offset + length
            while offset < end:
                l1_index = offset >> self.l1_shift
                stop = min(end, (l1_index + 1) << self.l1_shift)
                table_offset = self.l2_offset(l1_index) if l1_index < len(self.l1) else 0
                if not table_offset:
                    out.append(Hole(stop - offset))
                    offset = stop
                    continue
                table = self.l2_table(table_offset)
                if table is None:
                    rest = [(offset, end - offset), *ranges[position + 1 :]]
                    return out, self._misses(rest)
                while offset < stop:
                    try:
                        extent = extent_of(table.data, table_offset, offset, stop)
                    except Exception:
                        if out:
                            return out, None
                        raise
                    out.append(extent)
                    offset += extent.length
        return out, None

    def _misses(self, ranges: Sequence[Range]) -> NeedMeta:
        """The missing L2 tables of ``ranges``."""
        found: dict[int, None] = {}
        for offset, length in ranges:
            last = min((offset + length - 1) >> self.l1_shift, len(self.l1) - 1)
            for l1_index in range(offset >> self.l1_shift, last + 1):
                table_offset = self.l1[l1_index] & OFFSET
                aligned = table_offset and not table_offset & (self.cluster_size - 1)
                if aligned and self.tables.get(SLOT, table_offset) is None:
                    found[table_offset] = None
                if len(found) == _MOST_MISSES:
                    break
        return NeedMeta(SLOT, [(offset, self.cluster_size) for offset in found], L2_LOAD)

    def _extent(self, table: array[int], table_offset: int, guest: int, stop: int) -> Extent:
        """The longest extent from ``guest``, not beyond ``stop`` or the table."""
        size = self.cluster_size
        index = guest >> self.cluster_bits & self.l2_mask
        limit = index + ((stop - 1) >> self.cluster_bits) - (guest >> self.cluster_bits) + 1
        entry = table[index]
        if entry & PACKED:
            return self._packed(entry, table_offset + 8 * index, guest, stop)
        host = self.host_of(entry, table_offset, index)
        nth = index + 1
        if host:
            expected = entry + size
            while nth < limit and table[nth] == expected:
                expected += size
                nth += 1
        else:
            while nth < limit and table[nth] == entry:
                nth += 1
        inside = guest & (size - 1)
        length = min(stop - guest, (nth - index) * size - inside)
        if entry & ZERO_FLAG:
            return Zero(length, True, host + inside if host else -1)
        if host:
            writable = bool(entry & COPIED) and self.ready and table_offset in self._checked
            return Data(SLOT, host + inside, length, writable)
        return Hole(length)

    def _wide_extent(self, table: array[int], table_offset: int, guest: int, stop: int) -> Extent:
        """The same for extended L2 entries."""
        raise NotImplementedError

    def _packed(self, entry: int, place: int, guest: int, stop: int) -> Packed:
        """The compressed cluster that ``guest`` is in; its descriptor stands at ``place``."""
        size = self.cluster_size
        host, length = self.packed_range(entry)
        if host + length > MAX_OFFSET:
            raise CorruptImage(
                f"Compressed cluster at {host:#x} is outside of every file",
                field="L2 entry",
                offset=place,
            )
        inside = guest & (size - 1)
        wanted = size - inside
        if wanted > stop - guest:
            wanted = stop - guest
        return Packed(SLOT, host, length, size, self.codec, wanted, inside)

    def host_of(self, entry: int, table_offset: int, index: int) -> int:
        """Host offset of a standard L2 entry, 0 without one.  Raises CorruptImage."""
        host = entry & OFFSET
        if host & (self.cluster_size - 1):
            raise CorruptImage(
                f"Cluster allocation offset {host:#x} unaligned "
                f"(L2 offset: {table_offset:#x}, L2 index: {index:#x})",
                field="L2 entry",
                offset=table_offset + (index << self.entry_bits),
            )
        if entry & ZERO_FLAG and self.header.version < 3:
            raise CorruptImage(
                "Zero cluster found in an image of version 2 "
                f"(L2 offset: {table_offset:#x}, L2 index: {index:#x})",
                field="L2 entry",
                offset=table_offset + (index << self.entry_bits),
            )
        return host
