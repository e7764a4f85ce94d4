"""Reserve, commit, abort: how a write, a zero or a discard changes the map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...contract import (
    OP_DATA,
    OP_ZERO,
    Groups,
    MetaWrite,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from ...units import align_down, align_up
from .alloc import Allocator
from .core import (
    BAT_LOAD,
    BITMAP_BLOCK,
    ENTRIES,
    FULL,
    NOT_PRESENT,
    PART,
    PARTIAL,
    SB_PRESENT,
    STATE,
)
from .structures import SLOT, Header

BEFORE = "before"
_TAIL = 4096
_ONES = bytes([0xFF]) * PART


class Bits:
    """Sectors of a block that a plan writes; the block's bits begin at byte ``start`` of the
    bitmap block at ``place``."""

    __slots__ = ("block", "fresh", "host", "parts", "place", "start")

    def __init__(
        self, block: int, host: int, parts: list[Range], fresh: bool, place: int, start: int
    ) -> None:
        self.block, self.host, self.parts, self.fresh = block, host, parts, fresh
        self.place, self.start = place, start


class State:
    """What commit and abort need of a plan."""

    __slots__ = ("bits", "changes", "end", "taken")

    def __init__(self) -> None:
        self.changes: list[tuple[Table, int, int]] = []
        """(slice of the BAT, index of the entry, new entry)"""
        self.bits: list[Bits] = []
        self.taken: list[Range] = []
        """Payload blocks to give back on abort."""
        self.end = 0
        """How far the file reaches once the steps are done."""


class Planner(Allocator):
    """`plan` for writes, `commit` and `abort`."""

    _next: tuple[Header, Header] | None = None

    # -- what precedes a write
    def before(self) -> Groups | None:
        """The headers with the GUIDs of this session; None when they are on disk.

        They are the same bytes each time until they are settled, since several plans may ask.
        """
        if self.announced:
            return None
        if self._next is None:
            self._next = self.next_headers(
                file_guid=self.new_guid(), data_guid=self.new_guid()
            )
        return Groups([[MetaWrite(SLOT, h.offset, h.encode())] for h in self._next], BEFORE)

    def next_headers(
        self,
        file_guid: bytes | None = None,
        data_guid: bytes | None = None,
        log_guid: bytes | None = None,
    ) -> tuple[Header, Header]:
        """The two that follow the one in force, first the one to write first (2.2.2.1).  The
        second is in force when both are on disk."""
        h = self.header
        first = h._replace(
            slot=1 - h.slot,
            sequence=h.sequence + 1,
            file_guid=h.file_guid if file_guid is None else file_guid,
            data_guid=h.data_guid if data_guid is None else data_guid,
            log_guid=h.log_guid if log_guid is None else log_guid,
        )
        return first, first._replace(slot=h.slot, sequence=h.sequence + 2)

    # -- tables
    def slices(self, indexes: Iterable[int]) -> dict[int, Table] | NeedMeta:
        """The slices of the BAT, by number, that hold these entries."""
        tables: dict[int, Table] = {}
        missing = []
        for number in dict.fromkeys([index // ENTRIES for index in indexes]):
            table = self.slice_table(number)
            if table is None:
                missing.append((self.slice_offset(number), PART))
            else:
                tables[number] = table
        return NeedMeta(SLOT, missing, BAT_LOAD) if missing else tables

    # -- writing
    def _plan_write(self, ranges: Sequence[Range]) -> Plan | NeedMeta:
        bits = self.block_bits
        want: dict[int, list[Range]] = {}  # payload block: [(first byte, end)]
        for offset, length in ranges:
            end = offset + length
            while offset < end:
                block = offset >> bits
                stop = min(end, (block + 1) << bits)
                want.setdefault(block, []).append((offset, stop))
                offset = stop
        tables = self.slices([self.bat_index(block) for block in want])
        if isinstance(tables, NeedMeta):
            return tables
        entries: dict[int, int] = {}
        sparse: list[int] = []  # blocks that are partially present, or will be
        for block, parts in want.items():
            index = self.bat_index(block)
            entry = entries[block] = tables[index // ENTRIES].data[index % ENTRIES]
            state = entry & STATE
            want[block] = parts = _merged(parts, 1)
            if state in (FULL, PARTIAL):
                self.host_of(entry, index, self.block_size)
                if state == PARTIAL and not self.differencing:
                    raise self.bad_state(entry, index)
            if self.differencing and state in (NOT_PRESENT, PARTIAL):
                if state == NOT_PRESENT and self._covers(block, parts):
                    continue
                want[block] = _merged(parts, self.sector_size)
                sparse.append(block)
        bitmaps = self._bitmaps(sparse, entries)
        if isinstance(bitmaps, NeedMeta):
            return bitmaps
        absent = [chunk for chunk, place in bitmaps.items() if not place]
        fresh = [block for block in want if entries[block] & STATE not in (FULL, PARTIAL)]
        taken = self.take_all([BITMAP_BLOCK] * len(absent) + [self.block_size] * len(fresh))
        # All that is needed is there: from here on it changes.
        plan = Plan()
        plan.pins += tables.values()
        for chunk, (place, zero) in zip(absent, taken, strict=False):
            bitmaps[chunk] = place
            self._install_bitmap(plan, chunk, place, zero)
        hosts = dict(zip(fresh, taken[len(absent) :], strict=True))
        self._reserve(plan, want, entries, tables, hosts)
        state_ = plan.state
        for block in sparse:
            start, chunk = self.bitmap_part(block)
            place = bitmaps[chunk]
            known = hosts.get(block)
            host = self.host_of_block(entries[block]) if known is None else known[0]
            state_.bits.append(Bits(block, host, want[block], known is not None, place, start))
            for at in self.bitmap_tables(place, start, self.bitmap_bytes):
                plan.pins.append(self._part(at))
        plan.before = self.before()
        return plan

    @staticmethod
    def host_of_block(entry: int) -> int:
        """The place in an entry that was checked."""
        return entry >> 20 << 20

    def _covers(self, block: int, parts: list[Range]) -> bool:
        """True when ``parts`` are all of a block, as far as the disk goes."""
        base = block << self.block_bits
        return parts == [(base, min(base + self.block_size, self.size))]

    def _bitmaps(self, sparse: list[int], entries: dict[int, int]) -> dict[int, int] | NeedMeta:
        """By chunk the place of the sector bitmap block for these payload blocks, 0 where one is
        still to be made.

        The parts that matter are in memory.  Those that have the bits of one block alone do not
        before it is partially present, since they are all set then.
        """
        chunks = dict.fromkeys([block >> self.ratio_bits for block in sparse])
        tables = self.slices([self.bitmap_index(chunk) for chunk in chunks])
        if isinstance(tables, NeedMeta):
            return tables
        found: dict[int, int] = {}
        for chunk in chunks:
            place = self.bitmap_of(chunk)
            assert not isinstance(place, NeedMeta)
            found[chunk] = place
        missing: dict[int, int] = {}
        for block in sparse:
            start, chunk = self.bitmap_part(block)
            place = found[chunk]
            present = entries[block] & STATE == PARTIAL
            if place and (present or self.bitmap_bytes < PART):
                missing.update(self.missing_parts(place, start, self.bitmap_bytes))
            elif present:
                raise self.no_bitmap(block)
        return NeedMeta(SLOT, list(missing.items()), BAT_LOAD) if missing else found

    def _install_bitmap(self, plan: Plan, chunk: int, place: int, zero: bool) -> None:
        """Put an empty sector bitmap block into ``place``; it stays, whatever becomes of the plan.

        Where zeroes are already, its last part is written so that the file reaches to its end.
        """
        parts = range(BITMAP_BLOCK // PART)
        for number in parts:
            if number == parts[-1] or not zero:
                self.tables.put(SLOT, place + number * PART, bytearray(PART), PART, dirty=True)
        index = self.bitmap_index(chunk)
        table = self.slice_table(index // ENTRIES)
        assert table is not None
        self.set_entry(table, index, place | SB_PRESENT)
        if table not in plan.pins:
            plan.pins.append(table)
        self.installed = max(self.installed, place + BITMAP_BLOCK)

    def _part(self, place: int) -> Table:
        """A part of a bitmap block, which is in memory or does not matter as it is on disk."""
        table = self.tables.get(SLOT, place)
        return table or self.tables.put(SLOT, place, bytearray(PART), PART)

    def _reserve(
        self,
        plan: Plan,
        want: dict[int, list[Range]],
        entries: dict[int, int],
        tables: dict[int, Table],
        hosts: dict[int, tuple[int, bool]],
    ) -> None:
        """Steps and changes of the BAT."""
        state = plan.state = State()
        size = self.block_size
        steps: list[list[int]] = []  # guest, length, host
        guest_end = host_end = -1
        for block, parts in want.items():
            base = block << self.block_bits
            entry = entries[block]
            found = hosts.get(block)
            if found is None:
                host = self.host_of_block(entry)
            else:
                host, zero = found
                state.taken.append((host, size))
                state.end = max(state.end, host + size)
                if not zero and parts != [(base, base + size)]:
                    plan.steps.append(Step(OP_ZERO, base, size, SLOT, host))
                if not self.differencing or entry & STATE != NOT_PRESENT or self._covers(
                    block, parts
                ):
                    index = self.bat_index(block)
                    state.changes.append((tables[index // ENTRIES], index, host | FULL))
            for start, stop in parts:
                at = host + start - base
                if start == guest_end and at == host_end:
                    steps[-1][1] += stop - start
                else:
                    steps.append([start, stop - start, at])
                guest_end, host_end = stop, at + stop - start
        if state.end > max(self.length, self.used) and host_end < state.end:
            # The file must reach to the end of its last block before an entry says so.
            last = next(b for b, found in hosts.items() if found[0] + size == state.end)
            guest = ((last + 1) << self.block_bits) - _TAIL
            plan.steps.append(Step(OP_ZERO, guest, _TAIL, SLOT, state.end - _TAIL))
        plan.steps += [Step(OP_DATA, g, n, SLOT, h) for g, n, h in steps]

    # -- the end of a plan
    def commit(self, plan: Plan) -> None:
        """Point to the data."""
        state: State = plan.state
        for table, index, new in state.changes:
            old = table.data[index % ENTRIES]
            if old & STATE in (FULL, PARTIAL) and (old ^ new) >> 20:
                self.free_later(self.host_of_block(old), self.block_size)
            self.set_entry(table, index, new)
        for bits in state.bits:
            self._set_bits(bits)
        self.used = max(self.used, state.end)

    def _set_bits(self, bits: Bits) -> None:
        """Mark the written sectors, and the block as wholly present once all of them are."""
        if bits.fresh:
            self._fill(bits.place, bits.start, 0, self.bitmap_bytes * 8, False)
        base = bits.block << self.block_bits
        shift = self.sector_bits
        for start, stop in bits.parts:
            self._fill(bits.place, bits.start, start - base >> shift, stop - base >> shift, True)
        sectors = min(self.block_size, self.size - base) >> shift
        whole = self._all_present(bits.place, bits.start, sectors)
        index = self.bat_index(bits.block)
        table = self.slice_table(index // ENTRIES)
        assert table is not None
        if whole or bits.fresh:
            self.set_entry(table, index, bits.host | (FULL if whole else PARTIAL))

    def _fill(self, place: int, start: int, first: int, stop: int, value: bool) -> None:
        """Set the bits [first, stop) of the block whose bits begin at byte ``start``."""
        first, stop = 8 * start + first, 8 * start + stop
        while first < stop:
            part = first // (8 * PART)
            end = min(stop, (part + 1) * 8 * PART)
            table = self._part(place + part * PART)
            fill(table.data, first - part * 8 * PART, end - part * 8 * PART, value)
            self.tables.mark(table)
            first = end

    def _all_present(self, place: int, start: int, sectors: int) -> bool:
        end = start + (sectors >> 3)
        while start < end:
            stop = min(end, align_down(start, PART) + PART)
            data = self._part(place + align_down(start, PART)).data
            if data[start % PART : start % PART + stop - start] != _ONES[: stop - start]:
                return False
            start = stop
        rest = (1 << (sectors & 7)) - 1
        if not rest:
            return True
        byte = self._part(place + align_down(end, PART)).data[end % PART]
        return bool(byte & rest == rest)

    def abort(self, plan: Plan) -> None:
        """Give the payload blocks back; bitmap blocks that were installed stay."""
        state: State = plan.state
        for place, length in state.taken:
            self.give_back(place, length, False)
        state.taken = []

    def free_later(self, place: int, length: int) -> None:
        """A block to which nothing points once the next freeze is on disk."""
        raise NotImplementedError


def fill(data: bytearray, first: int, stop: int, value: bool) -> None:
    """Set bits [first, stop) of ``data``; bit 0 of byte 0 is the first."""
    low, high = first >> 3, stop >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, (1 << (stop & 7)) - 1
    if low == high:
        mask = head & tail
        data[low] = data[low] | mask if value else data[low] & ~mask
        return
    if first & 7:
        data[low] = data[low] | head if value else data[low] & ~head
        low += 1
    data[low:high] = (b"\xff" if value else b"\0") * (high - low)
    if tail:
        data[high] = data[high] | tail if value else data[high] & ~tail


def _merged(parts: list[Range], unit: int) -> list[Range]:
    """(start, end) rounded out to ``unit``, ascending, joined where they meet."""
    out: list[Range] = []
    for start, end in sorted(parts):
        start, end = align_down(start, unit), align_up(end, unit)
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


