"""Reserve, commit, abort: how a write, a zero or a discard changes the map."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ...contract import (
    DISCARD,
    OP_DATA,
    OP_ZERO,
    WRITE,
    WRITE_ZERO,
    Groups,
    MetaWrite,
    NeedMeta,
    Plan,
    Range,
    Step,
    Table,
)
from ...ondisk import zeros
from . import header as hd
from .alloc import Allocator, Choice
from .core import COPIED, L2_LOAD, OFFSET, PACKED, SLOT, ZERO_FLAG
from .runs import Run

BEFORE = "before"

# What commit does to a run of L2 entries.
_KEEP_ZERO, _DROP_ZERO, _DROP = range(3)
_HOLES_STAY = 4  # flag beside one of them


class State:
    """What commit and abort need of a plan."""

    __slots__ = ("entries", "reserved", "spans")

    def __init__(self) -> None:
        self.entries: list[tuple[Table, int, int]] = []
        """(L2 table, index, new entry)"""
        self.spans: list[tuple[Table, int, int, int]] = []
        """(L2 table, first index, end, what to do)"""
        self.reserved: list[Choice] = []
        """Data clusters to give back on abort."""


class Planner(Allocator):
    """`plan`, `commit` and `abort`."""

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """Reserve what is needed; see the contract.

        Raises NoSpace; UnsupportedFeature by name for images whose data this version does not
        write and for compressed clusters; CorruptImage.  Nothing has changed then.
        """
        self.check_write()
        if kind == WRITE:
            return self._plan_write(ranges)
        return self._plan_zero(ranges, kind)

    # -- L2 tables
    def _l2_tables(
        self, l1_indexes: Sequence[int]
    ) -> tuple[dict[int, Table], list[int], NeedMeta | None]:
        """The L2 tables in memory by L1 index, the L1 indexes that need one of their own (none
        yet, or shared), and what must be loaded."""
        tables: dict[int, Table] = {}
        fresh: list[int] = []
        missing = []
        for l1_index in l1_indexes:
            offset = self.l2_offset(l1_index)
            if not offset:
                fresh.append(l1_index)
                continue
            table = self.l2_table(offset)
            if table is None:
                missing.append((offset, self.cluster_size))
            else:
                tables[l1_index] = table
                if not self.l1[l1_index] & COPIED:
                    fresh.append(l1_index)
        return tables, fresh, NeedMeta(SLOT, missing, L2_LOAD) if missing else None

    def _install_l2(
        self, tables: dict[int, Table], fresh: Sequence[int], hosts: Sequence[tuple[int, bool]]
    ) -> None:
        """Give each of ``fresh`` an L2 table of its own, empty or a copy of the shared one."""
        for l1_index, (cluster, zero) in zip(fresh, hosts, strict=True):
            old = tables.get(l1_index)
            data = zeros(64, self.l2_mask + 1) if old is None else old.data[:]
            offset = cluster << self.cluster_bits
            table = self.tables.put(SLOT, offset, data, self.cluster_size)
            self._parts[offset] = set()
            self._new_l2.add(offset)
            self._asked_blocks.discard(offset)
            if old is not None or not zero:
                self.touch_l2(table, 0, len(data))
            else:
                # It reads as zeroes already, but the file must reach to its end before an L1
                # entry says so.
                self.touch_l2(table, len(data) - 1, len(data))
            if old is not None:
                shared = old.offset >> self.cluster_bits
                self.free_later(shared, shared + 1)
                self._old_tables.append(old.offset)
            self.set_l1(l1_index, offset | COPIED)
            tables[l1_index] = table

    def drop_l2(self, offset: int) -> None:
        """Forget an L2 table whose L1 entry is gone, with the changes that were made to it."""
        table = self.tables.get(SLOT, offset)
        if table is not None:
            table.dirty = False
        self._parts.pop(offset, None)
        self._new_l2.discard(offset)
        self._old_tables.append(offset)

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
                if entry:
                    if entry & PACKED:
                        raise self.packed(cluster << bits)
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
        chosen = self.choose(needed + len(fresh)) if needed or fresh else []
        if isinstance(chosen, NeedMeta):
            return chosen
        return self._reserve_write(want, entries, tables, fresh, chosen, freed)

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
        plan = Plan()
        state = plan.state = State()
        plan.pins = self.take(chosen)
        supply = [(c, zero) for start, end, zero in chosen for c in range(start, end)]
        if fresh:
            self._install_l2(tables, fresh, supply[: len(fresh)])
            del supply[: len(fresh)]
        state.reserved = _as_runs(supply)
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
        a larger disk would show them."""
        end = base + self.cluster_size
        if end > self.size:
            tails.append(
                Step(OP_ZERO, self.size, end - self.size, SLOT, host + self.size - base)
            )
            end = self.size
        return base, end

    def _finish(self, plan: Plan, tables: dict[int, Table], freed: list[Run]) -> Plan:
        plan.pins += tables.values()
        for start, end in freed:
            plan.pins += [span[0] for span in self.block_spans(start, end)]
        if not self.announced:
            plan.before = self.before()
        return plan

    # -- zeroes and discards
    def _plan_zero(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        old_version = self.header.version < 3
        if old_version and (kind == WRITE_ZERO or self.has_backing):
            return None
        # Version 2 has no zero flag; without a backing file an unallocated cluster is as good.
        holes_stay = old_version or (kind == DISCARD and not self.has_backing)
        mode = _DROP if old_version else _KEEP_ZERO if kind == WRITE_ZERO else _DROP_ZERO
        spans: list[tuple[int, int, int]] = []  # L1 index, first L2 index, end
        bits, l2_bits, l2_mask = self.cluster_bits, self.l2_bits, self.l2_mask
        for offset, length in ranges:
            first = offset >> bits
            end = (offset + length + self.cluster_size - 1) >> bits
            while first < end:
                l1_index = first >> l2_bits
                stop = min(end, (l1_index + 1) << l2_bits)
                if not (holes_stay and not self.l1[l1_index] & OFFSET):
                    spans.append((l1_index, first & l2_mask, ((stop - 1) & l2_mask) + 1))
                first = stop
        tables, fresh, miss = self._l2_tables(list(dict.fromkeys([s[0] for s in spans])))
        if miss is not None:
            return miss
        freed: list[Run] = [(t.offset >> bits, (t.offset >> bits) + 1) for i in fresh
                            if (t := tables.get(i))]
        for l1_index, first, stop in spans:
            table = tables.get(l1_index)
            if table is not None:
                self._losing(table, l1_index, first, stop, mode, freed)
        if freed and (miss := self.missing_blocks(freed)) is not None:
            return miss
        chosen: list[Choice] | NeedMeta = self.choose(len(fresh)) if fresh else []
        if isinstance(chosen, NeedMeta):
            return chosen
        plan = Plan()
        state = plan.state = State()
        plan.pins = self.take(chosen)
        self._install_l2(tables, fresh, [(c, z) for a, b, z in chosen for c in range(a, b)])
        for l1_index, first, stop in spans:
            state.spans.append(
                (tables[l1_index], first, stop, mode | _HOLES_STAY if holes_stay else mode)
            )
        return self._finish(plan, tables, freed)

    def _losing(
        self, table: Table, l1_index: int, first: int, stop: int, mode: int, freed: list[Run]
    ) -> None:
        """Collect the host clusters that entries [first, stop) will let go."""
        data: array[int] = table.data
        bits = self.cluster_bits
        if _no_hosts(data[first:stop].tobytes()):
            return
        for index in range(first, stop):
            entry = data[index]
            if not entry:
                continue
            if entry & PACKED:
                raise self.packed((l1_index << self.l1_shift) + (index << bits))
            host = self.host_of(entry, table.offset, index)
            if host and not (mode == _KEEP_ZERO and entry & COPIED):
                host >>= bits
                if freed and freed[-1][1] == host:
                    freed[-1] = (freed[-1][0], host + 1)
                else:
                    freed.append((host, host + 1))

    # -- the end of a plan
    def commit(self, plan: Plan) -> None:
        """Point to the data."""
        state: State = plan.state
        bits = self.cluster_bits
        for table, index, new in state.entries:
            old = table.data[index]
            table.data[index] = new
            self.touch_l2(table, index, index + 1)
            lost = old & OFFSET
            if lost and lost != new & OFFSET:
                self.free_later(lost >> bits, (lost >> bits) + 1)
        for table, first, stop, mode in state.spans:
            self._commit_span(table, first, stop, mode)

    def _commit_span(self, table: Table, first: int, stop: int, mode: int) -> None:
        data: array[int] = table.data
        bits = self.cluster_bits
        holes_stay, mode = mode & _HOLES_STAY, mode & ~_HOLES_STAY
        before = data[first:stop].tobytes()
        if _no_hosts(before):
            after = before
            if mode == _DROP:
                after = bytes(len(before))
            elif not holes_stay:
                after = array("Q", [ZERO_FLAG]).tobytes() * (stop - first)
            if after != before:
                data[first:stop] = array("Q", after)
                self.touch_l2(table, first, stop)
            return
        low, high = stop, first
        for index in range(first, stop):
            old = data[index]
            if not old and holes_stay:
                continue
            new = 0 if mode == _DROP else ZERO_FLAG
            lost = old & OFFSET
            if lost:
                if mode == _KEEP_ZERO and old & COPIED:
                    new = old | ZERO_FLAG
                else:
                    self.free_later(lost >> bits, (lost >> bits) + 1)
            if new != old:
                data[index] = new
                low = min(low, index)
                high = index + 1
        if low < high:
            self.touch_l2(table, low, high)

    def abort(self, plan: Plan) -> None:
        """Give the data clusters back; L2 tables that were installed stay."""
        state: State = plan.state
        for start, end, _ in state.reserved:
            self.give_back(start, end)
        state.reserved = []

    # -- what must be durable first
    def before(self) -> Groups:
        """The header with the dirty bit (lazy refcounts) and without autoclear bits that this
        version does not keep true."""
        h = self.header
        kept = h.incompatible, h.autoclear
        h.incompatible, h.autoclear = self.features_in_use()
        data = h.features()
        h.incompatible, h.autoclear = kept
        return Groups([[MetaWrite(SLOT, hd.FEATURES_OFFSET, data)]], BEFORE)

    def features_in_use(self) -> tuple[int, int]:
        """The incompatible and autoclear bits that must be on disk while the map changes."""
        h = self.header
        incompatible = h.incompatible | (hd.DIRTY if self.lazy else 0)
        return incompatible, h.autoclear & (hd.BITMAPS | hd.RAW_DATA_FILE)

    _old_tables: list[int]


def _no_hosts(raw: bytes) -> bool:
    """True for L2 entries that are all unallocated or plain zeroes; told without a loop, since a
    discard of a whole disk meets little else."""
    return not raw.strip(b"\0\1")


def _as_runs(supply: list[tuple[int, bool]]) -> list[Choice]:
    out: list[Choice] = []
    for cluster, zero in supply:
        if out and out[-1][1] == cluster:
            out[-1] = (out[-1][0], cluster + 1, zero)
        else:
            out.append((cluster, cluster + 1, zero))
    return out
