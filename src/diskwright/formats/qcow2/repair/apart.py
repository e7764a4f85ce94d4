"""Places of their own for all tables, and for the guest clusters that lie over them.

Everything new is written behind the end of the file, counted and durable; then one sector of the
header switches to it.  Before that nothing is written over, and afterwards nothing lies over an L1
or L2 table any more, so these can be changed where they are.
"""

from __future__ import annotations

from array import array

from ....contract import Barrier, MetaWrite, Procedure, Progress, Write
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_bytes
from ....records import NamedTuple
from ..bitmaps.mark import Marker
from ..check.checking import Checker
from ..machine.core import COPIED, OFFSET, PACKED, SLOT
from ..snapshots.table import encode_table
from .mending import write_entries
from .passing import Passing, nothing
from .places import Root

if TYPE_CHECKING:
    from ..format import Qcow2

_SLICE = 4096
ACTIVE = 0
"""The number of the L1 table that is the disk's own."""
_L1_SIZE_AT, _SNAPSHOTS_END = 36, 72
"""Of the header: the places of the L1 table, the refcount table and the snapshot table."""


class Use(NamedTuple):
    """An L2 table at byte ``place``, named by entry ``l1_index`` of the L1 table number ``root``.
    ``shared``: how many other things are there, or entries of that L1 table before this one;
    ``times``: how many L1 tables share it in good order."""

    root: int
    l1_index: int
    place: int
    shared: int
    times: int


class Link(NamedTuple):
    """The L2 entry that is word ``at`` of its table is to have a copy of the host clusters
    [first, stop); of none: a cluster of zeroes."""

    at: int
    first: int
    stop: int


class Apart(Passing):
    """The first part of a `Relinker`."""

    def __init__(self, image: Qcow2, found: Checker) -> None:
        super().__init__(image, found)
        self.fresh: set[int] = set()
        """Where copies of guest clusters begin that have one reference."""
        self.marker = Marker(self)

    def part(self) -> Procedure:
        """Bring everything apart; returns each L2 table once, as a list of `Use`."""
        self.claims = yield from self._structures()
        roots: list[Root] = yield from self._roots()
        changed: list[list[int]] = [[] for _ in roots]
        uses: list[Use] = yield from self._uses(roots, changed)
        over = not (self.external or self.fixed)
        names: dict[int, int] = {}  # what is to be named instead of the table at a place
        moved = False
        for number, use in enumerate(uses):
            yield Progress(number, len(uses))
            if not (use.shared or (over and self.found.counts.shared)):
                continue
            table = yield from self._read_table(use.place)
            links: list[Link] = (yield from self._links(table, use.shared)) if over else []
            if not (use.shared or links):
                continue
            entry: int = yield from self._renewed(table, links, use.times)
            if use.shared:
                roots[use.root].entries[use.l1_index] = entry
                changed[use.root].append(use.l1_index)
            else:
                names[use.place] = entry
            self._say(f"L2 table of L1 entry {use.l1_index}", use.place, entry & OFFSET)
            uses[number] = use._replace(place=entry & OFFSET)
            moved = True
        if names:
            yield from self._rename(roots, names, changed)
        displaced = self._displaced(roots)
        if moved or displaced or self._snapshot_table_lost():
            displaced.update(number for number, indexes in enumerate(changed) if indexes)
            yield from self._switch(roots, displaced)
        else:
            for root, indexes in zip(roots, changed, strict=True):
                yield from write_entries(root.offset, root.entries, indexes, "l1_update")
        return uses

    # -- tables
    def _uses(self, roots: list[Root], changed: list[list[int]]) -> Procedure:
        """What the L1 tables name, each table once (snapshots share them); mends their entries in
        memory."""
        claims = self.claims
        owners: dict[int, int] = {}  # the last L1 table that named an L2 table
        out: list[Use] = []
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
                    if number == ACTIVE and (new ^ l1[index]) & OFFSET:
                        yield from self.marker.mark(index * self.span, (index + 1) * self.span)
                    l1[index] = new
                    changed[number].append(index)
                place = new & OFFSET
                if not place:
                    continue
                if owners.get(place, number) != number:
                    owners[place] = number
                    continue
                shared = claims.get(place >> self.bits) or int(self._is_guests(place))
                times = 1 if shared else self._sharers(place)
                out.append(Use(number, index, place, shared, times))
                claims.add(place >> self.bits)
                if not shared:
                    owners[place] = number
        return out

    def _sharers(self, place: int) -> int:
        """How many L1 tables name an L2 table."""
        found = self.found
        return max(found.inactive.get(place, 0) + (place in found.active), 1)

    def _is_guests(self, place: int) -> bool:
        """A table lies over what cannot be copied."""
        return self.fixed and self.found.counts.get(place >> self.bits) > self._sharers(place)

    def _links(self, table: array[int], shared: int) -> Procedure:
        """The entries of a table whose guest clusters lie over tables, or that nobody can count
        when a copy of a ``shared`` table names them, too; those that it can name are counted."""
        out: list[Link] = []
        for span in self.spans(table, nothing if shared else self.free_run):
            for index in span:
                entry = table[index]
                if entry & PACKED:
                    first, stop = self.image.hosts_of(entry)
                    stop = min(stop, self.end)
                else:
                    _, new = self._entry(entry)
                    first = 0 if new & self.zero else (new & OFFSET) >> self.bits
                    stop = first + 1 if first else 0
                if any(self.claims.used(first, stop)) or self._crowded(first, stop, shared > 0):
                    out.append(Link(index, first, stop))
                elif shared:
                    self._name_once_more(first, stop)
            self._bound(len(out))
            yield Progress(span.start, len(table))
        return out

    def _renewed(self, table: array[int], links: list[Link], times: int) -> Procedure:
        """Write a table to a new place, with copies of what ``links`` name; returns the L1 entry.
        ``times``: how many L1 tables will name it."""
        yield from self._give_places(table, links, times)
        (cluster,) = yield from self.take(1, times)
        place, data = cluster << self.bits, big_endian_bytes(table)
        yield Write([MetaWrite(SLOT, place, data, "l2_alloc_write")])
        return place | (COPIED if times == 1 else 0)

    def _give_places(self, table: array[int], links: list[Link], times: int) -> Procedure:
        """Copy what entries of a table name, durably, and let them name the copies."""
        for start in range(0, len(links), _SLICE):
            part = links[start : start + _SLICE]
            fresh = yield from self.take(sum(stop - first < 2 for _, first, stop in part), times)
            copies: list[tuple[int, int]] = []
            for index, first, stop in part:
                count = stop - first
                new = fresh.pop() if count < 2 else (yield from self._take_run(count, times))
                copies += zip(range(first, stop), range(new, new + count), strict=True)
                place = new << self.bits
                if not count:
                    yield Write([MetaWrite(SLOT, place, bytes(self.size), "cow_write")])
                entry = place | (COPIED if times == 1 else 0)
                if count and table[index] & PACKED:
                    entry = self._packed_entry(table[index])[1] + (new - first << self.bits)
                self._say(f"L2 entry {index // self.stride}", table[index], entry)
                table[index] = entry
                self.fresh.add(new)
            yield from self._copy(copies)
        yield Barrier()

    def _rename(
        self, roots: list[Root], names: dict[int, int], changed: list[list[int]]
    ) -> Procedure:
        for number, root in enumerate(roots):
            for index, entry in enumerate(root.entries):
                if entry and (new := names.get(entry & OFFSET)) is not None:
                    root.entries[index] = new
                    changed[number].append(index)
                if index % _SLICE == 0:
                    yield Progress(index, len(root.entries))

    # -- L1 tables and the snapshot table
    def _displaced(self, roots: list[Root]) -> set[int]:
        """The L1 tables that are not in the file as a whole; of snapshots also those that lie over
        something."""
        out = set()
        for number, (offset, entries, snapshot) in enumerate(roots):
            if entries and not self._in_place(offset, 8 * len(entries), snapshot >= 0):
                out.add(number)
        return out

    def _in_place(self, offset: int, length: int, alone: bool) -> bool:
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if not 0 < first <= last < self.end:
            return False
        counts = self.found.counts
        return not alone or all(counts.get(cluster) < 2 for cluster in range(first, last + 1))

    def _snapshot_table_lost(self) -> bool:
        """The snapshot table is outside the file, lies over something, or lacks what version 3
        asks for."""
        image, h = self.image, self.header
        if not image.snapshot_table:
            return False
        if h.version > 2 and any(s.disk_size is None for s in image.snapshot_table):
            return True
        return not self._in_place(h.snapshots_offset, image.snapshot_bytes, True)

    def _switch(self, roots: list[Root], displaced: set[int]) -> Procedure:
        """Write these L1 tables anew, and the snapshot table if need be, and let the header name
        them."""
        image, h = self.image, self.header
        table = list(image.snapshot_table)
        l1_offset, snapshots_offset = h.l1_offset, h.snapshots_offset
        for number in sorted(displaced):
            root = roots[number]
            place = yield from self._region(big_endian_bytes(root.entries), "l1_grow_write_table")
            if root.snapshot < 0:
                l1_offset = place
                self.found.result.say(f"Repairing L1 table: it is at {place:#x} now")
            else:
                table[root.snapshot] = table[root.snapshot]._replace(l1_offset=place)
        if h.version > 2:
            table = [s if s.disk_size is not None else s._replace(disk_size=h.size) for s in table]
        if table != image.snapshot_table or self._snapshot_table_lost():
            data = encode_table(table)
            snapshots_offset = yield from self._region(data, "none")
            self.found.result.say(f"Repairing snapshot table: it is at {snapshots_offset:#x} now")
            image.snapshot_table, image.snapshot_bytes = table, len(data)
        yield Barrier()
        h.l1_offset, h.snapshots_offset = l1_offset, snapshots_offset
        fields = h.fields()[_L1_SIZE_AT:_SNAPSHOTS_END]
        yield Write([MetaWrite(SLOT, _L1_SIZE_AT, fields, "l1_grow_activate_table")])
        yield Barrier()
        image.reserve_structures()
        self.mended += 1
