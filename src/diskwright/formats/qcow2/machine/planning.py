"""Reserve, commit, abort: how a write, a zero or a discard changes the map."""

from __future__ import annotations

from collections.abc import Sequence

from ....contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_PACKED,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from .alloc import Choice
from .core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from .packing import PackedState, Packing
from .reserve import State
from .runs import Run


class Planner(Packing):
    """`plan`, `commit` and `abort`."""

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract.

        Raises NoSpace; UnsupportedFeature by name for images whose data this version does not
        write; CorruptImage.  Nothing has changed then.
        """
        self.check_write()
        if kind == WRITE:
            return self._plan_write(ranges)
        if kind == WRITE_PACKED:
            return self._plan_packed(ranges)
        return self._plan_zero(ranges, kind)

    # -- writing
    def _plan_write(self, ranges: Sequence[Range]) -> Plan | NeedMeta:
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        want: dict[int, Range] = {}  # guest cluster: (first byte, end)
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                cluster = offset >> bits
                stop = min(end, (cluster + 1) << bits)
                known = want.get(cluster)
                if known is None:
                    want[cluster] = (offset, stop)
                else:
                    want[cluster] = (min(known[0], offset), max(known[1], stop))
                offset = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([c >> l2_bits for c in want])))
        if miss is not None:
            return miss
        entries: list[int] = []
        needed = 0
        freed: list[Run] = [(t.offset >> bits, (t.offset >> bits) + 1) for i in fresh
                            if (t := tables.get(i))]
        for cluster in want:
            l1_index = cluster >> l2_bits
            table = tables.get(l1_index)
            entry = 0
            if table is not None:
                index = cluster & l2_mask
                entry = table.data[index]
                if entry & PACKED:
                    freed.append(self.packed_hosts(entry, table.offset, index))
                    entry = PACKED
                elif entry:
                    host = self.host_of(entry, table.offset, index)
                    if not host:
                        entry &= ZERO_FLAG
                    elif not entry & COPIED:
                        freed.append((host >> bits, (host >> bits) + 1))
            entries.append(entry)
            if not entry & COPIED:
                needed += 1
        if freed and (miss := self.missing_blocks(freed)) is not None:
            return miss
        chosen = self.choose_with(fresh, needed)
        if isinstance(chosen, NeedMeta):
            return chosen
        return self._reserve_write(want, entries, tables, fresh, chosen, freed)

    def begin(
        self, tables: dict[int, Table], fresh: list[int], chosen: list[Choice]
    ) -> tuple[Plan, State, list[tuple[int, bool]]]:
        """A plan that holds what was chosen: the missing L2 tables are installed in the first
        clusters, the others (number, whether it reads as zeroes) are for data."""
        plan = Plan()
        state = plan.state = State()
        plan.pins = self.take(chosen)
        supply = [(c, zero) for start, end, zero in chosen for c in range(start, end)]
        if fresh:
            self.install_l2(tables, fresh, supply[: len(fresh)])
            del supply[: len(fresh)]
        state.reserved = as_runs(supply)
        return plan, state, supply

    def _reserve_write(
        self,
        want: dict[int, Range],
        entries: list[int],
        tables: dict[int, Table],
        fresh: list[int],
        chosen: list[Choice],
        freed: list[Run],
    ) -> Plan:
        """All that is needed is in memory: from here on it changes."""
        plan, state, supply = self.begin(tables, fresh, chosen)
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        steps: list[list[int]] = []  # guest, length, host
        tails: list[Step] = []
        guest_end = host_end = -1
        taken = 0
        changes = state.entries
        for (cluster, (start, stop)), entry in zip(want.items(), entries, strict=True):
            base = cluster << bits
            if entry & COPIED:
                host = entry & OFFSET
                if entry & ZERO_FLAG:
                    # What the host cluster of a preallocated zero holds is unknown.
                    changes.append((tables[cluster >> l2_bits], cluster & l2_mask, host | COPIED))
                    start, stop = self._whole(base, host, tails)
            else:
                number, zero = supply[taken]
                taken += 1
                host = number << bits
                changes.append((tables[cluster >> l2_bits], cluster & l2_mask, host | COPIED))
                reads_zero = not self.has_backing if not entry else entry == ZERO_FLAG
                if not (zero and reads_zero):
                    start, stop = self._whole(base, host, [] if zero else tails)
            host += start - base
            if start == guest_end and host == host_end:
                steps[-1][1] += stop - start
            else:
                steps.append([start, stop - start, host])
            guest_end = stop
            host_end = host + stop - start
        plan.steps = [Step(OP_DATA, g, n, SLOT, h) for g, n, h in steps]
        plan.steps += tails
        return self._finish(plan, tables if changes else {}, freed)

    def _whole(self, base: int, host: int, tails: list[Step]) -> Range:
        """The whole cluster as far as the disk goes; host bytes behind its end become zero, since
        a larger disk would show them.  Whole clusters behind the end are VM state."""
        end = base + self.cluster_size
        if base < self.size < end:
            tails.append(
                Step(OP_ZERO, self.size, end - self.size, SLOT, host + self.size - base)
            )
            end = self.size
        return base, end

    # -- the end of a plan
    def commit(self, plan: Plan) -> None:
        """Point to the data."""
        state: State = plan.state
        for table, index, new in state.entries:
            old = table.data[index]
            table.data[index] = new
            self.touch_l2(table, index, index + 1)
            if old & PACKED or (old & OFFSET and (old ^ new) & OFFSET):
                self.free_later(*self.hosts_of(old))
        for table, first, stop, mode in state.spans:
            self._commit_span(table, first, stop, mode)

    def abort(self, plan: Plan) -> None:
        """Give the data clusters back; L2 tables that were installed stay."""
        state: State = plan.state
        for start, end, _ in state.reserved:
            self.give_back(start, end)
        state.reserved = []
        if isinstance(state, PackedState):
            self._abort_packed(state)


def as_runs(supply: list[tuple[int, bool]]) -> list[Choice]:
    """Clusters one by one, joined where they follow each other."""
    out: list[Choice] = []
    for cluster, zero in supply:
        if out and out[-1][1] == cluster:
            out[-1] = (out[-1][0], cluster + 1, zero)
        else:
            out.append((cluster, cluster + 1, zero))
    return out
