"""Freeze, settle, release: the order in which metadata reach the disk."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ....contract import Barrier, Groups, HostRange, MetaWrite, Procedure, Table, Write
from ....hints import Any
from ....ondisk import big_endian_bytes
from .. import header as hd
from .core import SLOT
from .refblock import lower
from .reserve import BEFORE
from .runs import Run, RunSet
from .subplanning import Subclusters


class Frozen:
    """Token of a freeze: what loses a reference once its groups are on disk."""

    __slots__ = ("blocks", "old_tables", "runs")

    def __init__(self, runs: list[Run], blocks: list[Table], old_tables: list[int]) -> None:
        self.runs = runs
        self.blocks = blocks
        self.old_tables = old_tables


def _runs_of(parts: set[int]) -> Iterator[Run]:
    ordered = sorted(parts)
    start = None
    for i, part in enumerate(ordered):
        if start is None:
            start = part
        if i + 1 == len(ordered) or ordered[i + 1] != part + 1:
            yield start, part + 1
            start = None


class Writeback(Subclusters):
    """The way to the disk.

    Counts that a freeze carries were only raised, or lowered after the references were gone from
    the disk (by `settle`), so they need no order against the data: a crash between leaves leaks.
    Tables to which nothing on disk points yet need none either.  Both are the `lead`.  Behind its
    barrier: the refcount table (not pointed to by the header: see ``moved_reftable``), then the L2
    and L1 entries that make clusters reachable.  With lazy refcounts the dirty bit stands for the
    refcounts, and their table needs no barrier of its own.
    """

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._freed: list[Run] = []
        self._freed_blocks: dict[int, Table] = {}
        self._old_tables = []
        self._unpunched = RunSet()
        """Of what is freed, what the file below is not told of."""

    def free_later(self, start: int, end: int) -> None:
        """Clusters that lose a reference.  Their refcount blocks are in memory, and pinned until
        `settle` has lowered the counts."""
        self.forget_end(start, end)
        if not self.discards(self.freeing):
            self._unpunched.add(start, end)
        elif self._unpunched.starts:
            self._unpunched.remove(start, end)
        freed = self._freed
        if freed and freed[-1][1] == start:
            freed[-1] = (freed[-1][0], end)
        else:
            freed.append((start, end))
        for index in range(start >> self.block_shift, ((end - 1) >> self.block_shift) + 1):
            if index not in self._freed_blocks:
                table = self.tables.get(SLOT, self.block_offset(index))
                assert table is not None
                table.pins += 1
                self._freed_blocks[index] = table

    def freeze(self) -> Groups:
        """All dirty metadata, in one step."""
        lead: list[MetaWrite] = []
        links: list[MetaWrite] = []
        for table in self.tables.dirty():
            parts = self._parts.pop(table.offset, set())
            table.dirty = False
            if type(table.data) is array:
                new = table.offset in self._new_l2
                self._l2_writes(table, parts, "l2_alloc_write" if new else "l2_update",
                                lead if new else links)
            else:
                self._block_writes(table, parts, lead)
        self._new_l2.clear()
        counts = self._reftable_writes(lead)
        links += self._array_writes(self.l1, self.header.l1_offset, self._l1_parts, "l1_update")
        self._l1_parts = set()
        groups = [counts + links] if self.lazy else [counts, links]
        token = Frozen(self._freed, list(self._freed_blocks.values()), self._old_tables)
        self._freed, self._freed_blocks, self._old_tables = [], {}, []
        return Groups([group for group in groups if group], token, lead)

    def _l2_writes(self, table: Table, parts: set[int], tag: str, out: list[MetaWrite]) -> None:
        shift = self.part_bits
        for start, stop in _runs_of(parts):
            data = big_endian_bytes(table.data, start << shift - 3, stop << shift - 3)
            out.append(MetaWrite(SLOT, table.offset + (start << shift), data, tag))

    def _block_writes(self, table: Table, parts: set[int], out: list[MetaWrite]) -> None:
        shift = self.part_bits
        for start, stop in _runs_of(parts):
            data = self.block(table).encode(start << shift, stop << shift)
            at = table.offset + (start << shift)
            out.append(MetaWrite(SLOT, at, data, "refblock_update_part"))

    def _array_writes(self, values: Any, at: int, parts: set[int], tag: str) -> list[MetaWrite]:
        shift = self.part_bits
        return [
            MetaWrite(
                SLOT,
                at + (start << shift),
                big_endian_bytes(values, start << shift - 3, stop << shift - 3),
                tag,
            )
            for start, stop in _runs_of(parts)
        ]

    def _reftable_writes(self, lead: list[MetaWrite]) -> list[MetaWrite]:
        parts, self._reftable_parts = self._reftable_parts, set()
        if not self.moved_reftable:
            return self._array_writes(
                self.reftable, self.reftable_offset, parts, "refblock_alloc_hookup"
            )
        self.moved_reftable = False
        whole = big_endian_bytes(self.reftable)
        lead.append(MetaWrite(SLOT, self.reftable_offset, whole, "refblock_alloc_write_table"))
        h = self.header
        h.reftable_offset = self.reftable_offset
        h.reftable_clusters = len(whole) >> self.cluster_bits
        switch = h.fields()[hd.REFTABLE_OFFSET : hd.REFTABLE_OFFSET + 12]
        return [MetaWrite(SLOT, hd.REFTABLE_OFFSET, switch, "refblock_alloc_switch_table")]

    # -- after the disk
    def settle(self, token: Any) -> list[HostRange]:
        """Lower the counts of what the frozen groups let go; what reached zero is free."""
        if token == BEFORE:
            self.header.incompatible, self.header.autoclear = self.features_in_use()
            if self.directory is not None:
                self.directory.set_in_use(self.bitmaps)
            self.announced = True
            self.ready = not self.broken
            return []
        assert isinstance(token, Frozen)
        for offset in token.old_tables:
            self.tables.drop(SLOT, offset)
        bits = self.cluster_bits
        out = []
        for start, end in token.runs:
            for a, b in self._lower(start, end):
                self.quarantine.add(a, b)
                at = a
                for c, d in [*self._unpunched.outside(a, b), (b, b)]:
                    if at < c:
                        out.append(HostRange(SLOT, at << bits, c - at << bits, False))
                    if c < d:
                        out.append(HostRange(SLOT, c << bits, d - c << bits))
                    at = d
                self._unpunched.remove(a, b)
        for table in token.blocks:
            table.pins -= 1
        return out

    def _lower(self, start: int, end: int) -> list[Run]:
        """Take one reference from each cluster of [start, end); the runs that have none left."""
        out: list[Run] = []
        for table, first, stop in self.block_spans(start, end):
            for a, b in lower(self.block(table), first, stop):
                a, b = start + a - first, start + b - first
                if out and out[-1][1] == a:
                    out[-1] = (out[-1][0], b)
                else:
                    out.append((a, b))
            self.touch_block(table, first, stop)
            start += stop - first
        return out

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Punched space may be used again."""
        bits = self.cluster_bits
        for part in ranges:
            start, end = part.offset >> bits, (part.offset + part.length) >> bits
            self.quarantine.remove(start, end)
            self.add_free(start, end, zeroed)

    # -- the end of all writing
    def mark_corrupt(self) -> Procedure | None:
        """Refuse all further writes, from now on; the procedure that sets the corrupt bit, which
        runs alone.  None when that has happened before."""
        if self.broken or not self.writable:
            return None
        self.broken = True
        self.ready = False
        return self._mark_corrupt()

    def _mark_corrupt(self) -> Procedure:
        h = self.header
        if h.version > 2:
            h.incompatible |= hd.CORRUPT
            yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
        yield Barrier()

    # -- the clean end
    def close(self) -> Procedure | None:
        """The procedure that stores bitmaps and clears the dirty bit, if this program set it; None
        where there is neither.

        Run when nothing is dirty any more.
        """
        dirty = self.writable and self.lazy and self.header.incompatible & hd.DIRTY
        if not (dirty or (self.writable and len(self.bitmaps)) or self.directory is not None):
            return None
        return self._close(bool(dirty))

    def store_bitmaps(self) -> Procedure:
        """Bring all persistent bitmaps to the disk."""
        raise NotImplementedError

    def _close(self, dirty: bool) -> Procedure:
        yield from self.store_bitmaps()
        if dirty:
            yield from self.withdraw()

    def withdraw(self) -> Procedure:
        """Say that the image is clean: under the whole-image lease, with nothing dirty.  The next
        allocation sets the dirty bit again."""
        self.header.incompatible &= ~hd.DIRTY
        self.reannounce()
        yield Barrier()
        yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, self.header.features())])
        yield Barrier()
