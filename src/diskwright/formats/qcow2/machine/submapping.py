"""Where guest bytes are in an image with extended L2 entries (qcow2 specification, "Extended L2
Entries").

Such an entry is two words: a standard or compressed descriptor, and a bitmap of the 32 subclusters
of the cluster.  Its lower half says which are allocated in the host cluster, its upper half which
read as zeroes; both for one subcluster is corrupt.  The bitmap of a compressed cluster is 0.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ....errors import CorruptImage
from ....extents import Data, Extent, Hole, Zero
from ..header import MAX_OFFSET
from .core import COPIED, OFFSET, PACKED
from .mapping import Mapping

SUBCLUSTERS = 32
ALL = (1 << SUBCLUSTERS) - 1
ALL_ZERO = ALL << SUBCLUSTERS


def runs_of(mask: int) -> Iterator[tuple[int, int]]:
    """The runs (first, end) of the bits that are set, ascending."""
    at = 0
    while mask >> at:
        rest = mask >> at
        at += (rest & -rest).bit_length() - 1
        stop = at + ones(mask >> at)
        yield at, stop
        at = stop


def ones(mask: int) -> int:
    """How many bits are set in a row from bit 0 on."""
    return (~mask & mask + 1).bit_length() - 1


class SubMapping(Mapping):
    """The lookup of extended entries."""

    @property
    def sub_bits(self) -> int:
        """Of a subcluster's size."""
        return self.cluster_bits - 5

    def covering(self, start: int, end: int) -> int:
        """The subclusters that bytes [start, end) of a cluster touch."""
        bits = self.sub_bits
        return (1 << (end + self.zero_unit - 1 >> bits)) - (1 << (start >> bits))

    def pair(
        self, words: array[int], table_offset: int, index: int, guest: int
    ) -> tuple[int, int]:
        """The entry of the cluster at ``guest``, of which no more is left than what counts, and its
        bitmap: (PACKED, all allocated) for a compressed cluster, else the host offset with or
        without COPIED, or 0.

        Raises CorruptImage.
        """
        entry, bitmap = words[2 * index], words[2 * index + 1]
        if entry & PACKED and not self.external:
            return PACKED, ALL
        placed = self.place_of(entry, guest, table_offset, index) >= 0
        if bitmap >> SUBCLUSTERS & bitmap or (bitmap & ALL and not placed):
            raise self._invalid(table_offset, index)
        return (entry & (OFFSET | COPIED) if placed else 0), bitmap

    def place_of(self, entry: int, guest: int, table_offset: int, index: int) -> int:
        """Where the cluster at ``guest`` has its place by this standard entry, -1 for nowhere.

        Raises CorruptImage.
        """
        return self.host_of(entry, table_offset, index) or -1

    def placed(self, entry: int) -> int:
        """What says that a standard entry has a place: not 0 then."""
        return entry & OFFSET

    def _invalid(self, table_offset: int, index: int) -> CorruptImage:
        return CorruptImage(
            f"Invalid cluster entry found (L2 offset: {table_offset:#x}, L2 index: {index:#x})",
            field="subcluster bitmap",
            offset=table_offset + 16 * index + 8,
        )

    # -- shortcuts
    def _wide_table(self, l1_index: int, write: bool) -> array[int] | None:
        if self._generation != self.tables.generation:
            self._drop_shortcuts()
        known = self._wide_write if write else self._wide
        found = known.get(l1_index)
        if found is None:
            found = self._words(l1_index, write)
            if found is not None:
                known[l1_index] = found
        return found

    def map_wide(self, offset: int, length: int, write: bool) -> int:
        """Host offset of one request whose bytes are contiguous plain data; otherwise -1."""
        if write and not self.ready:
            return -1
        l1_index = offset >> self.l1_shift
        words = (self._wide_write if write else self._wide).get(l1_index)
        if words is None or self._generation != self.tables.generation:
            words = self._wide_table(l1_index, write)
            if words is None:
                return -1
        mask = self.cluster_mask
        inside = offset & mask
        place = (offset >> self.cluster_bits & self.l2_mask) << 1
        entry = words[place] ^ COPIED
        if (
            words[place + 1] == ALL
            and mask < entry < MAX_OFFSET
            and not entry & mask
            and inside + length <= mask + 1
        ):
            return entry + inside
        return self._wide_run(offset, length, write)

    def _wide_run(self, offset: int, length: int, write: bool) -> int:
        """The same where more than one subcluster by one must be looked at."""
        mask = self.cluster_mask
        inside = offset & mask
        left = inside + length
        at = offset >> self.cluster_bits
        expected = host = -1
        while True:
            table = self._wide_table(at >> self.l2_bits, write)
            if table is None:
                return -1
            place = (at & self.l2_mask) << 1
            entry = table[place]
            if entry & COPIED:
                entry ^= COPIED
            elif write:
                return -1
            if not mask < entry < MAX_OFFSET or entry & mask or (host >= 0 and entry != expected):
                return -1
            if table[place + 1] != ALL:
                wanted = self.covering(inside, min(left, mask + 1))
                if table[place + 1] & (wanted | wanted << SUBCLUSTERS) != wanted:
                    return -1
            if host < 0:
                host = entry + inside
                inside = 0
            left -= mask + 1
            if left <= 0:
                return host
            expected = entry + mask + 1
            at += 1

    # -- the general map
    def _wide_extent(self, table: array[int], table_offset: int, guest: int, stop: int) -> Extent:
        """The longest extent from ``guest``, not beyond ``stop`` or the table."""
        bits = self.cluster_bits
        index = guest >> bits & self.l2_mask
        entry, bitmap = table[2 * index], table[2 * index + 1]
        if entry & PACKED and not self.external:
            return self._packed(entry, table_offset + 16 * index, guest, stop)
        inside = guest & self.cluster_mask
        host = self.place_of(entry, guest - inside, table_offset, index)
        first = inside >> self.sub_bits
        kind = _kind(bitmap, first)
        if kind is None or (kind == _DATA and host < 0):
            raise self._invalid(table_offset, index)
        end = first + ones(_same(bitmap, kind) >> first)
        length = (end << self.sub_bits) - inside
        if end == SUBCLUSTERS and guest + length < stop:
            limit = index + ((stop - 1) >> bits) - (guest >> bits) + 1
            length += self._more(table, index, limit, kind)
        length = min(length, stop - guest)
        if kind == _HOLE:
            return Hole(length)
        if kind == _ZERO:
            return Zero(length, True, host + inside if host >= 0 else -1)
        writable = bool(entry & COPIED) and self.ready and table_offset in self._checked
        return Data(self.data_slot, host + inside, length, writable)

    def _more(self, table: array[int], index: int, limit: int, kind: int) -> int:
        """How many bytes of the entries behind ``index``, before ``limit``, continue a run of
        subclusters of this kind that reaches the end of its cluster."""
        size = self.cluster_size
        whole = (0, ALL, ALL_ZERO)[kind]
        entry = table[2 * index]
        step = size if self.placed(entry) and (kind != _HOLE or self.external) else 0
        length = 0
        for nth in range(index + 1, limit):
            entry += step
            found, bitmap = table[2 * nth], table[2 * nth + 1]
            if found != entry:
                if kind != _HOLE or found & PACKED or found & OFFSET & self.cluster_mask:
                    break
                if self.external and self.placed(found):
                    break  # it may be another's place
                entry = found
            if bitmap != whole:
                length += ones(_same(bitmap, kind)) << self.sub_bits
                break
            length += size
        return length


_HOLE, _DATA, _ZERO = range(3)


def _kind(bitmap: int, position: int) -> int | None:
    """What a subcluster is; None for one that is corrupt."""
    allocated, zero = bitmap >> position & 1, bitmap >> SUBCLUSTERS + position & 1
    if allocated:
        return None if zero else _DATA
    return _ZERO if zero else _HOLE


def _same(bitmap: int, kind: int) -> int:
    """The subclusters of this kind."""
    allocated, zero = bitmap & ALL, bitmap >> SUBCLUSTERS
    if kind == _DATA:
        return allocated & ~zero
    return zero & ~allocated if kind == _ZERO else ~(allocated | zero) & ALL
