"""Mending L2 entries that need no host cluster for it: those of an image with a data file, and the
bitmaps of extended ones."""

from __future__ import annotations

from array import array

from ..machine.core import COPIED, OFFSET, PACKED
from ..machine.submapping import ALL
from .places import Places

FULL_ZEROES = 0xFFFFFFFF << 32
"""The bitmap of an extended entry all of whose subclusters read as zeroes."""


class EntryMending(Places):
    """What of a `Relinker` looks at one entry alone."""

    external: bool
    stride: int
    zero: int

    def _say(self, what: str, old: int, new: int) -> None:
        self.mended += 1
        self.found.result.say(f"Repairing {what}: {old:x} is {new:x} now")

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
