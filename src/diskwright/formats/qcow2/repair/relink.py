"""Mending the entries of L1 and L2 tables: every table and every guest cluster in a place of its
own.

What lies over something else gets a copy behind the end of the file, durable and counted before
an entry names it.  Guest clusters over tables are copied before any table is changed.  An entry
that names a place outside the file reads as zeroes, and so it does afterwards.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ....contract import Barrier, MetaWrite, Procedure, Progress, Write
from ....ondisk import big_endian_array, big_endian_bytes
from ..check.checking import Checker
from ..machine.core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from ..machine.submapping import ALL
from .entrymending import FULL_ZEROES
from .mending import write_entries
from .passing import Passing, everything, nothing
from .places import Root

if TYPE_CHECKING:
    from ..format import Qcow2

_SLICE = 4096

_KEEP, _COPY, _ZEROES = range(3)


class Relinker(Passing):
    """One pass over all tables, with counts that can be relied on; ``found``: the walk before.

    Without snapshots every guest cluster gets a host cluster of its own.  With them a cluster may
    be shared, as its count and its flags will say, and only what lies over metadata is copied.

    What LUKS encrypts reads as something else elsewhere, so there no guest cluster is copied:
    clusters are shared, tables give way to guest clusters, and an entry that names metadata, which
    read as noise, becomes a zero cluster.
    """

    def __init__(self, image: Qcow2, found: Checker) -> None:
        super().__init__(image, found)
        self.zero = ZERO_FLAG if self.header.version > 2 and self.stride == 1 else 0
        self.moved: dict[int, int] = {}
        """New places of guest clusters by (place of the L2 entry), not yet in the table."""
        self.moved_in: set[int] = set()
        """The tables of these L2 entries."""
        self.taken: set[int] = set()
        """Those of ``moved`` that a table has already."""
        self.kept: dict[int, array[int]] = {}
        """L2 tables that are the L1 table, as they were before that was changed."""
        self.common: set[int] = set()
        """Places of tables that several L1 entries name."""

    def run(self) -> Procedure:
        """Mend all entries."""
        yield from self._l1_place()
        if self.image.snapshot_table:
            yield from self._snapshot_places()
        self.claims = yield from self._structures()
        yield from self._tables()

    def _tables(self) -> Procedure:
        """Everything that the L1 tables name."""
        claims = self.claims
        roots: list[Root] = yield from self._roots()
        owners: dict[int, int] = {}  # the last L1 table that named an L2 table
        changed: list[list[int]] = [[] for _ in roots]
        places: list[tuple[int, int, int, bool]] = []  # number of the root, index, place, shared
        for number, root in enumerate(roots):
            l1 = root.entries
            for index in range(len(l1)):
                if index % _SLICE == 0:
                    yield Progress(index, len(l1))
                if not l1[index]:
                    continue
                new = yield from self._l1_entry(l1[index])
                if new != l1[index]:
                    self._say(f"L1 entry {index}", l1[index], new)
                    l1[index] = new
                    changed[number].append(index)
                place = new & OFFSET
                if not place:
                    continue
                if owners.get(place, number) != number:
                    owners[place] = number  # snapshots share tables
                    continue
                shared = bool(claims.get(place >> self.bits)) or self._is_guests(place)
                places.append((number, index, place, shared))
                if not shared:
                    claims.add(place >> self.bits)
                    owners[place] = number
        if self.found.counts.shared and not (self.external or self.fixed):
            yield from self._over_structures(
                {index: place for index, (_, _, place, _) in enumerate(places)}.values()
            )
        # Only now are L1 tables changed: guest clusters and tables may have lain over them.
        for root in roots:
            first = root.offset
            for place in {p for _, _, p, _ in places if 0 <= p - first < 8 * len(root.entries)}:
                self.kept[place] = yield from self._read_table(place)
        for root, indexes in zip(roots, changed, strict=True):
            yield from write_entries(root.offset, root.entries, indexes, "l1_update")
        if self.found.result.compressed_clusters and not self.sharing:
            yield from self._claim_packed({place: None for _, _, place, _ in places})
        self.common = {place for _, _, place, shared in places if shared}
        for done, (number, index, place, shared) in enumerate(places):
            yield from self._mend_table(roots[number], index, place, shared)
            yield Progress(done, len(places))

    def _is_guests(self, place: int) -> bool:
        """A table lies over what cannot be copied."""
        found = self.found
        tables = found.inactive.get(place, 0) + (place in found.active)
        return self.fixed and found.counts.get(place >> self.bits) > tables

    def _l1_entry(self, entry: int) -> Procedure:
        """What an L1 entry ought to be; 0 for one that names no table."""
        offset = entry & OFFSET
        if offset & (self.size - 1):
            offset &= -self.size
            if not (yield from self._is_lost_table(offset >> self.bits)):
                return 0
            return offset | COPIED
        if offset >> self.bits >= self.end:
            return 0
        return entry & (OFFSET | COPIED)

    def _is_lost_table(self, cluster: int) -> Procedure:
        """Nothing refers to the cluster, and it holds an L2 table without a fault: its place lost
        its lower bits."""
        if not self._unclaimed(cluster):
            return False
        table = yield from self._read_table(cluster << self.bits)
        for start in range(0, len(table), _SLICE):
            for entry in table[start : start + _SLICE : self.stride]:
                if entry & PACKED:
                    return False
                if entry and (self._entry(entry) != (_KEEP, entry) or not entry & OFFSET):
                    return False
            yield Progress(start, len(table))
        return any(table)

    def _unclaimed(self, cluster: int) -> bool:
        return (
            0 < cluster < self.end
            and not self.claims.get(cluster)
            and not self.found.counts.get(cluster)
        )

    def _read_table(self, place: int) -> Procedure:
        if place in self.kept:
            return self.kept[place][:]
        (raw,) = yield from self.found.read([(place, self.size)], "l2_load")
        return big_endian_array(64, raw)

    def _claim_packed(self, places: Iterable[int]) -> Procedure:
        """Compressed clusters stay where they are, and may share a host cluster."""
        for place in places:
            table = yield from self._read_table(place)
            for span in self.spans(table, everything):
                for entry in table[span.start : span.stop : self.stride]:
                    if entry & PACKED:
                        first, stop = self.image.hosts_of(entry)
                        self.claims.add_run(first, min(stop, self.end))
                yield Progress(span.start, len(table))

    def _over_structures(self, places: Iterable[int]) -> Procedure:
        """Copy the guest clusters that lie over tables, then let their entries name the copies
        (entries in what is no table's own place follow when that gets one)."""
        seen: dict[int, None] = dict.fromkeys(places)
        found: list[tuple[int, int, int]] = []
        for place in seen:
            table = yield from self._read_table(place)
            for span in self.spans(table, self.free_run):
                for index in span:
                    entry = table[index]
                    _, new = (_KEEP, 0) if entry & PACKED else self._entry(entry)
                    host = 0 if new & self.zero else new & OFFSET
                    if host and self.claims.get(host >> self.bits):
                        found.append((place, index, host >> self.bits))
                self._bound(len(found))
                yield Progress(span.start, len(table))
        if not found:
            return
        fresh = yield from self._take(len(found))
        yield from self._copy(zip([host for _, _, host in found], fresh, strict=True))
        yield Barrier()
        for (place, index, _), cluster in zip(found, fresh, strict=True):
            self.moved[place + 8 * index] = cluster << self.bits | COPIED
            self.moved_in.add(place)
        yield from self._link(found)

    def _link(self, found: list[tuple[int, int, int]]) -> Procedure:
        hard = yield from self._structures()
        by_table: dict[int, list[int]] = {}
        for place, index, _ in found:
            by_table.setdefault(place, []).append(index)
        for place, indexes in by_table.items():
            if hard.get(place >> self.bits):
                continue
            table = yield from self._read_table(place)
            for index in indexes:
                new = self.moved[place + 8 * index]
                self._say(f"L2 entry {index} at {place:#x}", table[index], new)
                table[index] = new
            yield from write_entries(place, table, indexes, "l2_update")

    # -- entries
    def _entry(self, entry: int) -> tuple[int, int]:
        """What is to be done with a standard L2 entry, and what it is to be, as far as that does
        not depend on other entries."""
        new = entry & (OFFSET | COPIED | self.zero)
        host = new & OFFSET
        if not host:
            return _KEEP, new
        if self.external:
            return _KEEP, new
        lost = host >> self.bits >= self.end
        if host & (self.size - 1):
            host &= -self.size
            # Of a place that lost its lower bits, what is there may be what was meant.
            lost = bool(new & self.zero) or not self._unclaimed(host >> self.bits)
            new = host | COPIED
        if not lost:
            return _KEEP, new
        if self.zero:
            return _KEEP, ZERO_FLAG
        return (_ZEROES if self.header.backing_file and self.stride == 1 else _KEEP), 0

    def _packed_entry(self, entry: int) -> tuple[int, int]:
        """The same for a compressed one, which may be cut off by the end of the file."""
        new = entry & ~COPIED
        host, length = self.image.packed_range(new)
        end = self.end << self.bits
        if host >= end:
            if self.zero:
                return _KEEP, ZERO_FLAG
            return (_ZEROES if self.header.backing_file and self.stride == 1 else _KEEP), 0
        if host + length > end:
            shift = self.image.packed_bits
            sectors = (end - 1 >> 9) - (host >> 9)
            new = PACKED | sectors << shift | host
        return _KEEP, new

    def _mend_table(self, root: Root, l1_index: int, place: int, shared: bool) -> Procedure:
        """Mend the entries of one L2 table; one that is ``shared`` is written to a new place."""
        table = yield from self._read_table(place)
        changed: list[int] = []
        sources: list[tuple[int, int]] = []  # (index, host cluster, -1 for zeroes)
        if self.external:
            base = l1_index * len(table) // self.stride << self.bits
            for start in range(0, len(table), _SLICE):
                stop = min(start + _SLICE, len(table))
                self.changed_external(table, place, base, (start, stop), changed)
                yield Progress(start, len(table))
        else:
            run = nothing if place in self.moved_in else self.claim_run
            for span in self.spans(table, run):
                self._look(table, place, span, changed, sources)
                yield Progress(span.start, len(table))
        if sources or shared:
            yield from self._give_places(table, sources, changed)
        if shared:
            yield from self._move_table(root, l1_index, table)
        else:
            if place in self.common:  # it is read again for the next L1 entry
                for index, _ in sources:
                    self.moved[place + 8 * index] = table[index]
                    self.moved_in.add(place)
                    self.taken.add(place + 8 * index)
            yield from write_entries(place, table, changed, "l2_update")

    def _look(
        self,
        table: array[int],
        place: int,
        span: range,
        changed: list[int],
        sources: list[tuple[int, int]],
    ) -> None:
        claims = self.claims
        for index in span:
            entry = table[index]
            at = place + 8 * index
            if self.moved and at in self.moved:
                # A copy of its own, made just now; the next table that names it gets another.
                entry = table[index] = self.moved[at]
                if at in self.taken:
                    sources.append((index, (entry & OFFSET) >> self.bits))
                self.taken.add(at)
                continue
            if self.stride == 2:
                self._mend_bitmap(table, index, changed)
            if not entry:
                continue
            kind, new = self._packed_entry(entry) if entry & PACKED else self._entry(entry)
            if kind == _ZEROES:
                sources.append((index, -1))
                continue
            if not new & PACKED and (host := (new & OFFSET) >> self.bits):
                if not claims.get(host):
                    if not self.sharing:
                        claims.add(host)
                elif new & self.zero or self.fixed:
                    new = self.zero
                else:
                    sources.append((index, host))
                    continue
            if new != entry:
                self._say(f"L2 entry {index} at {place:#x}", entry, new)
                table[index] = new
                changed.append(index)
                if self.stride == 2 and not new & OFFSET:
                    # What was at a place that is none reads as zeroes.
                    bitmap = ALL if entry & PACKED else table[index + 1]
                    table[index + 1] = (bitmap | bitmap << 32) & FULL_ZEROES
                    changed.append(index + 1)

    def _give_places(
        self, table: array[int], sources: list[tuple[int, int]], changed: list[int]
    ) -> Procedure:
        """Copy what the entries name and let them name the copies."""
        for start in range(0, len(sources), _SLICE):
            part = sources[start : start + _SLICE]
            fresh = yield from self._take(len(part))
            copies = [(host, new) for (_, host), new in zip(part, fresh, strict=True) if host >= 0]
            yield from self._copy(copies)
            for (index, host), cluster in zip(part, fresh, strict=True):
                if host < 0:
                    blank = MetaWrite(SLOT, cluster << self.bits, bytes(self.size), "cow_write")
                    yield Write([blank])
                new = cluster << self.bits | COPIED
                self._say(f"L2 entry {index}", table[index], new)
                table[index] = new
                changed.append(index)
        yield Barrier()

    def _move_table(self, root: Root, l1_index: int, table: array[int]) -> Procedure:
        (cluster,) = yield from self._take(1)
        place = cluster << self.bits
        yield Write([MetaWrite(SLOT, place, big_endian_bytes(table), "l2_alloc_write")])
        yield Barrier()
        l1 = root.entries
        self._say(f"L1 entry {l1_index}", l1[l1_index], place | COPIED)
        l1[l1_index] = place | COPIED
        yield from write_entries(root.offset, l1, [l1_index], "l1_update")
