"""Zeroes and discards: planning them, and what commit does to the L2 entries."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from ....contract import (
    DISCARD,
    OP_PUNCH,
    WRITE_ZERO,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from .core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from .reserve import Reserver, State
from .runs import Run

# What commit does to a run of L2 entries.
_KEEP_ZERO, _DROP_ZERO, _DROP = range(3)
_HOLES_STAY = 4  # flag beside one of them
_LOW_BYTE = 0 if sys.byteorder == "little" else 7


class Zeroing(Reserver):
    """Plans without data."""

    def _plan_zero(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        old_version = self.header.version < 3
        if old_version and (kind == WRITE_ZERO or self.has_backing):
            return None
        # Version 2 has no zero flag; without a backing file an unallocated cluster is as good.
        holes_stay = old_version or (kind == DISCARD and not self.has_backing)
        keep = kind == WRITE_ZERO or self.keeps
        mode = _DROP if old_version else _KEEP_ZERO if keep else _DROP_ZERO
        spans: list[tuple[int, int, int]] = []  # L1 index, first L2 index, end
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        for offset, length in ranges:
            first = offset >> bits
            end = (offset + length + self.cluster_size - 1) >> bits
            while first < end:
                l1_index = first >> l2_bits
                stop = min(end, (l1_index + 1) << l2_bits)
                if not (holes_stay and not self.l1[l1_index] & OFFSET):
                    spans.append((l1_index, first & l2_mask, ((stop - 1) & l2_mask) + 1))
                first = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([s[0] for s in spans])))
        if miss is not None:
            return miss
        freed: list[Run] = [(t.offset >> bits, (t.offset >> bits) + 1) for i in fresh
                            if (t := tables.get(i))]
        for l1_index, first, stop in spans:
            table = tables.get(l1_index)
            if table is not None:
                self._losing(table, first, stop, mode, freed)
        plan = self.begin_tables(tables, fresh, freed)
        if isinstance(plan, NeedMeta):
            return plan
        state: State = plan.state
        for l1_index, first, stop in spans:
            state.spans.append(
                (tables[l1_index], first, stop, mode | _HOLES_STAY if holes_stay else mode)
            )
        if self.keeps and kind != WRITE_ZERO and self.discards("request"):
            plan.steps = self._punches(tables, spans)
        return self._finish(plan, tables, freed)

    def _punches(
        self, tables: dict[int, Table], spans: Sequence[tuple[int, int, int]]
    ) -> list[Step]:
        """Give back what the clusters hold that stay reserved.  Before their entries change: a
        write that comes after them goes to the same places."""
        steps: list[Step] = []
        for l1_index, first, stop in spans:
            data: array[int] = tables[l1_index].data
            base = l1_index << self.l1_shift
            for index in range(first, stop):
                entry = data[index]
                if not entry & COPIED or entry & PACKED or not entry & OFFSET:
                    continue
                guest, host = base + (index << self.cluster_bits), entry & OFFSET
                last = steps[-1] if steps else None
                if last is not None and last.host + last.length == host:
                    steps[-1] = last._replace(length=last.length + self.cluster_size)
                else:
                    steps.append(Step(OP_PUNCH, guest, self.cluster_size, SLOT, host))
        return steps

    def _losing(
        self, table: Table, first: int, stop: int, mode: int, freed: list[Run]
    ) -> None:
        """Collect the host clusters that entries [first, stop) will let go."""
        data: array[int] = table.data
        bits = self.cluster_bits
        if no_hosts(data[first:stop].tobytes()):
            return
        for index in range(first, stop):
            entry = data[index]
            if not entry:
                continue
            if entry & PACKED:
                freed.append(self.packed_hosts(entry, table.offset, index))
                continue
            host = self.host_of(entry, table.offset, index)
            if host and not (mode == _KEEP_ZERO and entry & COPIED):
                host >>= bits
                if freed and freed[-1][1] == host:
                    freed[-1] = (freed[-1][0], host + 1)
                else:
                    freed.append((host, host + 1))

    def _commit_span(self, table: Table, first: int, stop: int, mode: int) -> None:
        self.freeing = "request"
        try:
            self._change_span(table, first, stop, mode)
        finally:
            self.freeing = "other"

    def _change_span(self, table: Table, first: int, stop: int, mode: int) -> None:
        data: array[int] = table.data
        holes_stay, mode = mode & _HOLES_STAY, mode & ~_HOLES_STAY
        before = data[first:stop].tobytes()
        if no_hosts(before):
            after = before
            if mode == _DROP:
                after = bytes(len(before))
            elif not holes_stay:
                after = array("Q", [ZERO_FLAG]).tobytes() * (stop - first)
            if after != before:
                data[first:stop] = array("Q", after)
                self.touch_l2(table, first, stop)
            return
        low, high = stop, first
        for index in range(first, stop):
            old = data[index]
            if not old and holes_stay:
                continue
            new = 0 if mode == _DROP else ZERO_FLAG
            if old & PACKED:
                self.free_later(*self.hosts_of(old))
            elif old & OFFSET:
                if mode == _KEEP_ZERO and old & COPIED:
                    new = old | ZERO_FLAG
                else:
                    self.free_later(*self.hosts_of(old))
            if new != old:
                data[index] = new
                low = min(low, index)
                high = index + 1
        if low < high:
            self.touch_l2(table, low, high)


def no_hosts(raw: bytes) -> bool:
    """True for L2 entries that are all unallocated or plain zeroes; told without a loop, since a
    discard of a whole disk meets little else."""
    # A host offset may have no other bytes than 0 and 1, too.
    return not raw.strip(b"\0\1") and raw.count(1) == raw[_LOW_BYTE::8].count(1)


