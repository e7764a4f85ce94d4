"""Host clusters: finding, taking and giving back (qcow2 specification, "Host cluster
management").

Free clusters below ``cursor`` are known: those in ``clean`` read as zeroes (beyond the old end of
the file, or punched), those in ``free`` hold anything.  Behind the cursor, refcount blocks are
scanned when more is needed, so an open reads none of them.  A refcount block or a larger refcount
table that the search needs is installed empty and never taken back.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable

from ....contract import NeedMeta, Table
from ....errors import CorruptImage, NoSpace
from ....ondisk import zeros
from ....units import align_up
from ..header import MAX_REFTABLE_BYTES
from .core import OFFSET, REFBLOCK_LOAD, SLOT
from .mapping import Mapping
from .refblock import decode, empty
from .runs import Run

# Blocks asked for at once by the search.
_AHEAD = 16
# Runs that one scan takes from a block, and that the pools may hold, before the cursor goes back.
_SCAN_RUNS = 4096
_MOST_RUNS = 1 << 16

Choice = tuple[int, int, bool]  # (start, end, reads as zeroes)


class Allocator(Mapping):
    """The host side of an image."""

    moved_reftable = False
    """The refcount table has a new place that the header does not name yet."""
    reftable_offset = 0
    _tables_at_open: array[int] | None = None

    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Decode a table that was asked for: an L2 table or a refcount block."""
        if offset in self._asked_blocks:
            block = decode(self.refcount_bits, data)
            self.tables.put(slot, offset, block, self.cluster_size)
        else:
            super().load(slot, offset, data)

    def reserve_structures(self) -> None:
        """See :meth:`.overlap.Guard.reserve_structures`: none of it is handed out."""
        self.reftable_offset = self.header.reftable_offset
        self._tables_at_open = None
        super().reserve_structures()

    def use_reftable(self, reftable: array[int], fresh: int) -> None:
        """Take another refcount table, which the header names already; nothing is dirty.  From
        cluster ``fresh`` on the file reads as zeroes and is free."""
        self.reftable = reftable
        self._reftable_parts = set()
        self.free.remove(0, 1 << 62)
        self.clean.remove(0, 1 << 62)
        self.cursor = 0
        self.fresh = max(self.fresh, fresh)
        self.reserve_structures()

    # -- choosing and taking
    def choose(self, count: int) -> list[Choice] | NeedMeta:
        """Runs of ``count`` free clusters in all, with their refcount blocks in memory.

        Takes nothing.  Raises NoSpace.
        """
        while self.free.total + self.clean.total < count:
            miss = self._scan()
            if miss is not None:
                return miss
        zero = not self.free.starts
        pool = self.clean if zero else self.free
        start = pool.starts[0]
        end = start + count
        if end <= pool.ends[0] and start >> self.block_shift == (end - 1) >> self.block_shift:
            offset = self.block_offset(start >> self.block_shift)
            if self.block_table(offset) is None:
                return NeedMeta(SLOT, [(offset, self.cluster_size)], REFBLOCK_LOAD)
            return [(start, end, zero)]
        chosen: list[Choice] = []
        left = count
        for pool, zero in ((self.free, False), (self.clean, True)):
            for start, end in zip(pool.starts, pool.ends, strict=True):
                if not left:
                    break
                end = min(end, start + left)
                chosen.append((start, end, zero))
                left -= end - start
        missing = self.missing_blocks(chosen)
        return chosen if missing is None else missing

    def missing_blocks(self, runs: Iterable[tuple[int, ...]]) -> NeedMeta | None:
        """What must be loaded before the counts of these runs can be changed."""
        shift = self.block_shift
        indexes = {
            index
            for run in runs
            for index in range(run[0] >> shift, ((run[1] - 1) >> shift) + 1)
        }
        missing = []
        for index in indexes:
            offset = self.block_offset(index)
            if not offset:
                raise CorruptImage(
                    f"Clusters are in use that have no refcount block (index {index:#x})",
                    field="refcount table entry",
                    offset=self.header.reftable_offset + 8 * index,
                )
            if self.block_table(offset) is None:
                missing.append((offset, self.cluster_size))
        return NeedMeta(SLOT, missing, REFBLOCK_LOAD) if missing else None

    def take(self, chosen: Iterable[Choice]) -> list[Table]:
        """Count the chosen clusters as used; the refcount blocks that hold the counts."""
        tables = []
        for start, end, zero in chosen:
            (self.clean if zero else self.free).remove(start, end)
            tables += self._count(start, end, 1)
            if end > self.fresh:
                self.fresh = end
        return tables

    def take_region(self, count: int) -> int | NeedMeta:
        """Take ``count`` clusters in one run and return its start.  Raises NoSpace."""
        chosen = self.choose(count)
        if isinstance(chosen, NeedMeta):
            return chosen
        for pool, zero in ((self.free, False), (self.clean, True)):
            for start, end in pool:
                if end - start >= count:
                    run = [(start, start + count, zero)]
                    miss = self.missing_blocks(run)
                    if miss is None:
                        self.take(run)
                    return start if miss is None else miss
        # A run longer than what one block counts is broken by the next block, so the blocks of
        # a long one come behind it.
        index = len(self.reftable)
        while index and not self.reftable[index - 1]:
            index -= 1
        while True:
            start = index << self.block_shift
            blocks = 1
            while count + blocks > blocks << self.block_shift:
                blocks += 1
            if start + count + blocks > self.max_clusters:
                raise NoSpace
            if index + blocks <= len(self.reftable):
                break
            miss = self._grow_reftable()
            if miss is not None:
                return miss
            index = len(self.reftable)
            while index and not self.reftable[index - 1]:
                index -= 1
        self._check_vacant(start, start + count + blocks)
        self._take_behind(index, start, start + count, blocks)
        return start

    def _check_vacant(self, start: int, end: int) -> None:
        """Raise CorruptImage when [start, end) is beyond all counts and yet in use."""
        if self.reserved.outside(start, end) != [(start, end)]:
            raise CorruptImage(
                "A table of the image lies where the refcounts say that nothing is",
                offset=start << self.cluster_bits,
            )

    def _take_behind(self, index: int, start: int, end: int, blocks: int) -> None:
        """Take [start, end), which no block counts yet, with the blocks for it behind it."""
        for i in range(blocks):
            self.install_block(index + i, end + i)
        self._count(start, end + blocks, 1)
        self.fresh = max(self.fresh, end + blocks)

    def give_back(self, start: int, end: int) -> None:
        """Clusters that were taken and that nothing points to; their content is unknown."""
        self._count(start, end, 0)
        self.free.add(start, end)
        self._bound_pools()

    def _count(self, start: int, end: int, value: int) -> list[Table]:
        """Set the counts of [start, end), whose blocks are in memory."""
        tables = []
        for table, first, stop in self.block_spans(start, end):
            self.block(table).fill(first, stop, value)
            self.touch_block(table, first, stop)
            tables.append(table)
        return tables

    def block_spans(self, start: int, end: int) -> list[tuple[Table, int, int]]:
        """[start, end) as (block, first count, stop) in blocks that are in memory."""
        out = []
        while start < end:
            index = start >> self.block_shift
            base = index << self.block_shift
            stop = min(end, base + self.per_block)
            table = self.tables.get(SLOT, self.block_offset(index))
            assert table is not None
            out.append((table, start - base, stop - base))
            start = stop
        return out

    def add_free(self, start: int, end: int, zeroed: bool) -> None:
        """Clusters whose count is zero again.  Behind the cursor the search will find them."""
        end = min(end, self.cursor)
        if start < end:
            (self.clean if zeroed else self.free).add(start, end)
            self._bound_pools()

    def _bound_pools(self) -> None:
        """Keep the pools small: forget the upper half and let the search find it again."""
        if len(self.free) + len(self.clean) <= _MOST_RUNS:
            return
        for pool in (self.free, self.clean):
            if len(pool) > _MOST_RUNS // 4:
                self.cursor = min(self.cursor, pool.cut(_MOST_RUNS // 4))
        for pool in (self.free, self.clean):
            pool.remove(self.cursor, 1 << 62)

    # -- searching
    def _scan(self) -> NeedMeta | None:
        """Search from the cursor to the end of its refcount block."""
        if self.cursor >= self.max_clusters:
            raise NoSpace
        index = self.cursor >> self.block_shift
        base = index << self.block_shift
        if index >= len(self.reftable):
            return self._grow_reftable()
        offset = self.block_offset(index)
        if not offset:
            self._new_block(index)
            return None
        table = self.block_table(offset)
        if table is None:
            ahead = [
                at
                for i in range(index, min(index + _AHEAD, len(self.reftable)))
                if (at := self.block_offset(i)) and self.block_table(at) is None
            ]
            return NeedMeta(SLOT, [(at, self.cluster_size) for at in ahead], REFBLOCK_LOAD)
        block = self.block(table)
        at = self.cursor - base
        for _ in range(_SCAN_RUNS):
            run = block.zero_run(at)
            if run is None:
                at = self.per_block
                break
            at = run[1]
            self._found(base + run[0], base + run[1])
        self.cursor = base + at
        return None

    def _found(self, start: int, end: int) -> None:
        """Counts of zero: into the pools, but for what is in quarantine and for structures that a
        broken image counts as free."""
        end = min(end, self.max_clusters)
        for a, b in self.quarantine.outside(start, end):
            vacant = [
                run for c, d in self.reserved.outside(a, b) for run in self._without_tables(c, d)
            ]
            if vacant != [(a, b)]:
                # Behind the end of the file there is nothing that could be lost.
                self.check_free(vacant, a, min(b, self.fresh))
            for e, f in vacant:
                split = min(max(self.fresh, e), f)
                self.free.add(e, split)
                self.clean.add(split, f)

    def _without_tables(self, start: int, end: int) -> list[Run]:
        """[start, end) without the tables that the image had when the search began: only a broken
        image counts one of them as free."""
        if self._tables_at_open is None:
            clusters = {entry & OFFSET for entry in self.l1}
            clusters.update(self.reftable)
            bits = self.cluster_bits
            self._tables_at_open = array("Q", sorted(entry >> bits for entry in clusters))
        known = self._tables_at_open
        out = []
        i = bisect_left(known, start)
        while i < len(known) and known[i] < end:
            if start < known[i]:
                out.append((start, known[i]))
            start = known[i] + 1
            i += 1
        if start < end:
            out.append((start, end))
        return out

    def _new_block(self, index: int) -> None:
        """Install a refcount block at the second cluster that it counts from the cursor on: the
        first is for what needed it, as QEMU has it."""
        base = index << self.block_shift
        end = min(base + self.per_block, self.max_clusters)
        runs = self.reserved.outside(self.cursor, end)
        vacant = [cluster for run in runs[:2] for cluster in range(*run)[:2]]
        if vacant:
            first, cluster = vacant[0], vacant[min(1, len(vacant) - 1)]
            if self.fresh <= first < cluster:  # behind the end, which now moves
                self.clean.add(first, first + 1)
                self.cursor = cluster
            self.install_block(index, cluster)
            self._count(cluster, cluster + 1, 1)
            return
        if base + self.per_block >= self.max_clusters:
            raise NoSpace
        self.cursor = base + self.per_block

    def install_block(self, index: int, cluster: int) -> None:
        """Put an empty refcount block into ``cluster``."""
        offset = cluster << self.cluster_bits
        table = self.tables.put(
            SLOT, offset, empty(self.refcount_bits, self.cluster_size), self.cluster_size
        )
        self._parts[offset] = set()
        if cluster < self.fresh:
            self.touch_block(table, 0, self.per_block)
        else:
            self.fresh = cluster + 1
        self.set_reftable(index, offset)

    def _grow_reftable(self) -> NeedMeta | None:
        """Move the refcount table to a larger place behind all that it counts.

        The header switches to it once it is durable with its blocks (see `freeze`); the old place
        is freed like any cluster.
        """
        old = len(self.reftable)
        size, bits = self.cluster_size, self.cluster_bits
        old_start = self.reftable_offset >> bits
        old_run: Run = (old_start, old_start + (old * 8 >> bits))
        miss = self.missing_blocks([old_run])
        if miss is not None:
            return miss
        start = old << self.block_shift
        entries = align_up(old + old // 2 + 1, size // 8)
        entries = max(min(entries, MAX_REFTABLE_BYTES // 8), old + size // 8)
        while True:
            clusters = entries * 8 >> bits
            blocks = 1
            while clusters + blocks > blocks << self.block_shift:
                blocks += 1
            if old + blocks <= entries:
                break
            entries += size // 8
        end = start + clusters + blocks
        if entries * 8 > MAX_REFTABLE_BYTES or end > self.max_clusters:
            raise NoSpace
        self._check_vacant(start, end)
        self.reftable.extend(zeros(64, entries - old))
        self._take_behind(old, start, start + clusters, blocks)
        self.free_later(*old_run)
        self.reserved.remove(*old_run)
        self.reserved.add(start, start + clusters)
        self.reftable_offset = start << bits
        self.moved_reftable = True
        return None

    def free_later(self, start: int, end: int) -> None:
        """Clusters that lose a reference at the next freeze; see `settle`."""
        raise NotImplementedError
