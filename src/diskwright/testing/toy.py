"""A small copy-on-write format with reference counts, made for breaking engines.

Clusters of 256 bytes and tables of 8 entries, so that eviction, sharing and reuse happen within a
few requests.  On disk (all little-endian):

* cluster 0: header ``TOYC``, virtual size (u64), modified flag (u64); at byte 64 the L1 offsets of
  up to four snapshots (u64)
* cluster 1: L1, one u64 an L2 table; cluster 2: directory, one u64 a refcount block
* a refcount block counts 32 clusters (u16), an L2 table maps 8 (u64)

An entry is a cluster's offset with COPIED (its count is one) and ZERO (reads as zeroes; the cluster
stays reserved).  ``modified`` is the `before` group: it is on disk before the first byte moves, and
``withdraw`` takes it back.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ..contract import (
    OP_DATA,
    WRITE,
    WRITE_ZERO,
    Groups,
    HostRange,
    MetaWrite,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
    TableStore,
)
from ..errors import NoSpace
from ..extents import Data, Extent, Hole, Zero
from .toy_procedures import CLUSTER, COPIED, COUNTS, ENTRIES, OFFSET, ToyProcedures

ZERO = 1
_ROOTS = CLUSTER // 8
_TABLE = ENTRIES * 8
_BLOCK = COUNTS * 2


def create_toy(size: int) -> bytes:
    """An empty image of ``size`` bytes (at most 64 KiB)."""
    if not 0 < size <= _ROOTS * ENTRIES * CLUSTER:
        raise ValueError(size)
    head = struct.pack("<4sxxxxQQ", b"TOYC", size, 0).ljust(CLUSTER, b"\0")
    directory = struct.pack("<Q", 3 * CLUSTER).ljust(CLUSTER, b"\0")
    block = struct.pack("<4H", 1, 1, 1, 1).ljust(CLUSTER, b"\0")
    return head + bytes(CLUSTER) + directory + block


class _State:
    """What a plan keeps for commit and abort."""

    __slots__ = ("entries", "taken")

    def __init__(self) -> None:
        self.entries: dict[int, int] = {}
        self.taken: list[int] = []


class Toy(ToyProcedures):
    """The machine.  ``limit``: host clusters at most.  ``xform`` and ``cipher_unit``: encryption
    inside the format (tweaked by host offset)."""

    name: ClassVar[str] = "toy"
    unit = CLUSTER
    tables: TableStore

    def __init__(
        self, limit: int = 1 << 20, xform: tuple[Any, ...] = (), cipher_unit: int = 1
    ) -> None:
        self.limit = limit
        self.xform = xform
        self.cipher_unit = cipher_unit
        self.size = 0
        self.modified = False
        self.ready = False
        self.snapshots = [0] * 4
        self.l1: array[int] = array("Q", bytes(CLUSTER))
        self.directory: array[int] = array("Q", bytes(CLUSTER))
        self.l1_dirty = self.directory_dirty = False
        self.free: set[int] = set()
        self.next = 4
        self.dropped: list[int] = []
        """Clusters that lost a reference since the last freeze."""
        self.owed: dict[int, int] = {}
        """References to take off once the refcount block is in memory."""

    # -- tables
    def l2(self, index: int) -> Table | None:
        """The L2 table of L1 entry ``index`` when it is in memory."""
        return self.tables.get("file", self.l1[index] & OFFSET)

    def block(self, cluster: int) -> Table | None:
        """The refcount block of a cluster when it is in memory."""
        return self.tables.get("file", self.directory[cluster // COUNTS])

    def load(self, slot: str, offset: int, data: bytes) -> None:
        if offset in self.directory:
            table = self.tables.put(slot, offset, array("H", data[:_BLOCK]), _BLOCK)
            index = self.directory.index(offset)
            for cluster in [c for c in self.owed if c // COUNTS == index]:
                for _ in range(self.owed.pop(cluster)):
                    if self.uncount(table, cluster):
                        self.free.add(cluster)
        else:
            self.tables.put(slot, offset, array("Q", data[:_TABLE]), _TABLE)

    def count(self, cluster: int) -> Table:
        """One more reference; the block is in memory."""
        table = self.block(cluster)
        assert table is not None
        table.data[cluster % COUNTS] += 1
        self.tables.mark(table)
        return table

    def uncount(self, table: Table, cluster: int) -> bool:
        """One reference less; True when it was the last."""
        table.data[cluster % COUNTS] -= 1
        self.tables.mark(table)
        if table.data[cluster % COUNTS]:
            return False
        self.tables.drop("file", cluster * CLUSTER)
        return True

    # -- map
    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        out: list[Extent] = []
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                cluster, skip = divmod(offset, CLUSTER)
                part = min(end - offset, CLUSTER - skip)
                at = self.l1[cluster // ENTRIES] & OFFSET
                if not at:
                    out.append(Hole(part))
                else:
                    table = self.tables.get("file", at)
                    if table is None:
                        return out, NeedMeta("file", [(at, _TABLE)], "l2_load")
                    out.append(self._extent(table.data[cluster % ENTRIES], skip, part))
                offset += part
        return out, None

    def _extent(self, entry: int, skip: int, length: int) -> Extent:
        host = entry & OFFSET
        if entry & ZERO:
            return Zero(length, True, host + skip if host else -1)
        if not host:
            return Hole(length)
        return Data("file", host + skip, length, bool(entry & COPIED) and self.ready, self.xform)

    # -- plan
    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        touched = self._touched(ranges)
        missing: set[int] = set()
        copied: dict[int, int] = {}
        for index in {cluster // ENTRIES for cluster in touched}:
            at = self.l1[index] & OFFSET
            if at and self.l2(index) is None:
                missing.add(at)
            elif not self.l1[index] & COPIED:
                copied[index] = at
        if missing:
            return NeedMeta("file", [(at, _TABLE) for at in sorted(missing)], "l2_load")
        entries: dict[int, int] = {}
        for cluster in touched:
            table = self.l2(cluster // ENTRIES) if self.l1[cluster // ENTRIES] & OFFSET else None
            entries[cluster] = table.data[cluster % ENTRIES] if table is not None else 0
        fresh = [c for c, e in entries.items() if kind == WRITE and not self._own(e)]
        found = self._choose(len(copied) + len(fresh))
        if isinstance(found, NeedMeta):
            return found
        # From here on things change.
        plan = Plan()
        plan.state = state = _State()
        hosts = self._take(*found)
        for index, at in copied.items():
            self._own_table(index, at, hosts.pop())
        for cluster, (start, end) in touched.items():
            entry = entries[cluster]
            if kind != WRITE:
                keep = kind == WRITE_ZERO and self._own(entry)
                state.entries[cluster] = entry | ZERO if keep else ZERO
                continue
            base = cluster * CLUSTER
            if cluster in fresh:
                host = hosts.pop()
                state.taken.append(host)
                state.entries[cluster] = host * CLUSTER | COPIED
                start, end = base, base + CLUSTER
            else:
                host = (entry & OFFSET) // CLUSTER
                state.entries[cluster] = entry & ~ZERO
                if entry & ZERO:
                    start, end = base, base + CLUSTER
                start -= start % self.cipher_unit
                end += -end % self.cipher_unit
            at = host * CLUSTER + start - base
            end = min(end, self.size + -self.size % self.cipher_unit)
            plan.steps.append(Step(OP_DATA, start, end - start, "file", at, self.xform))
        for index in {cluster // ENTRIES for cluster in touched}:
            self._pin(plan, self.l2(index))
        for host in state.taken:
            self._pin(plan, self.block(host))
        if not self.ready:
            head = MetaWrite("file", 0, self.head(modified=True), "header_update")
            plan.before = Groups([[head]], "before")
        return plan

    @staticmethod
    def _pin(plan: Plan, table: Table | None) -> None:
        assert table is not None
        if table not in plan.pins:
            plan.pins.append(table)

    @staticmethod
    def _own(entry: int) -> bool:
        return bool(entry & COPIED and entry & OFFSET)

    @staticmethod
    def _touched(ranges: Sequence[Range]) -> dict[int, tuple[int, int]]:
        """By guest cluster the part that is asked for."""
        out: dict[int, tuple[int, int]] = {}
        for offset, length in ranges:
            for cluster in range(offset // CLUSTER, -(-(offset + length) // CLUSTER)):
                start = max(offset, cluster * CLUSTER)
                end = min(offset + length, cluster * CLUSTER + CLUSTER)
                old = out.get(cluster)
                if old is not None:
                    start, end = min(start, old[0]), max(end, old[1])
                out[cluster] = (start, end)
        return out

    def _choose(self, number: int) -> tuple[list[int], dict[int, int], int] | NeedMeta:
        """(clusters, new refcount blocks by index, next cluster), taking nothing."""
        chosen: list[int] = []
        blocks: dict[int, int] = {}
        missing: set[int] = set()
        free = sorted(self.free, reverse=True)
        following = self.next
        while len(chosen) < number:
            if free:
                cluster = free.pop()
            else:
                cluster = following
                following += 1
                if cluster >= self.limit or cluster // COUNTS >= _ROOTS:
                    if self.owed:  # what is owed may come free with its block
                        missing |= {self.directory[c // COUNTS] for c in self.owed}
                        break
                    raise NoSpace
            index = cluster // COUNTS
            if not self.directory[index] and index not in blocks:
                blocks[index] = cluster
                continue
            if self.directory[index] and self.block(cluster) is None:
                missing.add(self.directory[index])
            chosen.append(cluster)
        if missing:
            return NeedMeta("file", [(at, _BLOCK) for at in sorted(missing)], "refblock_load")
        return chosen, blocks, following

    def _take(self, chosen: list[int], blocks: dict[int, int], following: int) -> list[int]:
        self.next = following
        for index, cluster in blocks.items():
            self.free.discard(cluster)
            self.directory[index] = cluster * CLUSTER
            self.directory_dirty = True
            empty = array("H", bytes(_BLOCK))
            empty[cluster % COUNTS] = 1
            self.tables.put("file", cluster * CLUSTER, empty, _BLOCK, dirty=True)
        for cluster in chosen:
            self.free.discard(cluster)
            self.count(cluster)
        return chosen

    def _own_table(self, index: int, old: int, cluster: int) -> None:
        """Give L1 entry ``index`` a table of its own; it stays, whatever becomes of the plan."""
        shared = self.tables.get("file", old) if old else None
        data = array("Q", shared.data) if shared is not None else array("Q", bytes(_TABLE))
        self.tables.put("file", cluster * CLUSTER, data, _TABLE, dirty=True)
        self.l1[index] = cluster * CLUSTER | COPIED
        self.l1_dirty = True
        if old:
            self.dropped.append(old // CLUSTER)

    def commit(self, plan: Plan) -> None:
        for cluster, entry in plan.state.entries.items():
            table = self.l2(cluster // ENTRIES)
            assert table is not None
            old = table.data[cluster % ENTRIES]
            if old == entry:
                continue
            table.data[cluster % ENTRIES] = entry
            self.tables.mark(table)
            if old & OFFSET and old & OFFSET != entry & OFFSET:
                self.dropped.append((old & OFFSET) // CLUSTER)

    def abort(self, plan: Plan) -> None:
        for host in plan.state.taken:
            table = self.block(host)
            assert table is not None
            if self.uncount(table, host):
                self.free.add(host)

    # -- write-back
    def freeze(self) -> Groups:
        counts: list[MetaWrite] = []
        maps: list[MetaWrite] = []
        for table in self.tables.dirty():
            table.dirty = False
            if table.offset in self.directory:
                counts.append(MetaWrite("file", table.offset, table.data.tobytes(), "refblock"))
            else:
                maps.append(MetaWrite("file", table.offset, table.data.tobytes(), "l2_update"))
        groups = []
        if self.directory_dirty:
            groups.append([MetaWrite("file", 2 * CLUSTER, self.directory.tobytes(), "reftable")])
        if maps:
            groups.append(maps)
        if self.l1_dirty:
            groups.append([MetaWrite("file", CLUSTER, self.l1.tobytes(), "l1_update")])
        self.directory_dirty = self.l1_dirty = False
        token, self.dropped = self.dropped, []
        return Groups(groups, token, counts)

    def settle(self, token: Any) -> list[HostRange]:
        if token == "before":
            self.ready = self.modified = True
            return []
        unused = []
        for cluster in token:
            table = self.block(cluster)
            if table is None:
                self.owed[cluster] = self.owed.get(cluster, 0) + 1
            elif self.uncount(table, cluster):
                unused.append(HostRange("file", cluster * CLUSTER, CLUSTER))
        return unused

    def release(self, ranges: Iterable[HostRange], zeroed: bool) -> None:
        self.free.update(part.offset // CLUSTER for part in ranges)
