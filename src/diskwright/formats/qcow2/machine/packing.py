"""Storing compressed clusters, several of which share host clusters (qcow2 specification,
"Compressed Clusters Descriptor")."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from ....abilities import Codec
from ....contract import OP_PACKED, NeedMeta, Plan, Range, Step, Table
from ....errors import NoSpace
from .core import OFFSET, PACKED, SLOT
from .reserve import State
from .runs import Run
from .zeroing import Zeroing


class PackedState(State):
    """What commit and abort need of a plan of compressed clusters."""

    __slots__ = ("units",)

    def __init__(self) -> None:
        super().__init__()
        self.units: list[Run] = []
        """The host clusters of each, which abort takes a reference from."""


class Packing(Zeroing):
    """Plans of packed data.

    Data follow each other byte by byte; each cluster counts those that touch it.  One that nothing
    refers to any more is freed like any other, so what was placed last is forgotten as soon as a
    reference to its cluster goes.
    """

    packed_end = 0
    """Where the next compressed data may go, inside a cluster that holds others; 0: nowhere."""

    @property
    def pack_codec(self) -> Codec | None:
        """What packs the clusters that are to be stored compressed; None where none can be."""
        return self.codec

    def _plan_packed(self, ranges: Sequence[Range]) -> Plan | NeedMeta | None:
        """None where a cluster is allocated already."""
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        clusters = [offset >> bits for offset, _ in ranges]
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([c >> l2_bits for c in clusters])))
        if miss is not None:
            return miss
        for cluster in clusters:
            table = tables.get(cluster >> l2_bits)
            if table is not None:
                entry = table.data[(cluster & l2_mask) * self.stride]
                if entry & (PACKED | OFFSET):
                    return None
        freed: list[Run] = [self.hosts_of(t.offset) for i in fresh if (t := tables.get(i))]
        shared = self.packed_end >> bits
        needed = [*freed, (shared, shared + 1)] if shared else freed
        if needed and (miss := self.missing_blocks(needed)) is not None:
            return miss
        chosen = self.choose_with(fresh, len(clusters))
        if isinstance(chosen, NeedMeta):
            return chosen
        if max(end for _, end, _ in chosen) << bits > 1 << self.packed_bits:
            raise NoSpace  # the descriptor has too few bits
        supply = [(c, zero) for start, end, zero in chosen for c in range(start, end)]
        # Tables come first, as with plain data, unless data go on in the cluster before these.
        front = [] if self.packed_end else supply[: len(fresh)]
        hosts, used, rest = self._place([length for _, length in ranges], supply[len(front) :])
        for_tables = front or rest[: len(fresh)]

        plan = Plan()
        state = plan.state = PackedState()
        plan.pins = self.take([(c, c + 1, zero) for c, zero in for_tables + used])
        self.install_l2(tables, fresh, for_tables)
        taken = {c for c, _ in used}
        for (guest, length), host in zip(ranges, hosts, strict=True):
            first, last = host >> bits, (host + length - 1) >> bits
            for cluster in range(first, last + 1):
                if cluster in taken:
                    taken.remove(cluster)  # counted once when it was taken
                else:
                    plan.pins.append(self._add(cluster, 1)[0])
            state.units.append((first, last + 1))
            sectors = ((host + length - 1) >> 9) - (host >> 9)
            entry = PACKED | sectors << self.packed_bits | host
            cluster = guest >> bits
            state.entries.append((tables[cluster >> l2_bits], cluster & l2_mask, entry))
            plan.steps.append(Step(OP_PACKED, guest, length, SLOT, host))
        return self._finish(plan, tables, freed)

    def _place(
        self, lengths: Iterable[int], supply: list[tuple[int, bool]]
    ) -> tuple[list[int], list[tuple[int, bool]], list[tuple[int, bool]]]:
        """A host offset for each length, none of which is longer than a cluster; what is used of
        ``supply``, at most a cluster each, and what is left.  Moves ``packed_end``."""
        bits, mask = self.cluster_bits, self.cluster_mask
        most = (1 << self.refcount_bits) - 1
        at = self.packed_end
        count = self._add(at >> bits, 0)[1] if at else 0
        # The cluster behind the one that is filled comes first.
        behind = [i for i, (cluster, _) in enumerate(supply) if at and cluster == (at >> bits) + 1]
        queue = deque(supply)
        if behind:
            queue.rotate(-behind[0])
        hosts: list[int] = []
        used: list[tuple[int, bool]] = []
        for length in lengths:
            first, last = at >> bits, (at + length - 1) >> bits
            more = last > first
            if not at or count >= most or (more and queue[0][0] != last):
                used.append(queue.popleft())
                at, count = used[-1][0] << bits, 0
            elif more:
                used.append(queue.popleft())
                count = 0
            hosts.append(at)
            at += length
            count += 1
            if not at & mask:
                at = 0
        self.packed_end = at
        return hosts, used, sorted(queue)

    def _add(self, cluster: int, change: int) -> tuple[Table, int]:
        """Change a count whose block is in memory; the block, and the new count."""
        ((table, first, stop),) = self.block_spans(cluster, cluster + 1)
        block = self.block(table)
        count = block.get(first) + change
        if change:
            block.set(first, count)
            self.touch_block(table, first, stop)
        return table, count

    def forget_end(self, start: int, end: int) -> None:
        """Clusters [start, end) lose a reference."""
        if start <= self.packed_end >> self.cluster_bits < end:
            self.packed_end = 0

    def _abort_packed(self, state: PackedState) -> None:
        for start, end in state.units:
            self.forget_end(start, end)
            for cluster in range(start, end):
                if self._add(cluster, -1)[1] == 0:
                    self.free.add(cluster, cluster + 1)
        state.units = []
        self._bound_pools()
