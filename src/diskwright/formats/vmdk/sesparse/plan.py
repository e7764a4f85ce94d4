"""Reserve, commit, abort: how a write, a zero or a discard changes a seSparse extent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count, repeat

from ....contract import (
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_ZERO,
    ZERO_UNMAP,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from ....errors import UnsupportedFeature
from ....hints import Any
from ....ondisk import zeros
from .header import COVERAGE, ENTRIES, GRAIN, TABLE_BYTES, TABLE_SECTORS
from .map import (
    ALLOCATED,
    UNMAPPED_ENTRY,
    ZERO_ENTRY,
    SesparseMap,
    entry_of,
    grain_of,
)
from .space import Run

PART_BITS = 9  # entries of a part (4 KiB) that is written at once

Wanted = dict[int, Range]  # guest grain: (first byte, end), relative to the part


class _Found:
    """What a plan needs: ``entries`` of the wanted grains in their order, directory entries without
    a table in ``fresh``, grains of the file to take (``runs``) and to give back (``freed``: guest
    grain: grain)."""

    __slots__ = ("entries", "freed", "fresh", "kind", "runs", "wanted")

    def __init__(self, kind: str, wanted: Wanted) -> None:
        self.kind = kind
        self.wanted = wanted
        self.entries: dict[int, int] = {}
        self.fresh: dict[int, None] = {}
        self.runs: list[Run] = []
        self.freed: dict[int, int] = {}


class _State:
    """What `commit` does: entries to set (table, index, new entry, guest grain), grains to give
    back; ``runs`` are what `abort` gives back."""

    __slots__ = ("changes", "freed", "runs")

    def __init__(self, runs: list[Run], freed: list[int]) -> None:
        self.changes: list[tuple[Table, int, int, int]] = []
        self.freed = freed
        self.runs = runs


class SesparsePlan(SesparseMap):
    """`gather`, `reserve`, `commit` and `abort`, and the record of what is dirty: parts of existing
    tables by the place of the table, new tables, parts of the directory."""

    _found: _Found | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.free_table = self.header.free_table
        self._free_table_dirty = False
        self._parts: dict[int, set[int]] = {}
        self._new_tables: set[int] = set()
        self._directory_parts: set[int] = set()

    # -- what is needed
    def gather(self, ranges: Sequence[Range], kind: str) -> NeedMeta | bool:
        """See `Part.gather`.  Raises UnsupportedFeature for an extent that is not written."""
        if self.refuse_write is not None:
            raise UnsupportedFeature(f"writing to a seSparse extent: {self.refuse_write}")
        wanted = grains_of(ranges) if kind == WRITE else self._affected(ranges, kind)
        if isinstance(wanted, NeedMeta):
            return wanted
        found = _Found(kind, wanted)
        answer = self._look_up(found)
        if answer is None:
            self._found = found
            return True
        return answer

    def _affected(self, ranges: Sequence[Range], kind: str) -> Wanted | NeedMeta:
        """The grains of ``ranges`` (whole ones) to which zeroing or discarding does anything, or
        the tables that must be there to tell.  A range may be far larger than what is in it."""
        out: Wanted = {}
        missing: list[int] = []
        for offset, length in ranges:
            end = offset + length
            for number in range(offset // COVERAGE, -(-end // COVERAGE)):
                place = self.table_at(number)
                table = self.table(place) if place else None
                if place and table is None:
                    missing.append(place)
                    continue
                if table is None and not self._changes(0, kind):
                    continue
                first = max(offset // GRAIN - number * ENTRIES, 0)
                last = min(-(-end // GRAIN) - number * ENTRIES, ENTRIES)
                entries = table.data[first:last] if table is not None else repeat(0, last - first)
                base = number * ENTRIES + first
                for guest, entry in enumerate(entries, base):
                    if entry >> 60 == ALLOCATED or self._changes(entry, kind):
                        out[guest] = guest * GRAIN, min((guest + 1) * GRAIN, end)
        return self.need(missing) if missing else out

    def _look_up(self, found: _Found) -> NeedMeta | None:
        """Fill ``found`` in; or what is missing for it."""
        tables: dict[int, Table | None] = {}
        missing: list[int] = []
        for number in dict.fromkeys([grain // ENTRIES for grain in found.wanted]):
            place = self.table_at(number)
            tables[number] = table = self.table(place) if place else None
            if place and table is None:
                missing.append(place)
        if missing:
            return self.need(missing)
        needed = 0
        for guest in found.wanted:
            number, index = divmod(guest, ENTRIES)
            table = tables[number]
            entry = table.data[index] if table is not None else 0
            if table is not None:
                self.host_of(entry, table.offset, index)
            if not self._changes(entry, found.kind):
                found.entries[guest] = entry
                continue
            found.entries[guest] = entry
            if table is None:
                found.fresh[number] = None
            if found.kind == WRITE:
                needed += 1
            # What an unmapped entry still holds was never given back.
            held = grain_of(entry & (1 << 60) - 1)
            if entry >> 60 == ALLOCATED or (held and held < self.header.grain_count):
                found.freed[guest] = held
        if needed:
            chosen = self.space.choose(needed)
            if isinstance(chosen, NeedMeta):
                return chosen
            found.runs = chosen
        freed = [(grain, grain + 1) for grain in found.freed.values()]
        slices = self.space.missing(self.space.places(freed))
        if slices:
            return self.space.need(slices)
        found.freed = {g: held for g, held in found.freed.items() if self.space.is_of(held, g)}
        return None

    def _changes(self, entry: int, kind: str) -> bool:
        """Whether the entry of a grain becomes another one."""
        if kind == WRITE:
            return entry >> 60 != ALLOCATED
        if kind == WRITE_ZERO:
            return not entry and self.image.has_backing
        if kind == ZERO_UNMAP:
            return entry >> 60 == ALLOCATED or (not entry and self.image.has_backing)
        return entry >> 60 == ALLOCATED

    # -- reserve
    def reserve(self, ranges: Sequence[Range], kind: str, plan: Plan) -> Any:
        """See `Part.reserve`."""
        found, self._found = self._found, None
        assert found is not None and found.kind == kind
        space = self.space
        plan.pins += space.take(found.runs)
        freed = list(found.freed.values())
        plan.pins += [space.table(p) for p in space.places([(g, g + 1) for g in freed])]
        for number in found.fresh:
            self._install(number)
        state = _State(found.runs, freed)
        touched: dict[int, Table] = {}
        supply = (grain for start, end in found.runs for grain in range(start, end))
        steps: list[Step] = []
        for guest, entry in found.entries.items():
            number, index = divmod(guest, ENTRIES)
            first, stop = found.wanted[guest]
            if self._changes(entry, kind):
                table = touched.get(number) or self.table(self.table_at(number))
                assert table is not None
                touched[number] = table
                new = UNMAPPED_ENTRY
                if kind == WRITE:
                    grain = next(supply)
                    new = entry_of(grain)
                    self._whole(guest, grain, steps)
                elif kind in (WRITE_ZERO, ZERO_UNMAP):
                    new = ZERO_ENTRY
                state.changes.append((table, index, new, guest))
            elif entry >> 60 == ALLOCATED and kind in (WRITE, WRITE_ZERO):
                host = self.header.grains.start + grain_of(entry) * GRAIN + first % GRAIN
                op = OP_DATA if kind == WRITE else OP_ZERO
                steps.append(Step(op, first, stop - first, self.slot, host))
        plan.pins += touched.values()
        plan.steps += [s._replace(guest=s.guest + self.start) for s in joined(steps)]
        return state

    def _whole(self, guest: int, grain: int, steps: list[Step]) -> None:
        """A new grain is written whole; what of it lies behind the disk becomes zero."""
        host = self.header.grains.start + grain * GRAIN
        base = guest * GRAIN
        length = min(GRAIN, self.length - base)
        self.file_end = max(self.file_end, host + GRAIN)
        steps.append(Step(OP_DATA, base, length, self.slot, host))
        if length < GRAIN:
            steps.append(Step(OP_ZERO, base + length, GRAIN - length, self.slot, host + length))

    def _install(self, number: int) -> None:
        """Give directory entry ``number`` an empty table, which stays whatever becomes of the
        plan."""
        index = self._free_index()
        place = self.header.tables.start + index * TABLE_BYTES
        self.directory[number] = self.link_to(index)
        self._directory_parts.add(number >> PART_BITS)
        if index >= self.free_table:
            self.free_table = index + 1
            self._free_table_dirty = True
        self.file_end = max(self.file_end, place + TABLE_BYTES)
        self.image.tables.put(self.slot, place, zeros(64, ENTRIES), TABLE_BYTES, dirty=True)
        self._new_tables.add(place)

    def _free_index(self) -> int:
        """The number of a grain table that is not in use.  There always is one: the region has
        room for as many as the directory has entries, which was checked when it was opened."""
        if self.free_table < self.header.tables.size // TABLE_SECTORS:
            return self.free_table
        used = {entry & 0xFFFFFFFF for entry in self.directory if entry}
        return next(index for index in count() if index not in used)

    # -- the end of a plan
    def commit(self, state: Any) -> None:
        """Point to the data."""
        for table, index, new, guest in state.changes:
            table.data[index] = new
            self._parts.setdefault(table.offset, set()).add(index >> PART_BITS)
            self.image.tables.mark(table)
            if new >> 60 == ALLOCATED:
                self.space.point(grain_of(new), guest)
        for grain in state.freed:
            self.space.lose(grain)

    def abort(self, state: Any) -> None:
        """Give the grains back; tables that were installed stay."""
        self.space.give_back(state.runs)


def grains_of(ranges: Sequence[Range]) -> Wanted:
    """The grains that ranges touch, each with the bytes that are meant."""
    out: Wanted = {}
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            grain = offset // GRAIN
            stop = min(end, (grain + 1) * GRAIN)
            known = out.get(grain)
            out[grain] = (
                (offset, stop) if known is None else (min(known[0], offset), max(known[1], stop))
            )
            offset = stop
    return out


def joined(steps: Iterable[Step]) -> list[Step]:
    """Steps that continue each other as one."""
    out: list[Step] = []
    for step in steps:
        last = out[-1] if out else None
        if (
            last is not None
            and last.op == step.op
            and last.guest + last.length == step.guest
            and last.host + last.length == step.host
        ):
            out[-1] = last._replace(length=last.length + step.length)
        else:
            out.append(step)
    return out
