"""Sparse extents: what a write, a zero or a discard reserves, and what it changes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ....contract import (
    DISCARD,
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_ZERO,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from ....errors import CorruptImage, UnsupportedFeature
from ....hints import Any
from ....ondisk import zeros
from ..parts import Image
from .header import SECTOR, Layout
from .map import SparseMap
from .space import Run, Taken

PER_SECTOR = SECTOR // 4
# What the last step of a plan zeroes at most, so that the file has its full length.
_TAIL = 4096


class _State:
    """What commit and abort need of a plan."""

    __slots__ = ("changes", "spans", "taken")

    def __init__(self) -> None:
        self.changes: list[tuple[int, int, int]] = []
        """(table, entry, new value)"""
        self.spans: list[tuple[int, int, int, int]] = []
        """(table, first entry, end, value for those that hold data)"""
        self.taken: list[Taken] = []
        """Grains to give back on abort."""


class SparsePlanner(SparseMap):
    """`gather`, `reserve`, `commit` and `abort`."""

    def __init__(self, image: Image, slot: str, start: int, length: int, layout: Layout) -> None:
        super().__init__(image, slot, start, length, layout)
        self.damage: str | None = None
        """Why nothing can be written before a repair."""
        self.damaged_field = ""
        """The header's field for the directory that is outside the file."""
        self._dirty: dict[int, Run] = {}
        """Changed entries of tables, (first, end)."""
        self._new: set[int] = set()
        self._dirty_links: set[int] = set()
        """Sectors of the directory with changed entries."""
        self._freed: list[Run] = []

    # -- reserving
    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """See `Part.gather`.  Raises UnsupportedFeature and CorruptImage where nothing may be
        written."""
        if self.layout.refuse_write is not None:
            raise UnsupportedFeature(self.layout.refuse_write)
        if self.damage is not None:
            raise CorruptImage(self.damage)
        # Over a backing file only a zeroed grain hides what is below.
        holes_show = kind != WRITE and self.image.has_backing and not self.layout.zeroed
        if holes_show and kind == DISCARD:
            return False
        missing: dict[int, None] = {}
        for index in self._tables_of(ranges):
            sector = self.directory[index]
            if not self._is_place(sector):
                if sector or (self.copy and self.copy[index]):
                    raise self._broken(index)
                continue
            table = self.table(sector)
            if table is None:
                missing[sector] = None
            else:
                self.check_table(table)
        if missing:
            return self.need(missing)
        return not (holes_show and any(self._has_hole(*span) for span in self._spans(ranges)))

    def _tables_of(self, ranges: Sequence[Range]) -> dict[int, None]:
        found: dict[int, None] = {}
        for offset, length in ranges:
            first, last = offset // self.coverage, (offset + length - 1) // self.coverage
            found.update(dict.fromkeys(range(first, last + 1)))
        return found

    def _spans(self, ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
        """(table, first entry, end) of what whole grains cover."""
        out = []
        entries = self.layout.entries
        for offset, length in ranges:
            first = offset >> self.bits
            end = (offset + length + self.unit - 1) >> self.bits
            while first < end:
                index = first // entries
                stop = min(end, (index + 1) * entries)
                out.append((index, first - index * entries, stop - index * entries))
                first = stop
        return out

    def _data(self, index: int) -> array[int]:
        data: array[int] = self._held(index).data
        return data

    def _held(self, index: int) -> Table:
        """A table that is known to be in memory."""
        table = self.table(self.directory[index])
        assert table is not None
        return table

    def _has_hole(self, index: int, first: int, stop: int) -> bool:
        return not self.directory[index] or 0 in self._data(index)[first:stop]

    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """See `Part.reserve`."""
        if kind == WRITE:
            return self._reserve_write(ranges, plan)
        return self._reserve_zero(ranges, kind, plan)

    def _pin(self, plan: Plan, indexes: dict[int, None]) -> None:
        for index in indexes:
            table = self.table(self.directory[index])
            if table is not None:
                plan.pins.append(table)

    def _install(self, indexes: Sequence[int]) -> None:
        """Give each of ``indexes`` an empty table (two where there is a copy).  They are the
        extent's own from now on, whatever becomes of the plan."""
        size = self.layout.table_sectors
        places = 2 if self.copy else 1
        at = self.space.take_tables(size * places * len(indexes))
        for index in indexes:
            self.is_metadata(at, at + places * size)
            self.directory[index] = at
            if self.copy:
                self.copy[index] = at + size
            at += places * size
            data = zeros(32, size * PER_SECTOR)
            table = self.image.tables.put(
                self.slot, self.directory[index] * SECTOR, data, self.table_bytes
            )
            self._checked.add(self.directory[index])
            self._new.add(index)
            self._dirty_links.add(index // PER_SECTOR)
            self._touch(table, index, 0, len(data))
            self._short.pop(index, None)
            self._short_write.pop(index, None)

    def _reserve_write(self, ranges: Sequence[Range], plan: Plan) -> _State:
        entries, bits = self.layout.entries, self.bits
        want: dict[int, Run] = {}  # grain: (first byte, end)
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                grain = offset >> bits
                stop = min(end, (grain + 1) << bits)
                known = want.get(grain, (offset, stop))
                want[grain] = (min(known[0], offset), max(known[1], stop))
                offset = stop
        indexes = dict.fromkeys([grain // entries for grain in want])
        fresh = [index for index in indexes if not self.directory[index]]
        tables = {i: self._data(i) for i in indexes if self.directory[i]}
        found = [
            tables[grain // entries][grain % entries] if grain // entries in tables else 0
            for grain in want
        ]
        needed = sum(not self.holds_data(entry) for entry in found)
        table_sectors = len(fresh) * self.layout.table_sectors * (2 if self.copy else 1)
        self.space.check(needed, table_sectors)
        if fresh:
            self._install(fresh)
        state = _State()
        state.taken = self.space.take(needed) if needed else []
        self._pin(plan, indexes)
        self._write_steps(want, found, state, plan)
        return state

    def _write_steps(
        self, want: dict[int, Run], found: list[int], state: _State, plan: Plan
    ) -> None:
        supply = [
            (sector, zero)
            for start, end, zero in state.taken
            for sector in range(start, end, self.layout.grain)
        ]
        slot, unit, entries = self.slot, self.unit, self.layout.entries
        steps: list[list[int]] = []  # guest, length, host
        zeroes: list[Step] = []
        guest_end = host_end = -1
        nth = 0
        last = (-1, 0, 0)  # the last of the fresh grains: sector, end of its data, guest base
        for (grain, (start, stop)), entry in zip(want.items(), found, strict=True):
            base = grain << self.bits
            sector = entry
            if not self.holds_data(entry):
                sector, zero = supply[nth]
                nth += 1
                state.changes.append((grain // entries, grain % entries, sector))
                if not entry and self.image.has_backing:
                    start, stop = base, min(base + unit, self.length)
                    if not zero and stop < base + unit:
                        zeroes.append(self._zero(stop, base + unit, sector * SECTOR + stop - base))
                elif not zero:
                    zeroes.append(self._zero(base, base + unit, sector * SECTOR))
                if zero and sector > last[0]:
                    last = (sector, stop, base)
            host = sector * SECTOR + start - base
            if start == guest_end and host == host_end:
                steps[-1][1] += stop - start
            else:
                steps.append([start, stop - start, host])
            guest_end = stop
            host_end = host + stop - start
        sector, stop, base = last
        if sector >= 0 and stop < base + unit:
            tail = max(stop, base + unit - _TAIL)
            zeroes.append(self._zero(tail, base + unit, sector * SECTOR + tail - base))
        plan.steps += zeroes
        plan.steps += [Step(OP_DATA, self.start + g, n, slot, h) for g, n, h in steps]

    def _zero(self, start: int, stop: int, host: int) -> Step:
        return Step(OP_ZERO, self.start + start, stop - start, self.slot, host)

    def _reserve_zero(self, ranges: Sequence[Range], kind: str, plan: Plan) -> _State:
        """Grains with data are dropped where nothing below shows then, marked as zeroed where the
        header allows it, and zeroed in place otherwise; holes are marked where they show."""
        state = _State()
        backed = self.image.has_backing
        spans = self._spans(ranges)
        if backed:  # `gather` has seen that holes can be marked, or that there is none
            fresh = [index for index in dict.fromkeys([s[0] for s in spans])
                     if not self.directory[index]]  # fmt: skip
            if fresh:
                places = 2 if self.copy else 1
                self.space.check(0, len(fresh) * self.layout.table_sectors * places)
                self._install(fresh)
        else:
            spans = [span for span in spans if self.directory[span[0]]]
        self._pin(plan, dict.fromkeys([span[0] for span in spans]))
        in_place = kind == WRITE_ZERO or (backed and not self.layout.zeroed)
        for index, first, stop in spans:
            if in_place:
                self._zero_in_place(index, first, stop, plan)
            state.spans.append((index, first, stop, -1 if in_place else int(backed)))
        return state

    def _zero_in_place(self, index: int, first: int, stop: int, plan: Plan) -> None:
        data = self._data(index)
        guest = (index * self.layout.entries + first) << self.bits
        step: Step | None = None
        for nth in range(first, stop):
            entry = data[nth]
            if self.holds_data(entry):
                host = entry * SECTOR
                length = min(self.unit, self.length - guest)
                if step is not None and step.host + step.length == host:
                    step = step._replace(length=step.length + length)
                else:
                    if step is not None:
                        plan.steps.append(step)
                    step = Step(OP_ZERO, self.start + guest, length, self.slot, host)
            guest += self.unit
        if step is not None:
            plan.steps.append(step)

    # -- the end of a plan
    def commit(self, state: Any) -> None:
        """Point to the data."""
        for index, nth, entry in state.changes:
            table = self._held(index)
            table.data[nth] = entry
            self._touch(table, index, nth, nth + 1)
        for index, first, stop, value in state.spans:
            self._commit_span(index, first, stop, value)

    def _commit_span(self, index: int, first: int, stop: int, value: int) -> None:
        """``value`` -1: holes alone become zeroed where they show; otherwise it is for grains
        with data, and for holes where it is 1."""
        table = self._held(index)
        data: array[int] = table.data
        mark = self.image.has_backing and self.layout.zeroed
        low, high = stop, first
        size = self.layout.grain
        for nth in range(first, stop):
            entry = data[nth]
            if self.holds_data(entry):
                if value < 0:
                    continue
                if self._freed and self._freed[-1][1] == entry:
                    self._freed[-1] = (self._freed[-1][0], entry + size)
                else:
                    self._freed.append((entry, entry + size))
                data[nth] = value
            elif not entry and mark:
                data[nth] = 1
            else:
                continue
            low = min(low, nth)
            high = nth + 1
        if low < high:
            self._touch(table, index, low, high)

    def abort(self, state: Any) -> None:
        """Give the grains back; tables that were installed stay."""
        for start, end, _ in state.taken:
            self.space.give(start, end, False)
        state.taken = []

    def _touch(self, table: Table, index: int, first: int, stop: int) -> None:
        known = self._dirty.get(index, (first, stop))
        self._dirty[index] = (min(known[0], first), max(known[1], stop))
        if not table.dirty:
            self.image.tables.mark(table)
