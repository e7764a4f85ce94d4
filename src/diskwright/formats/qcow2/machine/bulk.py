"""Writes of many clusters of which the image holds none: entries are looked at and set by runs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import OP_DATA, NeedMeta, Plan, Range, Step
from .alloc import Choice
from .core import COPIED, SLOT
from .planning import Planner
from .reserve import State

_LEAST = 2
"""Clusters of a batch, and one a range, below which it costs more than it saves."""


class Bulk(Planner):
    """`plan` and `commit` of long writes."""

    def _plan_write(self, ranges: Sequence[Range]) -> Plan | NeedMeta:
        plan = self._plan_fresh(ranges)
        return super()._plan_write(ranges) if plan is None else plan

    def _plan_fresh(self, ranges: Sequence[Range]) -> Plan | NeedMeta | None:
        """None (and nothing has changed) where clusters must be looked at one by one: what they
        hold must be kept, or more than one range is in one of them."""
        least = max(_LEAST, len(ranges)) << self.cluster_bits
        if sum([length for _, length in ranges]) < least:
            return None
        spans = self._apart(ranges)
        if spans is None:
            return None
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        pieces: list[tuple[int, int, int]] = []  # L1 index, first L2 index, end
        needed = 0
        for start, end in spans:
            cluster, last = start >> bits, ((end - 1) >> bits) + 1
            needed += last - cluster
            while cluster < last:
                l1_index = cluster >> l2_bits
                stop = min(last, (l1_index + 1) << l2_bits)
                first = cluster & l2_mask
                pieces.append((l1_index, first, first + stop - cluster))
                cluster = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([p[0] for p in pieces])))
        if miss is not None:
            return miss
        if any(index in tables for index in fresh):
            return None  # a shared table
        for l1_index, first, stop in pieces:
            table = tables.get(l1_index)
            if table is not None and any(table.data[first * self.stride : stop * self.stride]):
                return None
        chosen = self.choose_with(fresh, needed)
        if isinstance(chosen, NeedMeta):
            return chosen
        if self.has_backing or not all(zero for _, _, zero in chosen):
            mask = self.zero_unit - 1
            if any((start | end) & mask for start, end in spans):
                return None  # what is around must be filled up
        plan = Plan()
        state = plan.state = State()
        plan.pins = self.take(chosen)
        hosts, state.reserved = _split(chosen, len(fresh))
        self.install_l2(tables, fresh, hosts)
        supply = iter(state.reserved)
        at = free_end = 0
        for start, end in spans:
            cluster, last = start >> bits, ((end - 1) >> bits) + 1
            while cluster < last:
                if at == free_end:
                    at, free_end, _ = next(supply)
                l1_index = cluster >> l2_bits
                stop = min(last, cluster + free_end - at, (l1_index + 1) << l2_bits)
                count = stop - cluster
                host = at << bits
                entries = self.new_entries(host, count, start - (cluster << bits),
                                           end - (cluster << bits))
                state.runs.append((tables[l1_index], cluster & l2_mask, entries))
                guest = max(start, cluster << bits)
                length = min(end, stop << bits) - guest
                _append(plan.steps, guest, length, host + guest - (cluster << bits))
                cluster = stop
                at += count
        return self._finish(plan, tables, [])

    def new_entries(self, host: int, count: int, start: int, end: int) -> array[int]:
        """Entries of ``count`` clusters from ``host``, of which the bytes [start, end) are written
        (what of that is outside of them does not matter)."""
        return array(
            "Q",
            range(host | COPIED, host + (count << self.cluster_bits) | COPIED, self.cluster_size),
        )

    def _apart(self, ranges: Sequence[Range]) -> list[tuple[int, int]] | None:
        """The ranges as (start, end), joined where they continue each other; None where two are in
        one cluster, or not in order."""
        bits = self.cluster_bits
        spans: list[tuple[int, int]] = []
        end = -1
        for offset, length in ranges:
            if offset == end:
                spans[-1] = (spans[-1][0], offset + length)
            elif end >= 0 and offset >> bits <= (end - 1) >> bits:
                return None
            else:
                spans.append((offset, offset + length))
            end = offset + length
        return spans

    def commit(self, plan: Plan) -> None:
        super().commit(plan)
        state: State = plan.state
        for table, first, entries in state.runs:
            at = first * self.stride
            table.data[at : at + len(entries)] = entries
            self.touch_l2(table, first, first + len(entries) // self.stride)


def _split(chosen: Sequence[Choice], count: int) -> tuple[list[tuple[int, bool]], list[Choice]]:
    """The first ``count`` clusters, one by one, and the rest as runs."""
    hosts: list[tuple[int, bool]] = []
    rest: list[Choice] = []
    for start, end, zero in chosen:
        stop = min(end, start + count - len(hosts))
        hosts += [(cluster, zero) for cluster in range(start, stop)]
        if stop < end:
            rest.append((stop, end, zero))
    return hosts, rest


def _append(steps: list[Step], guest: int, length: int, host: int) -> None:
    """Add a step; one that continues the last one becomes a part of it."""
    if steps:
        last = steps[-1]
        if last.guest + last.length == guest and last.host + last.length == host:
            steps[-1] = last._replace(length=last.length + length)
            return
    steps.append(Step(OP_DATA, guest, length, SLOT, host))
