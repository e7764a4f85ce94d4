"""Plans of images with a data file (see :mod:`.external`).

Nothing is searched for in a data file, and reference counts know the image file alone.  What is
given up can therefore not wait in a quarantine until its entry is on disk: it would be punched
under what was written there since.  It is zeroed before the entry changes instead, as a write of
zeroes would be, or left alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from ....abilities import Codec
from ....contract import (
    DISCARD,
    OP_DATA,
    OP_PUNCH,
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
from .core import COPIED, DATA_SLOT, OFFSET, ZERO_FLAG
from .reserve import State
from .runs import Run
from .writeback import Writeback
from .zeroing import no_hosts

Piece = tuple[int, int, int]  # L1 index, first L2 index, end


class ExternalPlanner(Writeback):
    """Plans of images with a data file; other images pass through."""

    @property
    def pack_codec(self) -> Codec | None:
        """None: only the image file could hold compressed clusters."""
        return None if self.external else super().pack_codec

    def check_table(self, table: Table) -> None:
        """See :meth:`.mapping.Mapping.check_table`: no entry points into the image file."""
        if self.external:
            self._checked.add(table.offset)
        else:
            super().check_table(table)

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract."""
        if not self.external:
            return super().plan(ranges, kind)
        self.check_write()
        if kind == WRITE_PACKED:
            return None
        return self._plan_there(ranges, kind)

    def _plan_there(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta:
        """A plan of any other kind: all of them change entries and leave the places alone."""
        spans = joined(ranges)
        pieces: list[Piece] = []
        # An entry of 0 reads as zeroes as it is where nothing is below.
        holes_stay = kind == DISCARD and not self.has_backing
        for start, end in spans:
            pieces += [
                piece
                for piece in self._pieces(start, end)
                if not (holes_stay and not self.l1[piece[0]] & OFFSET)
            ]
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([p[0] for p in pieces])))
        if miss is not None:
            return miss
        shared = [t.offset >> self.cluster_bits for i in fresh if (t := tables.get(i))]
        freed: list[Run] = [(cluster, cluster + 1) for cluster in shared]
        for l1_index, first, stop in pieces:
            table = tables.get(l1_index)
            if table is not None:
                self._check_entries(table, l1_index, first, stop)
        plan = self.begin_tables(tables, fresh, freed)
        if isinstance(plan, NeedMeta):
            return plan
        state: State = plan.state
        if kind == WRITE:
            plan.steps = self._write_steps(spans, tables, state)
        else:
            plan.steps = self._drop_steps(spans, kind, pieces, tables, state, holes_stay)
        return self._finish(plan, tables if state.runs or state.pairs or fresh else {}, freed)

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        """The entries of the clusters that [start, end) touches, by L2 table."""
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        cluster, last = start >> bits, ((end - 1) >> bits) + 1
        while cluster < last:
            l1_index = cluster >> l2_bits
            stop = min(last, (l1_index + 1) << l2_bits)
            first = cluster & l2_mask
            yield l1_index, first, first + stop - cluster
            cluster = stop

    def _stored(self, l1_index: int, first: int, stop: int) -> array[int]:
        """The entries of clusters that are stored: each at its own place."""
        base = (l1_index << self.l1_shift) + (first << self.cluster_bits)
        end = base + ((stop - first) << self.cluster_bits)
        return array("Q", range(base | COPIED, end | COPIED, self.cluster_size))

    def _check_entries(self, table: Table, l1_index: int, first: int, stop: int) -> None:
        """Raise CorruptImage for an entry that breaks the specification."""
        data: array[int] = table.data
        if data[first:stop] == self._stored(l1_index, first, stop):
            return
        if no_hosts(data[first:stop].tobytes()):
            return
        for index in range(first, stop):
            base = (l1_index << self.l1_shift) + (index << self.cluster_bits)
            self._sound(data[index], base, table.offset, index)

    def _write_steps(
        self, spans: list[Run], tables: dict[int, Table], state: State
    ) -> list[Step]:
        """What is stored is written as it was asked, any other cluster as a whole: what its place
        holds is unknown."""
        bits = self.cluster_bits
        wanted: list[Run] = []
        for start, end in spans:
            for l1_index, first, stop in self._pieces(start, end):
                data: array[int] = tables[l1_index].data
                stored = self._stored(l1_index, first, stop)
                table_base = l1_index << self.l1_shift
                low = max(start, table_base + (first << bits))
                high = min(end, table_base + (stop << bits))
                if data[first:stop] == stored:
                    wanted.append((low, high))
                    continue
                state.runs.append((tables[l1_index], first, stored))
                if data[first] != stored[0]:
                    low &= ~self.cluster_mask
                if data[stop - 1] != stored[-1]:
                    high = table_base + (stop << bits)
                wanted.append((low, high))
        steps: list[Step] = []
        for low, high in merged(wanted):
            end = min(high, self.size)
            steps.append(Step(OP_DATA, low, end - low, DATA_SLOT, low))
        return steps

    def _drop_steps(
        self,
        spans: list[Run],
        kind: str,
        pieces: list[Piece],
        tables: dict[int, Table],
        state: State,
        holes_stay: bool,
    ) -> list[Step]:
        """Zero flags; a raw data file has zeroes itself, of any other the space is given back."""
        bits = self.cluster_bits
        steps: list[Step] = []
        given_up: list[Run] = []
        for l1_index, first, stop in pieces:
            data: array[int] = tables[l1_index].data
            old = data[first:stop]
            if no_hosts(old.tobytes()):
                new = old if holes_stay else array("Q", [ZERO_FLAG]) * len(old)
            else:
                new = array("Q", old)
                base = (l1_index << self.l1_shift) + (first << bits)
                for i, entry in enumerate(old):
                    if entry & (COPIED | OFFSET):
                        kept = (kind == WRITE_ZERO or self.keeps) and entry & COPIED
                        new[i] = entry | ZERO_FLAG if kept else ZERO_FLAG
                        if kind != WRITE_ZERO:
                            at = base + (i << bits)
                            given_up.append((at, at + self.cluster_size))
                    elif not holes_stay:
                        new[i] = ZERO_FLAG
            if new != old:
                state.runs.append((tables[l1_index], first, new))
        if self.raw_data:
            given_up = spans
        elif not self.discards("request"):
            given_up = []
        op = OP_ZERO if self.raw_data else OP_PUNCH
        for low, high in merged(given_up):
            end = min(high, self.size)
            steps.append(Step(op, low, end - low, DATA_SLOT, low))
        return steps


def joined(ranges: Sequence[Range]) -> list[Run]:
    """The ranges as (start, end), in order, those that touch each other as one."""
    return merged(sorted([(offset, offset + length) for offset, length in ranges if length]))


def merged(runs: list[Run]) -> list[Run]:
    """Runs in the order of their starts, joined where they touch."""
    out: list[Run] = []
    for start, end in runs:
        if out and start <= out[-1][1]:
            if end > out[-1][1]:
                out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
    return out
