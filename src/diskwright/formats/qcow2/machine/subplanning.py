"""Writing through extended L2 entries: only the subclusters that a write touches are allocated."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import OP_DATA, OP_ZERO, NeedMeta, Plan, Range, Step, Table
from .alloc import Choice
from .core import COPIED, OFFSET, PACKED, SLOT
from .reserve import State
from .runs import Run
from .submapping import ALL, SUBCLUSTERS, runs_of
from .subzeroing import SubZeroing

Pair = tuple[int, int]


class Subclusters(SubZeroing):
    """Plans of writes, and `commit`.

    What of a cluster is not touched stays as it is, but where the cluster gets another place: then
    what is allocated of it moves along.  A subcluster that is touched in part is filled up.
    """

    def _plan_write(self, ranges: Sequence[Range]) -> Plan | NeedMeta:
        if not self.extended:
            return super()._plan_write(ranges)
        plan = self._plan_fresh(ranges)
        return self._plan_subclusters(ranges) if plan is None else plan

    def new_entries(self, host: int, count: int, start: int, end: int) -> array[int]:
        entries = super().new_entries(host, count, start, end)
        if not self.extended:
            return entries
        bits, size = self.cluster_bits, self.cluster_size
        pairs = array("Q", bytes(16 * count))
        pairs[::2] = entries
        pairs[1::2] = array("Q", [ALL]) * count
        if start > 0:
            pairs[1] &= self.covering(start, size)
        if end < count << bits:
            pairs[-1] &= self.covering(0, end - (count - 1 << bits))
        return pairs

    def _plan_subclusters(self, ranges: Sequence[Range]) -> Plan | NeedMeta:
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        want: dict[int, list[Range]] = {}  # guest cluster: what is written, as (first byte, end)
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                cluster = offset >> bits
                stop = min(end, (cluster + 1) << bits)
                want.setdefault(cluster, []).append((offset, stop))
                offset = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([c >> l2_bits for c in want])))
        if miss is not None:
            return miss
        pairs: list[Pair] = []
        needed = 0
        freed: list[Run] = [(t.offset >> bits, (t.offset >> bits) + 1) for i in fresh
                            if (t := tables.get(i))]
        for cluster in want:
            table = tables.get(cluster >> l2_bits)
            pair = (0, 0)
            if table is not None:
                index = cluster & l2_mask
                pair = self.pair(table.data, table.offset, index, cluster << bits)
                if pair[0] == PACKED:
                    freed.append(self.packed_hosts(table.data[2 * index], table.offset, index))
                elif pair[0] and not pair[0] & COPIED:
                    freed.append((pair[0] >> bits, (pair[0] >> bits) + 1))
            pairs.append(pair)
            needed += not pair[0] & COPIED
        if freed and (miss := self.missing_blocks(freed)) is not None:
            return miss
        chosen = self.choose_with(fresh, needed)
        if isinstance(chosen, NeedMeta):
            return chosen
        return self._reserve_pairs(want, pairs, tables, fresh, chosen, freed)

    def _reserve_pairs(
        self,
        want: dict[int, list[Range]],
        pairs: list[Pair],
        tables: dict[int, Table],
        fresh: list[int],
        chosen: list[Choice],
        freed: list[Run],
    ) -> Plan:
        """All that is needed is in memory: from here on it changes."""
        plan, state, supply = self.begin(tables, fresh, chosen)
        steps: list[list[int]] = []  # guest, length, host
        tails: list[Step] = []
        taken = 0
        for (cluster, parts), (entry, bitmap) in zip(want.items(), pairs, strict=True):
            base = cluster << self.cluster_bits
            if entry & COPIED:
                host = entry & OFFSET
                moved, exact, zero = 0, bitmap & ALL, False
            else:
                number, zero = supply[taken]
                taken += 1
                host = number << self.cluster_bits
                moved, exact = self._moving(base, entry, bitmap, zero)
            touched, spans = self._spans(base, parts, moved, exact)
            allocated = touched | moved | (bitmap & ALL if entry & COPIED else 0)
            new = host | COPIED, bitmap >> SUBCLUSTERS & ~allocated
            new = new[0], new[1] << SUBCLUSTERS | allocated
            if new != (entry, bitmap):
                place = tables[cluster >> self.l2_bits], cluster & self.l2_mask
                state.pairs.append((*place, *new))
            end = self._end_of(base)
            for start, stop in spans:
                at = host + start - base
                if stop > end:
                    if not zero:
                        # A larger disk would show what is there.
                        tails.append(Step(OP_ZERO, end, stop - end, SLOT, host + end - base))
                    stop = end
                if steps and sum(steps[-1][:2]) == start and sum(steps[-1][1:]) == at:
                    steps[-1][1] += stop - start
                else:
                    steps.append([start, stop - start, at])
        plan.steps = [Step(OP_DATA, g, n, SLOT, h) for g, n, h in steps]
        plan.steps += tails
        return self._finish(plan, tables if state.pairs else {}, freed)

    def _moving(self, base: int, entry: int, bitmap: int, zero: bool) -> Pair:
        """Of the cluster at ``base``, which gets a new place, that reads as zeroes if ``zero``: the
        subclusters that move along, and those of which no more must be written than is asked."""
        moved = 0
        if entry:
            moved = bitmap & ALL & self.covering(0, self._end_of(base) - base)
        if not zero:
            return moved, 0
        if self.has_backing:
            return moved, bitmap >> SUBCLUSTERS & ~moved
        return moved, ALL & ~moved

    def _end_of(self, base: int) -> int:
        """Where the cluster at ``base`` ends, or the disk in it; clusters behind the disk are VM
        state."""
        end = base + self.cluster_size
        return self.size if base < self.size < end else end

    def _spans(
        self, base: int, parts: list[Range], moved: int, exact: int
    ) -> tuple[int, list[Range]]:
        """The subclusters that ``parts`` of the cluster at ``base`` touch; and what is to be
        written, as (first byte, end) in order: subclusters that are not ``exact`` as a whole, also
        behind the end of the disk."""
        bits = self.sub_bits
        touched = 0
        found: list[Range] = []
        for start, stop in parts:
            touched |= self.covering(start - base, stop - base)
            if not exact >> (start - base >> bits) & 1:
                start &= -self.zero_unit
            if not exact >> (stop - 1 - base >> bits) & 1:
                stop += -stop % self.zero_unit
            found.append((start, stop))
        found += [
            (base + (first << bits), base + (end << bits))
            for first, end in runs_of(moved & ~touched)
        ]
        if len(found) < 2:
            return touched, found
        found.sort()
        out = [found[0]]
        for start, stop in found[1:]:
            if start <= out[-1][1]:
                out[-1] = out[-1][0], max(out[-1][1], stop)
            else:
                out.append((start, stop))
        return touched, out

    def _plan_packed(self, ranges: Sequence[Range]) -> Plan | NeedMeta | None:
        plan = super()._plan_packed(ranges)
        if self.extended and isinstance(plan, Plan):
            state: State = plan.state
            state.pairs = [(table, index, entry, 0) for table, index, entry in state.entries]
            state.entries = []
        return plan

    def space_alone(self, plan: Plan) -> None:
        """Let ``plan`` give its clusters host space, and allocate none of their subclusters."""
        state: State = plan.state
        state.pairs = [
            (table, index, entry, table.data[2 * index + 1])
            for table, index, entry, _ in state.pairs
        ]
        for _, _, entries in state.runs:
            entries[1::2] = array("Q", bytes(4 * len(entries)))

    def commit(self, plan: Plan) -> None:
        super().commit(plan)
        state: State = plan.state
        for table, index, new, bitmap in state.pairs:
            old = table.data[2 * index]
            table.data[2 * index], table.data[2 * index + 1] = new, bitmap
            self.touch_l2(table, index, index + 1)
            if self.external:
                continue
            if old & PACKED or (old & OFFSET and (old ^ new) & OFFSET):
                self.free_later(*self.hosts_of(old))
        for table, first, stop, mask, kind in state.masks:
            self._commit_mask(table, first, stop, mask, kind)
