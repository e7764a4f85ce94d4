"""Zeroes and discards of extended L2 entries: subclusters that read as zeroes."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

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
from ....units import align_up
from .bulk import Bulk
from .core import COPIED, OFFSET, PACKED
from .reserve import State
from .runs import Run
from .submapping import ALL, ALL_ZERO, SUBCLUSTERS, runs_of

Part = tuple[int, int, int]  # first guest cluster, end, subclusters of each
Span = tuple[int, int, int, int]  # L1 index, first L2 index, end, subclusters of each


class SubZeroing(Bulk):
    """Plans without data.

    A part of a compressed cluster cannot be told apart from the rest: it keeps its bytes when it is
    discarded, and is zeroed as data.
    """

    def _plan_zero(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        if not self.extended:
            return super()._plan_zero(ranges, kind)
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        if kind == DISCARD and not self.has_backing:
            kind = _KEEP_HOLES
        spans: list[Span] = []
        for offset, length in ranges:
            for first, end, mask in self._clusters(offset, offset + length):
                while first < end:
                    l1_index = first >> l2_bits
                    stop = min(end, (l1_index + 1) << l2_bits)
                    if kind != _KEEP_HOLES or self.l1[l1_index] & OFFSET:
                        spans.append((l1_index, first & l2_mask, ((stop - 1) & l2_mask) + 1, mask))
                    first = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([s[0] for s in spans])))
        if miss is not None:
            return miss
        freed: list[Run] = [(t.offset >> bits, (t.offset >> bits) + 1) for i in fresh
                            if (t := tables.get(i))]
        for l1_index, first, stop, mask in spans:
            table = tables.get(l1_index)
            if table is None:
                continue
            base = l1_index << self.l1_shift
            if not self._may_lose(table, base, first, stop, mask, kind, freed):
                return None
        plan = self.begin_tables(tables, fresh, freed)
        if isinstance(plan, NeedMeta):
            return plan
        state: State = plan.state
        for l1_index, first, stop, mask in spans:
            state.masks.append((tables[l1_index], first, stop, mask, kind))
        plan.steps = self.given_up(tables, spans, ranges, kind)
        return self._finish(plan, tables, freed)

    def _clusters(self, start: int, end: int) -> Iterator[Part]:
        """Bytes [start, end) as clusters; what ends with the disk ends with its cluster."""
        bits, size = self.cluster_bits, self.cluster_size
        end = align_up(end, size if end >= self.size else self.zero_unit)
        first, stop = start >> bits, end >> bits
        if first == stop:
            yield first, first + 1, self.covering(start & size - 1, end & size - 1)
            return
        if start & size - 1:
            yield first, first + 1, self.covering(start & size - 1, size)
            first += 1
        if first < stop:
            yield first, stop, ALL
        if end & size - 1:
            yield stop, stop + 1, self.covering(0, end & size - 1)

    def given_up(
        self, tables: dict[int, Table], spans: Sequence[Span], ranges: Sequence[Range], kind: str
    ) -> list[Step]:
        """Steps that give back what clusters hold that stay reserved.  Before their entries change:
        a write that comes after them goes to the same places."""
        if self.keeps and kind != WRITE_ZERO and self.discards("request"):
            return list(self.punches(tables, spans))
        return []

    def punches(self, tables: dict[int, Table], spans: Sequence[Span]) -> Iterator[Step]:
        """The places of these subclusters, where they are nobody else's, in runs."""
        bits = self.sub_bits
        last: Step | None = None
        for l1_index, first, stop, mask in spans:
            words: array[int] = tables[l1_index].data
            if not _stored(words, first, stop):
                continue
            for index in range(first, stop):
                entry, bitmap = words[2 * index], words[2 * index + 1]
                if entry & PACKED or not entry & COPIED or not self.placed(entry):
                    continue
                base = (l1_index << self.l1_shift) + (index << self.cluster_bits)
                for low, high in runs_of(mask if mask == ALL else mask & bitmap):
                    guest, host = base + (low << bits), (entry & OFFSET) + (low << bits)
                    length = high - low << bits
                    step = Step(OP_PUNCH, guest, length, self.data_slot, host)
                    if last is None:
                        last = step
                    elif (last.guest + last.length, last.host + last.length) == (guest, host):
                        last = last._replace(length=last.length + length)
                    else:
                        yield last
                        last = step
        if last is not None:
            yield last

    def _may_lose(
        self,
        table: Table,
        base: int,
        first: int,
        stop: int,
        mask: int,
        kind: str,
        freed: list[Run],
    ) -> bool:
        """Collect the host clusters that entries [first, stop) of the table for the guest's
        ``base`` will let go.  False where that would take a part of compressed data."""
        words: array[int] = table.data
        if not _stored(words, first, stop):
            return True
        bits = self.cluster_bits
        for index in range(first, stop):
            if words[2 * index] & PACKED and not self.external:
                if mask == ALL:
                    freed.append(self.packed_hosts(words[2 * index], table.offset, index))
                elif kind not in (DISCARD, _KEEP_HOLES):
                    return False
                continue
            guest = base + (index << bits)
            if mask == ALL:  # whatever its bitmap says
                entry, bitmap = words[2 * index], 0
                self.place_of(entry, guest, table.offset, index)
                entry &= OFFSET | COPIED
            else:
                entry, bitmap = self.pair(words, table.offset, index, guest)
            host = (entry & OFFSET) >> bits
            if host and not self.external and not self._zeroed(entry, bitmap, mask, kind)[0]:
                if freed and freed[-1][1] == host:
                    freed[-1] = (freed[-1][0], host + 1)
                else:
                    freed.append((host, host + 1))
        return True

    def _commit_mask(self, table: Table, first: int, stop: int, mask: int, kind: str) -> None:
        self.freeing = "request"
        try:
            self._change_mask(table, first, stop, mask, kind)
        finally:
            self.freeing = "other"

    def _change_mask(self, table: Table, first: int, stop: int, mask: int, kind: str) -> None:
        words: array[int] = table.data
        if mask == ALL and not _stored(words, first, stop):
            if kind != _KEEP_HOLES:
                self.empty_entries(table, first, stop, True)
            return
        low, high = stop, first
        for index in range(first, stop):
            entry, bitmap = words[2 * index], words[2 * index + 1]
            if entry & PACKED and mask != ALL:
                continue
            new = self._zeroed(entry & (OFFSET | COPIED), bitmap, mask, kind)
            if entry & PACKED:
                new = 0, ALL_ZERO
            if not new[0] and entry & (PACKED | OFFSET) and not self.external:
                self.free_later(*self.hosts_of(entry))
            if new != (entry, bitmap):
                words[2 * index], words[2 * index + 1] = new
                low = min(low, index)
                high = index + 1
        if low < high:
            self.touch_l2(table, low, high)


    def _zeroed(self, entry: int, bitmap: int, mask: int, kind: str) -> tuple[int, int]:
        """A standard entry and its bitmap once the subclusters of ``mask`` read as zeroes."""
        placed = self.placed(entry)
        allocated = bitmap & ALL & ~mask
        if kind == _KEEP_HOLES and not (placed and mask == ALL):
            mask &= bitmap
        zero = bitmap >> SUBCLUSTERS | mask
        keep = kind == WRITE_ZERO or self.keeps
        kept = placed and (allocated or (keep and entry & COPIED))
        return (entry if kept else 0), zero << SUBCLUSTERS | allocated


# Of a discard: what is not stored stays as it is.
_KEEP_HOLES = "discard, holes stay"


def _stored(words: array[int], first: int, stop: int) -> bool:
    """Some of these entries refer to host clusters; told without a loop, since a discard of a whole
    disk meets few."""
    return bool(words[2 * first : 2 * stop : 2].tobytes().strip(b"\0"))
