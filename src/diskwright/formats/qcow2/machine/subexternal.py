"""Extended L2 entries of an image with a data file: each subcluster is in that file at its guest
offset, and the bitmap alone says which of them count."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_PACKED,
    WRITE_ZERO,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from .core import COPIED, DATA_SLOT
from .externalplanning import ExternalPlanner, joined, merged
from .reserve import State
from .runs import Run
from .submapping import ALL, SUBCLUSTERS
from .subzeroing import Span

Pair = tuple[int, int]


class SubExternal(ExternalPlanner):
    """Plans of images with both; other images pass through."""

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract."""
        if not (self.external and self.extended) or kind in (WRITE, WRITE_PACKED):
            return super().plan(ranges, kind)
        self.check_write()
        return self._plan_zero(ranges, kind)

    def given_up(
        self, tables: dict[int, Table], spans: Sequence[Span], ranges: Sequence[Range], kind: str
    ) -> list[Step]:
        """See :meth:`.subzeroing.SubZeroing.given_up`; a raw data file has the zeroes itself."""
        if not self.external:
            return super().given_up(tables, spans, ranges, kind)
        if self.raw_data:
            return [
                Step(OP_ZERO, low, min(high, self.size) - low, DATA_SLOT, low)
                for low, high in joined(ranges)
            ]
        if kind == WRITE_ZERO or not self.discards("request"):
            return []
        size = self.size
        return [
            step if step.guest + step.length <= size else step._replace(length=size - step.guest)
            for step in self.punches(tables, spans)
            if step.guest < size
        ]

    def _whole_pairs(self, l1_index: int, first: int, stop: int) -> array[int]:
        """The entries of clusters all of whose subclusters are stored."""
        pairs = array("Q", [ALL]) * (2 * (stop - first))
        pairs[::2] = self._stored(l1_index, first, stop)
        return pairs

    def _check_entries(self, table: Table, l1_index: int, first: int, stop: int) -> None:
        if not self.extended:
            super()._check_entries(table, l1_index, first, stop)
            return
        words: array[int] = table.data
        old = words[2 * first : 2 * stop]
        if not any(old) or old == self._whole_pairs(l1_index, first, stop):
            return
        base = l1_index << self.l1_shift
        for index in range(first, stop):
            self.pair(words, table.offset, index, base + (index << self.cluster_bits))

    def _write_steps(
        self, spans: list[Run], tables: dict[int, Table], state: State
    ) -> list[Step]:
        """Subclusters that are stored are written as it was asked, any other as a whole: what its
        place holds is unknown."""
        if not self.extended:
            return super()._write_steps(spans, tables, state)
        wanted: list[Run] = []
        parts: dict[int, Pair] = {}  # guest cluster: its entry, as it will be
        for start, end in spans:
            for l1_index, first, stop in self._pieces(start, end):
                base = l1_index << self.l1_shift
                low = max(start, base + (first << self.cluster_bits))
                high = min(end, base + (stop << self.cluster_bits))
                # What begins or ends within a cluster, which other spans may touch as well.
                inner = first + bool(low & self.cluster_mask)
                outer = stop - bool(high & self.cluster_mask)
                if inner < outer:
                    old = tables[l1_index].data[2 * inner : 2 * outer]
                    whole = self._whole_pairs(l1_index, inner, outer)
                    if not any(old):
                        state.runs.append((tables[l1_index], inner, whole))
                    elif old != whole:
                        for index in range(inner, outer):
                            at = 2 * (index - inner)
                            state.pairs.append((tables[l1_index], index, whole[at], ALL))
                    wanted.append((base + (inner << self.cluster_bits),
                                   base + (outer << self.cluster_bits)))
                for index in sorted({first, stop - 1}):
                    if not inner <= index < outer:
                        wanted.append(self._write_part(tables, parts, l1_index, index, low, high))
        for cluster, pair in parts.items():
            table, index = tables[cluster >> self.l2_bits], cluster & self.l2_mask
            if (table.data[2 * index], table.data[2 * index + 1]) != pair:
                state.pairs.append((table, index, *pair))
        wanted.sort()
        steps: list[Step] = []
        for low, high in merged(wanted):
            stop = min(high, self.size)
            steps.append(Step(OP_DATA, low, stop - low, DATA_SLOT, low))
        return steps

    def _write_part(
        self,
        tables: dict[int, Table],
        parts: dict[int, Pair],
        l1_index: int,
        index: int,
        low: int,
        high: int,
    ) -> Run:
        """Write of one cluster what [low, high) has of it; returns what is to be written."""
        base = (l1_index << self.l1_shift) + (index << self.cluster_bits)
        cluster = base >> self.cluster_bits
        words: array[int] = tables[l1_index].data
        _, bitmap = parts.get(cluster, (0, 0))
        if cluster not in parts:
            bitmap = words[2 * index + 1]
        low, high = max(low, base), min(high, base + self.cluster_size)
        touched = self.covering(low - base, high - base)
        if not bitmap >> (low - base >> self.sub_bits) & 1:
            low &= -self.zero_unit
        if not bitmap >> (high - 1 - base >> self.sub_bits) & 1:
            high += -high % self.zero_unit
        stored = bitmap & ALL | touched
        zero = bitmap >> SUBCLUSTERS & ~stored
        parts[cluster] = base | COPIED, zero << SUBCLUSTERS | stored
        return low, high
