"""Mending the entries of L1 and L2 tables: every table and every guest cluster in a place of its
own.

What lies over something else gets a copy behind the end of the file, durable and counted before
an entry names it.  Guest clusters over tables are copied before any table is changed.  An entry
that names a place outside the file reads as zeroes, and so it does afterwards.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...contract import Barrier, MetaWrite, Procedure, Progress, Read, Table, Write
from ...errors import CorruptImage
from ...ondisk import big_endian_array, big_endian_bytes
from ..editing import ask, flush, unpin
from . import header as hd
from .checking import Checker
from .core import COPIED, OFFSET, PACKED, REFTABLE_OFFSET_MASK, SLOT, ZERO_FLAG
from .counts import Counts
from .mending import write_entries

if TYPE_CHECKING:
    from .format import Qcow2

_BATCH_BYTES = 1 << 20
_SLICE = 4096
# Bytes of copies beyond as many as the file has: more would be an image made to fill a disk.
_MOST_COPIES = 4 << 30

_KEEP, _COPY, _ZEROES = range(3)


class Relinker:
    """One pass over all tables, with counts that can be relied on; ``found``: the walk before."""

    def __init__(self, image: Qcow2, found: Checker) -> None:
        self.image = image
        self.header = image.header
        self.found = found
        self.bits, self.size = image.cluster_bits, image.cluster_size
        self.end = found.file_clusters
        self.claims = Counts()
        self.zero = ZERO_FLAG if self.header.version > 2 else 0
        self.moved: dict[int, int] = {}
        """New places of guest clusters by (place of the L2 entry), not yet in the table."""
        self.taken: set[int] = set()
        """Those of ``moved`` that a table has already."""
        self.kept: dict[int, array[int]] = {}
        """L2 tables that are the L1 table, as they were before that was changed."""
        self.common: set[int] = set()
        """Places of tables that several L1 entries name."""
        self.copies = 0
        self.mended = 0

    def run(self) -> Procedure:
        """Mend all entries."""
        yield from self._l1_place()
        yield from self._tables()

    # -- space
    def _take(self, count: int) -> Procedure:
        """``count`` clusters whose counts are durable."""
        self.copies += count
        self._bound(self.copies)
        image = self.image
        pins: list[Table] = []
        chosen = yield from ask(image, lambda: image.choose(count), pins)
        image.take(chosen)
        yield from flush(image)
        unpin(pins)
        out = [cluster for start, stop, _ in chosen for cluster in range(start, stop)]
        for cluster in out:
            self.claims.add(cluster)
        return out

    def _bound(self, copies: int) -> None:
        if copies > self.end + (_MOST_COPIES >> self.bits):
            raise CorruptImage("Could not repair image: too many of its clusters lie over others")

    def _copy(self, pairs: Iterable[tuple[int, int]]) -> Procedure:
        """Copy host clusters: (from, to)."""
        step = max(1, _BATCH_BYTES >> self.bits)
        todo = list(pairs)
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            raws = yield Read(SLOT, [(old << self.bits, self.size) for old, _ in part])
            yield Write(
                [
                    MetaWrite(SLOT, new << self.bits, raw, "cow_write")
                    for (_, new), raw in zip(part, raws, strict=True)
                ]
            )
            yield Progress(start, len(todo))

    def _l1_place(self) -> Procedure:
        """An L1 table that the file does not hold as a whole gets a new place."""
        image, h = self.image, self.header
        length = 8 * h.l1_size
        if not h.l1_size or (h.l1_offset + length - 1) >> self.bits < self.end:
            return
        count = -(-length >> self.bits)
        pins: list[Table] = []
        start: int = yield from ask(image, lambda: image.take_region(count), pins)
        yield from flush(image)
        unpin(pins)
        data = big_endian_bytes(image.l1).ljust(count << self.bits, b"\0")
        yield Write([MetaWrite(SLOT, start << self.bits, data, "l1_grow_write_table")])
        yield Barrier()
        h.l1_offset = start << self.bits
        fields = struct.pack(">IQ", h.l1_size, h.l1_offset)
        yield Write([MetaWrite(SLOT, hd.L1_OFFSET, fields, "l1_grow_activate_table")])
        yield Barrier()
        image.reserve_structures()
        self.mended += 1
        self.found.result.say(f"Repairing L1 table: it is at {h.l1_offset:#x} now")

    # -- claims
    def _claim(self, start: int, end: int) -> None:
        for cluster in range(start, end):
            self.claims.add(cluster)

    def _claim_structures(self) -> None:
        h, bits = self.header, self.bits
        self._claim(0, 1)
        self._claim(h.l1_offset >> bits, -(-(h.l1_offset + 8 * h.l1_size) >> bits))
        first = h.reftable_offset >> bits
        self._claim(first, first + h.reftable_clusters)
        for entry in self.image.reftable:
            if entry & REFTABLE_OFFSET_MASK:
                self.claims.add(entry >> bits)

    def _tables(self) -> Procedure:
        """Everything that the L1 table names."""
        self._claim_structures()
        l1, claims = self.image.l1, self.claims
        changed: list[int] = []
        shared: set[int] = set()
        places: list[tuple[int, int]] = []
        for index in range(len(l1)):
            if index % _SLICE == 0:
                yield Progress(index, len(l1))
            if not l1[index]:
                continue
            new = yield from self._l1_entry(l1[index])
            if new != l1[index]:
                self._say(f"L1 entry {index}", l1[index], new)
                l1[index] = new
                changed.append(index)
            place = new & OFFSET
            if place:
                places.append((index, place))
                if claims.get(place >> self.bits):
                    shared.add(index)
                else:
                    claims.add(place >> self.bits)
        if self.found.counts.shared:
            yield from self._over_structures(dict(places[::-1]).values())
        # Only now is the L1 table changed: guest clusters and tables may have lain over it.
        first = self.header.l1_offset
        for place in {place for _, place in places if 0 <= place - first < 8 * len(l1)}:
            self.kept[place] = yield from self._read_table(place)
        yield from write_entries(self.header.l1_offset, l1, changed, "l1_update")
        if self.found.result.compressed_clusters:
            yield from self._claim_packed({place: None for _, place in places})
        self.common = {place for index, place in places if index in shared}
        for done, (index, place) in enumerate(places):
            yield from self._mend_table(index, place, index in shared)
            yield Progress(done, len(places))

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
            for entry in table[start : start + _SLICE]:
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
        (raw,) = yield Read(SLOT, [(place, self.size)], "l2_load")
        return big_endian_array(64, raw)

    def _claim_packed(self, places: Iterable[int]) -> Procedure:
        """Compressed clusters stay where they are, and may share a host cluster."""
        for place in places:
            table = yield from self._read_table(place)
            for start in range(0, len(table), _SLICE):
                for entry in table[start : start + _SLICE]:
                    if entry & PACKED:
                        first, stop = self.image.hosts_of(entry)
                        self._claim(first, min(stop, self.end))
                yield Progress(start, len(table))

    def _over_structures(self, places: Iterable[int]) -> Procedure:
        """Copy the guest clusters that lie over tables, then let their entries name the copies
        (entries in what is no table's own place follow when that gets one)."""
        seen: dict[int, None] = dict.fromkeys(places)
        found: list[tuple[int, int, int]] = []
        for place in seen:
            table = yield from self._read_table(place)
            for start in range(0, len(table), _SLICE):
                for index, entry in enumerate(table[start : start + _SLICE], start):
                    _, new = (_KEEP, 0) if entry & PACKED else self._entry(entry)
                    host = 0 if new & self.zero else new & OFFSET
                    if host and self.claims.get(host >> self.bits):
                        found.append((place, index, host >> self.bits))
                self._bound(len(found))
                yield Progress(start, len(table))
        if not found:
            return
        fresh = yield from self._take(len(found))
        yield from self._copy(zip([host for _, _, host in found], fresh, strict=True))
        yield Barrier()
        for (place, index, _), cluster in zip(found, fresh, strict=True):
            self.moved[place + 8 * index] = cluster << self.bits | COPIED
        yield from self._link(found)

    def _link(self, found: list[tuple[int, int, int]]) -> Procedure:
        hard = Counts()
        self.claims, kept = hard, self.claims
        self._claim_structures()
        self.claims = kept
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
        return (_ZEROES if self.header.backing_file else _KEEP), 0

    def _packed_entry(self, entry: int) -> tuple[int, int]:
        """The same for a compressed one, which may be cut off by the end of the file."""
        new = entry & ~COPIED
        host, length = self.image.packed_range(new)
        end = self.end << self.bits
        if host >= end:
            if self.zero:
                return _KEEP, ZERO_FLAG
            return (_ZEROES if self.header.backing_file else _KEEP), 0
        if host + length > end:
            shift = self.image.packed_bits
            sectors = (end - 1 >> 9) - (host >> 9)
            new = PACKED | sectors << shift | host
        return _KEEP, new

    def _mend_table(self, l1_index: int, place: int, shared: bool) -> Procedure:
        """Mend the entries of one L2 table; one that is ``shared`` is written to a new place."""
        table = yield from self._read_table(place)
        changed: list[int] = []
        sources: list[tuple[int, int]] = []  # (index, host cluster, -1 for zeroes)
        for start in range(0, len(table), _SLICE):
            stop = min(start + _SLICE, len(table))
            self._look(table, place, (start, stop), changed, sources)
            yield Progress(start, len(table))
        if sources or shared:
            yield from self._give_places(table, sources, changed)
        if shared:
            yield from self._move_table(l1_index, table)
        else:
            if place in self.common:  # it is read again for the next L1 entry
                for index, _ in sources:
                    self.moved[place + 8 * index] = table[index]
                    self.taken.add(place + 8 * index)
            yield from write_entries(place, table, changed, "l2_update")

    def _look(
        self,
        table: array[int],
        place: int,
        span: tuple[int, int],
        changed: list[int],
        sources: list[tuple[int, int]],
    ) -> None:
        claims = self.claims
        for index in range(*span):
            entry = table[index]
            at = place + 8 * index
            if self.moved and at in self.moved:
                # A copy of its own, made just now; the next table that names it gets another.
                entry = table[index] = self.moved[at]
                if at in self.taken:
                    sources.append((index, (entry & OFFSET) >> self.bits))
                self.taken.add(at)
                continue
            if not entry:
                continue
            kind, new = self._packed_entry(entry) if entry & PACKED else self._entry(entry)
            if kind == _ZEROES:
                sources.append((index, -1))
                continue
            if not new & PACKED and (host := (new & OFFSET) >> self.bits):
                if not claims.get(host):
                    claims.add(host)
                elif new & self.zero:
                    new = ZERO_FLAG
                else:
                    sources.append((index, host))
                    continue
            if new != entry:
                self._say(f"L2 entry {index} at {place:#x}", entry, new)
                table[index] = new
                changed.append(index)

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

    def _move_table(self, l1_index: int, table: array[int]) -> Procedure:
        (cluster,) = yield from self._take(1)
        place = cluster << self.bits
        yield Write([MetaWrite(SLOT, place, big_endian_bytes(table), "l2_alloc_write")])
        yield Barrier()
        l1 = self.image.l1
        self._say(f"L1 entry {l1_index}", l1[l1_index], place | COPIED)
        l1[l1_index] = place | COPIED
        yield from write_entries(self.header.l1_offset, l1, [l1_index], "l1_update")

    def _say(self, what: str, old: int, new: int) -> None:
        self.mended += 1
        self.found.result.say(f"Repairing {what}: {old:x} is {new:x} now")
