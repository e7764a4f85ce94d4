"""What every kind of plan needs: L2 tables of the image's own, and what must be durable first."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import (
    Groups,
    MetaWrite,
    NeedMeta,
    Plan,
    Table,
)
from ....errors import CorruptImage
from ....ondisk import zeros
from .. import header as hd
from .alloc import Allocator, Choice
from .core import COPIED, L2_LOAD, SLOT, ZERO_FLAG
from .encrypted import Encrypted
from .runs import Run
from .submapping import ALL_ZERO

BEFORE = "before"


class State:
    """What commit and abort need of a plan."""

    __slots__ = ("entries", "masks", "pairs", "reserved", "runs", "spans")

    def __init__(self) -> None:
        self.entries: list[tuple[Table, int, int]] = []
        """(L2 table, index, new entry)"""
        self.runs: list[tuple[Table, int, array[int]]] = []
        """(L2 table, first index, new entries), where the old ones are empty"""
        self.spans: list[tuple[Table, int, int, int]] = []
        """(L2 table, first index, end, what to do)"""
        self.pairs: list[tuple[Table, int, int, int]] = []
        """(L2 table, index, new entry, its bitmap), of extended entries"""
        self.masks: list[tuple[Table, int, int, int, str]] = []
        """(L2 table, first index, end, subclusters, kind) of a plan without data"""
        self.reserved: list[Choice] = []
        """Data clusters to give back on abort."""


class Reserver(Encrypted, Allocator):
    """L2 tables and `before` groups."""

    _old_tables: list[int]

    def _l2_tables(
        self, l1_indexes: Sequence[int]
    ) -> tuple[dict[int, Table], list[int], NeedMeta | None]:
        """The L2 tables in memory by L1 index, the L1 indexes that need one of their own (none
        yet, or shared), and what must be loaded."""
        tables: dict[int, Table] = {}
        fresh: list[int] = []
        missing = []
        for l1_index in l1_indexes:
            offset = self.l2_offset(l1_index)
            if not offset:
                fresh.append(l1_index)
                continue
            table = self.l2_table(offset)
            if table is None:
                missing.append((offset, self.cluster_size))
            else:
                self.check_table(table)
                tables[l1_index] = table
                if not self.l1[l1_index] & COPIED:
                    fresh.append(l1_index)
        return tables, fresh, NeedMeta(SLOT, missing, L2_LOAD) if missing else None

    def choose_with(self, fresh: Sequence[int], data: int = 0) -> list[Choice] | NeedMeta:
        """Host clusters for the L2 tables that are missing and for ``data`` clusters; see
        :meth:`.alloc.Allocator.choose`."""
        count = len(fresh) + data
        try:
            return self.choose(count) if count else []
        except CorruptImage as error:
            if fresh and error.offset == 0:
                error.detail = "Preventing invalid allocation of L2 table at offset 0"
            raise

    def begin_tables(
        self, tables: dict[int, Table], fresh: Sequence[int], freed: Sequence[Run]
    ) -> Plan | NeedMeta:
        """A plan that takes nothing but clusters for the L2 tables that are missing, and gives
        ``freed`` up."""
        if freed and (miss := self.missing_blocks(freed)) is not None:
            return miss
        chosen = self.choose_with(fresh)
        if isinstance(chosen, NeedMeta):
            return chosen
        plan = Plan()
        plan.state = State()
        plan.pins = self.take(chosen)
        self.install_l2(tables, fresh, [(c, z) for a, b, z in chosen for c in range(a, b)])
        return plan

    def install_l2(
        self, tables: dict[int, Table], fresh: Sequence[int], hosts: Sequence[tuple[int, bool]]
    ) -> None:
        """Give each of ``fresh`` an L2 table of its own, empty or a copy of the shared one."""
        for l1_index, (cluster, zero) in zip(fresh, hosts, strict=True):
            old = tables.get(l1_index)
            data = zeros(64, self.cluster_size >> 3) if old is None else old.data[:]
            offset = cluster << self.cluster_bits
            table = self.tables.put(SLOT, offset, data, self.cluster_size)
            self._parts[offset] = set()
            self._new_l2.add(offset)
            self._asked_blocks.discard(offset)
            self._checked.add(offset)
            if old is not None or not zero:
                self.touch_l2(table, 0, self.l2_mask + 1)
            else:
                # It reads as zeroes already, but the file must reach to its end before an L1
                # entry says so.
                self.touch_l2(table, self.l2_mask, self.l2_mask + 1)
            if old is not None:
                shared = old.offset >> self.cluster_bits
                self.free_later(shared, shared + 1)
                self._old_tables.append(old.offset)
            self.set_l1(l1_index, offset | COPIED)
            tables[l1_index] = table

    def empty_entries(self, table: Table, first: int, stop: int, zero: bool) -> None:
        """Make L2 entries [first, stop) unallocated or, with ``zero``, ones that read as zeroes."""
        words = array("Q", [ZERO_FLAG if zero else 0])
        if self.extended:
            words = array("Q", [0, ALL_ZERO if zero else 0])
        table.data[first * self.stride : stop * self.stride] = words * (stop - first)
        self.touch_l2(table, first, stop)

    def drop_l2(self, offset: int) -> None:
        """Forget an L2 table whose L1 entry is gone, with the changes that were made to it."""
        table = self.tables.get(SLOT, offset)
        if table is not None:
            table.dirty = False
        self._parts.pop(offset, None)
        self._new_l2.discard(offset)
        self._old_tables.append(offset)

    def _finish(self, plan: Plan, tables: dict[int, Table], freed: list[Run]) -> Plan:
        plan.pins += tables.values()
        for start, end in freed:
            plan.pins += [span[0] for span in self.block_spans(start, end)]
        if not self.announced:
            plan.before = self.before()
        return plan

    def before(self) -> Groups:
        """The header with the dirty bit (lazy refcounts) and without autoclear bits that this
        version does not keep true."""
        h = self.header
        kept = h.incompatible, h.autoclear
        h.incompatible, h.autoclear = self.features_in_use()
        data = h.features()
        h.incompatible, h.autoclear = kept
        writes = [MetaWrite(SLOT, hd.FEATURES_OFFSET, data)]
        if self.directory is not None:
            writes += self.directory.in_use_writes(self.bitmaps)
        return Groups([writes], BEFORE)

    def reannounce(self) -> None:
        """Find out anew what must be durable before the next change."""
        h = self.header
        incompatible, autoclear = self.features_in_use()
        quiet = self.directory is None or not self.directory.pending(self.bitmaps)
        self.ready = autoclear == h.autoclear and quiet and not self.broken
        self.announced = (incompatible, autoclear) == (h.incompatible, h.autoclear) and quiet

    def features_in_use(self) -> tuple[int, int]:
        """The incompatible and autoclear bits that must be on disk while the map changes."""
        h = self.header
        incompatible = h.incompatible | (hd.DIRTY if self.lazy else 0)
        return incompatible, h.autoclear & (hd.BITMAPS | hd.RAW_DATA_FILE)

