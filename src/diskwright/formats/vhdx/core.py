"""What all parts of the VHDX machine share: geometry, tables and the places that are taken."""

from __future__ import annotations

import errno
from array import array
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from ...contract import Table, TableStore
from ...errors import CorruptImage
from ...hints import Any, ClassVar
from ...units import align_up
from . import structures as st
from .locator import Locator
from .metadata import Item, Parameters
from .replay import Overlay
from .structures import MIB, SLOT, Header, Region

# States of a payload block (2.5.1.1); 5 is what version 0.95 of the specification had for 3.
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, UNMAPPED_095, FULL, PARTIAL = 0, 1, 2, 3, 5, 6, 7
SB_PRESENT = 6
"""State of a sector bitmap block that is there (2.5.1.2)."""
STATE = 7
OFFSET = (1 << 64) - (1 << 20)

PART = 4096
"""Tables are as long as a sector of the log: a slice of the BAT, or a part of a bitmap block."""
ENTRIES = PART // 8
PART_BITS = 8 * PART
BITMAP_BLOCK = MIB
CHUNK_SECTORS = 1 << 23
"""Sectors for which a bitmap block has bits."""

BAT_LOAD, BITMAP_LOAD = "l2_load", "l2_load"


class Core:
    """State of one open image.

    Slices of the BAT (``array('Q')`` of 512 entries) and parts of sector bitmap blocks
    (``bytearray``) live in ``tables``, each at its own offset in the file.
    """

    name: ClassVar[str] = "vhdx"
    cipher_unit = 1
    sparse_slots = ("file",)
    """A block is large, and seldom all of it was written: its holes in the file read as zeroes."""
    tables: TableStore

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.writable = bool(options.get("writable", not options.get("read-only", False)))
        self.new_guid: Callable[[], bytes] = st.new_guid
        """Where random GUIDs come from."""
        self.size = 0
        self.unit = MIB
        self.has_backing = False
        """False: what is in no block reads as zeroes (no parent, or it is switched off)."""
        self.header = Header(0, 0, st.NO_GUID, st.NO_GUID, st.NO_GUID, 0, 1, MIB, MIB)
        self.regions: list[Region] = []
        self.bat = Region(st.BAT_REGION, 3 * MIB, MIB, True)
        self.metadata = Region(st.METADATA_REGION, 2 * MIB, MIB, True)
        self.items: list[Item] = []
        self.locator: Locator | None = None
        self.length = 0
        """Bytes of the file when it was opened (as a replayed log leaves it)."""
        self.fresh = 0
        """From here on nothing in the file is in use; a multiple of 1 MiB."""
        self.reserved: list[tuple[int, int]] = []
        """(start, end) of header section, log and regions, ascending."""
        self._reserved_end = 0
        self.overlay: Overlay | None = None
        """What a log holds that was not replayed, since the image is read-only."""
        self.opaque = False
        """The overlay lies over guest data somewhere: the shortcuts stand back."""
        self.used = 0
        """Where the last block ends that is in use and whose bytes are in the file."""
        self.installed = 0
        """The same for sector bitmap blocks, which come into the file with a freeze."""
        self.announced = False
        """The headers have the GUIDs of this session: the file may be changed."""
        self.ready = False
        """Data may be written in place."""
        self.broken = False
        """Metadata were found that a write must not go by: nothing is written any more."""
        self._short: dict[int, array[int]] = {}
        self._generation = -1
        self.use(Parameters(MIB, False, False, 0, 512, 4096, bytes(16)))

    def use(self, p: Parameters) -> None:
        """Take the geometry from checked metadata."""
        self.parameters = p
        self.size = p.size
        self.unit = self.block_size = self.cluster_size = p.block_size
        self.block_bits = p.block_size.bit_length() - 1
        self.fixed = p.leave_allocated
        self.differencing = p.has_parent
        self.sector_size = p.sector_size
        self.sector_bits = p.sector_size.bit_length() - 1
        self.ratio_bits = 23 + self.sector_bits - self.block_bits
        self.blocks = -(-p.size >> self.block_bits)
        self.bitmap_bytes = p.block_size >> self.sector_bits + 3
        """Bytes of the sector bitmap that stand for one block."""

    # -- the BAT
    def entries_for(self, blocks: int) -> int:
        """Entries that the BAT needs for so many payload blocks (2.5)."""
        if self.differencing:
            return -(-blocks >> self.ratio_bits) * ((1 << self.ratio_bits) + 1)
        return blocks + ((blocks - 1) >> self.ratio_bits) if blocks else 0

    def table_bytes(self, blocks: int) -> int:
        """Length of the BAT's region for so many payload blocks.

        A disk of none needs no table; QEMU refuses it without one for the bitmaps of 2^32 blocks
        (which is a hole of the file).
        """
        needed = 8 * self.entries_for(blocks) if blocks else 8 << 32 - self.ratio_bits
        return max(MIB, align_up(needed, MIB))

    def bat_index(self, block: int) -> int:
        """Where the entry of a payload block stands."""
        return block + (block >> self.ratio_bits)

    def bitmap_index(self, chunk: int) -> int:
        """Where the entry of a chunk's sector bitmap block stands."""
        return ((chunk + 1) << self.ratio_bits) + chunk

    def slice_offset(self, number: int) -> int:
        """The place of a slice of the BAT; entry i is in slice ``i // 512``."""
        return self.bat.offset + number * PART

    def slice_table(self, number: int) -> Table | None:
        """A slice of the BAT, None when it is not in memory."""
        return self.tables.get(SLOT, self.slice_offset(number))

    def set_entry(self, table: Table, index: int, entry: int) -> None:
        """Change entry ``index`` (of the whole BAT), which is in ``table``."""
        table.data[index % ENTRIES] = entry
        short = self._short.get(index // ENTRIES)
        if short is not None:
            short[index % ENTRIES] = entry & OFFSET if entry & STATE == FULL else -1
        self.tables.mark(table)

    def entry_field(self, index: int) -> int:
        """The place of a BAT entry in the file."""
        return self.bat.offset + 8 * index

    # -- places
    def reserve_structures(self) -> None:
        """Note what no block may lie on."""
        h = self.header
        parts = [(0, st.HEADER_SECTION)]
        if h.log_length:
            parts.append((h.log_offset, h.log_offset + h.log_length))
        parts += [(region.offset, region.end) for region in self.regions]
        self.reserved = sorted(parts)
        self._reserved_end = max(end for _, end in parts)

    def move_bat(self, regions: list[Region], bat: Region) -> None:
        """The region tables on disk have these regions now."""
        self.regions, self.bat = regions, bat
        self._short.clear()
        self.reserve_structures()

    def host_of(self, entry: int, index: int, length: int) -> int:
        """Where the block of ``length`` bytes lies that a BAT entry points at.

        Raises CorruptImage when that is not in the file, or on a structure.  The last block of a
        file may be cut off.
        """
        host = entry & OFFSET
        if host < self.fresh and not self.overlaps(host, length):
            return host
        raise self.bad_entry(entry, index, length)

    def overlaps(self, host: int, length: int) -> bool:
        """True when the range lies on a structure."""
        if host >= self._reserved_end:
            return False
        # They lie apart, so of those that begin before its end the last one reaches furthest.
        number = bisect_left(self.reserved, (host + length, 0)) - 1
        return number >= 0 and host < self.reserved[number][1]

    def bad_entry(self, entry: int, index: int, length: int) -> CorruptImage:
        """What is wrong with the place in a BAT entry."""
        host = entry & OFFSET
        if host < self.fresh and self.overlaps(host, length):
            what = "which is in use by the image's own structures"
        else:
            what = "which is behind the end of the file"
        return self._entry_error(f"points at {host:#x}, {what}", index)

    def bad_state(self, entry: int, index: int) -> CorruptImage:
        """A BAT entry has a state that it cannot have in this image."""
        return self._entry_error(f"has state {entry & STATE}, which it cannot have", index)

    def _entry_error(self, what: str, index: int) -> CorruptImage:
        return CorruptImage(
            f"BAT entry {index} {what}", field="BAT entry", offset=self.entry_field(index)
        )

    def set_length(self, length: int) -> None:
        """The file has ``length`` bytes; what is behind it is free."""
        self.length = length
        self.used = self.installed = 0
        ends = [length, *(end for _, end in self.reserved)]
        self.fresh = align_up(max(ends), MIB)

    # -- what must not be done
    def check_write(self) -> None:
        """Raise when guest data cannot be written."""
        if not self.writable:
            raise PermissionError(1, "Operation not permitted: the image was opened read-only")
        if self.broken:
            raise OSError(errno.EIO, "Input/output error: the image is corrupt")

    # -- sector bitmaps
    def bitmap_part(self, block: int) -> tuple[int, int]:
        """(offset in the chunk's bitmap block of the first byte for a payload block, chunk)."""
        chunk = block >> self.ratio_bits
        return (block - (chunk << self.ratio_bits)) * self.bitmap_bytes, chunk

    def bitmap_tables(self, bitmap: int, start: int, length: int) -> Sequence[int]:
        """Places of the parts with bytes [start, start + length) of the block at ``bitmap``."""
        first, last = start // PART, (start + length - 1) // PART
        return range(bitmap + first * PART, bitmap + (last + 1) * PART, PART)
