"""What entries of L1 and L2 tables ought to be, as far as that does not depend on others."""

from __future__ import annotations

from array import array

from ....contract import Procedure, Progress, Read
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from ..check.checking import Checker
from ..machine.core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from ..machine.submapping import ALL
from .places import Places

if TYPE_CHECKING:
    from ..format import Qcow2

_SLICE = 4096
KEEP, ZEROES = range(2)
"""What is to be done with an entry: it is to be another one, or it needs a cluster of zeroes."""
FULL_ZEROES = 0xFFFFFFFF << 32
"""The bitmap of an extended entry all of whose subclusters read as zeroes."""


class EntryMending(Places):
    """What of a `Relinker` looks at one entry alone."""

    def __init__(self, image: Qcow2, found: Checker) -> None:
        super().__init__(image, found)
        self.stride = found.stride
        self.external = found.external
        self.span = (self.size // 8 // self.stride) << self.bits
        """Bytes of the disk that an L2 table maps."""
        self.zero = ZERO_FLAG if image.header.version > 2 and self.stride == 1 else 0

    def _say(self, what: str, old: int, new: int) -> None:
        self.mended += 1
        self.found.result.say(f"Repairing {what}: {old:x} is {new:x} now")

    # -- L1 entries
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
                if entry and (self._entry(entry) != (KEEP, entry) or not entry & OFFSET):
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
        (raw,) = yield Read(SLOT, [(place, self.size)], "l2_load")
        return big_endian_array(64, raw)

    # -- L2 entries
    def _entry(self, entry: int) -> tuple[int, int]:
        """What is to be done with a standard L2 entry, and what it is to be."""
        new = entry & (OFFSET | COPIED | self.zero)
        host = new & OFFSET
        if not host:
            return KEEP, new
        if self.external:
            return KEEP, new
        lost = host >> self.bits >= self.end
        if host & (self.size - 1):
            host &= -self.size
            # Of a place that lost its lower bits, what is there may be what was meant.
            lost = bool(new & self.zero) or not self._unclaimed(host >> self.bits)
            new = host | COPIED
        return (KEEP, new) if not lost else self._lost()

    def _lost(self) -> tuple[int, int]:
        """The same for one that names what is not there: it reads as zeroes."""
        if self.zero:
            return KEEP, ZERO_FLAG
        return (ZEROES if self.header.backing_file and self.stride == 1 else KEEP), 0

    def _packed_entry(self, entry: int) -> tuple[int, int]:
        """The same for a compressed one, which may be cut off by the end of the file."""
        new = entry & ~COPIED
        host, length = self.image.packed_range(new)
        end = self.end << self.bits
        if host >= end:
            return self._lost()
        if host + length > end:
            shift = self.image.packed_bits
            sectors = (end - 1 >> 9) - (host >> 9)
            new = PACKED | sectors << shift | host
        return KEEP, new

    def _mend_bitmap(self, table: array[int], index: int, changed: list[int]) -> None:
        """What the bitmap of an extended entry may not say: data where there is no cluster or a
        compressed one, and both data and zeroes (then the data stay)."""
        entry, old = table[index], table[index + 1]
        if entry & PACKED:
            new = 0
        elif not entry & (OFFSET | COPIED if self.external else OFFSET):
            new = old & FULL_ZEROES
        else:
            new = old & ~((old & old >> 32) << 32)
        if new != old:
            self._say(f"subclusters of L2 entry {index // 2}", old, new)
            table[index + 1] = new
            changed.append(index + 1)

    def changed_external(
        self, table: array[int], place: int, base: int, span: tuple[int, int], changed: list[int]
    ) -> None:
        """Mend the words ``span`` of an L2 table whose first cluster is the guest's at ``base``.

        A cluster can only be in its own place.  What a raw data file has there is right.  Of any
        other an entry that names another place, which nobody could read, becomes zeroes: at its
        own place may be what was discarded.  Lower bits are dropped.
        """
        for index in range(*span, self.stride):
            if self.stride == 2:
                self._mend_bitmap(table, index, changed)
            entry = table[index]
            own = base + (index // self.stride << self.bits)
            new = entry & (OFFSET | COPIED | self.zero)
            if entry & PACKED:
                new = own | COPIED if self.raw else self.zero
            elif new & (OFFSET | COPIED):
                if self.raw or (new & OFFSET) & -self.size == own:
                    new = own | COPIED | new & self.zero
                else:
                    new = self.zero
            if new == entry:
                continue
            self._say(f"L2 entry {index} at {place:#x}", entry, new)
            table[index] = new
            changed.append(index)
            if self.stride == 2 and (entry & PACKED or not new):
                bitmap = table[index + 1]
                if entry & PACKED:
                    bitmap = ALL
                table[index + 1] = bitmap if new else (bitmap | bitmap << 32) & FULL_ZEROES
                changed.append(index + 1)

    @property
    def raw(self) -> bool:
        """The data file reads like the disk."""
        return self.image.raw_data
