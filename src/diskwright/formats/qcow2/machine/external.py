"""Guest data in a file of their own (qcow2 specification, "External data file name" and the
incompatible bit of that name): every guest cluster has its place there, at its own offset."""

from __future__ import annotations

from array import array

from ....errors import CorruptImage
from ....extents import Data, Extent, Hole, Zero
from .core import COPIED, DATA_SLOT, OFFSET, PACKED, ZERO_FLAG
from .submapping import SubMapping


class External(SubMapping):
    """The map of images with a data file; other images pass through."""

    def _shortcut(self, l1_index: int, write: bool) -> array[int] | None:
        # The shortcuts answer with places in the image file.
        return None if self.external else super()._shortcut(l1_index, write)

    def _extent(self, table: array[int], table_offset: int, guest: int, stop: int) -> Extent:
        if not self.external:
            return super()._extent(table, table_offset, guest, stop)
        index = guest >> self.cluster_bits & self.l2_mask
        base = guest & ~self.cluster_mask
        limit = index + ((stop - 1) >> self.cluster_bits) - (guest >> self.cluster_bits) + 1
        entry = self._sound(table[index], base, table_offset, index)
        held = entry & (COPIED | OFFSET)
        step = self.cluster_size if held else 0
        nth = index + 1
        while nth < limit and table[nth] == entry + step * (nth - index):
            nth += 1
        length = min(stop, base + ((nth - index) << self.cluster_bits)) - guest
        if entry & ZERO_FLAG:
            return Zero(length, True, guest if held else -1)
        if held:
            writable = bool(entry & COPIED) and self.ready and table_offset in self._checked
            return Data(DATA_SLOT, guest, length, writable)
        return Hole(length)

    def _sound(self, entry: int, base: int, table_offset: int, index: int) -> int:
        """``entry``, which is that of the cluster at ``base``.  Raises CorruptImage."""
        where = f"(L2 offset: {table_offset:#x}, L2 index: {index:#x})"
        place = table_offset + (index << self.entry_bits)
        if entry & PACKED:
            raise CorruptImage(
                f"Compressed cluster entry found in image with external data file {where}",
                field="L2 entry",
                offset=place,
            )
        host = self.host_of(entry, table_offset, index)
        if host != base and (host or entry & COPIED):
            raise CorruptImage(
                f"External data file host cluster offset {host:#x} does not match guest cluster "
                f"offset: {base:#x}, L2 index: {index:#x}",
                field="L2 entry",
                offset=place,
            )
        return entry

    # -- the same by subcluster
    def place_of(self, entry: int, guest: int, table_offset: int, index: int) -> int:
        """See :meth:`.submapping.SubMapping.place_of`.  A place of 0 is one where COPIED is set."""
        if not self.external:
            return super().place_of(entry, guest, table_offset, index)
        return guest if self.placed(self._sound(entry, guest, table_offset, index)) else -1

    def placed(self, entry: int) -> int:
        """What says that a standard entry has a place: not 0 then."""
        return entry & (OFFSET | COPIED if self.external else OFFSET)

    def _wide_table(self, l1_index: int, write: bool) -> array[int] | None:
        # The shortcuts answer with places in the image file.
        return None if self.external else super()._wide_table(l1_index, write)
