"""What all parts of the qcow2 machine share: geometry, the tables that stay in memory, and the
record of what of them is dirty."""

from __future__ import annotations

import errno
from array import array
from collections.abc import Mapping, Sequence

from ....abilities import Codec
from ....bitmaps import BitmapSet
from ....contract import Groups, HostRange, NeedMeta, Plan, Range, Table, TableStore
from ....errors import CorruptImage, MalformedImage, UnsupportedFeature
from ....hints import TYPE_CHECKING, Any, ClassVar
from ....ondisk import zeros
from .. import header as hd
from ..header import Header
from .runs import Run, RunSet

if TYPE_CHECKING:
    from ..bitmaps.use import Directory
    from ..snapshots.table import Snapshot
    from .refblock import RefBlock

COPIED = 1 << 63
PACKED = 1 << 62
ZERO_FLAG = 1
OFFSET = (1 << 56) - (1 << 9)  # bits 9-55 of an L1, L2 or refcount table entry
REFTABLE_OFFSET_MASK = (1 << 64) - (1 << 9)

SLOT, DATA_SLOT = "file", "data-file"
L2_LOAD, REFBLOCK_LOAD = "l2_load", "refblock_load"
_PART = 4096
# The window of compressed data: 2**12 bytes, no header.
_WINDOW = -12


def is_writable(options: Mapping[str, Any]) -> bool:
    """Whether an image that is opened with these options may be written to."""
    return bool(options.get("writable", not options.get("read-only", False)))


class Core:
    """State of one open image.

    ``l1`` and ``reftable`` are bounded by the header checks (32 MiB, 8 MiB) and stay in memory;
    L2 tables (``array('Q')``) and refcount blocks live in ``tables``.  Of a dirty table only the
    changed parts of 4 KiB are written; entries are 8 bytes aligned, so a torn sector tears none.
    """

    name: ClassVar[str] = "qcow2"
    cipher_unit = 1
    tables: TableStore

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.writable = is_writable(options)
        self.size = 0
        self.unit = 1 << 16
        self.has_backing = False
        """False: unallocated clusters read as zeroes (no backing file, or it is switched off)."""
        self.refuse_io: str | None = None
        """The feature that keeps guest data from being read or written; None when nothing does."""
        self.refuse_write: str | None = None
        """The same for writing alone."""
        self.bitmaps = BitmapSet()
        """Those of the image, and whatever else follows the writes of this disk."""
        self.directory: Directory | None = None
        """Of the bitmaps on disk; None where none counts."""
        self.bitmap_error: MalformedImage | None = None
        """Why the bitmaps of an image that is only read cannot be told."""
        self.use_header(Header())
        self.l1: array[int] = zeros(64, 0)
        self.reftable: array[int] = zeros(64, 0)
        self.snapshot_table: list[Snapshot] = []
        """The internal snapshots."""
        self.snapshot_bytes = 0
        """Length of their table in the file."""
        self.snapshot_damage: MalformedImage | None = None
        """Why their table could not be read, in an image that is opened to be checked."""
        self.sharing_dirty = False
        """The dirty bit stands for flags and counts that a procedure is changing."""
        self.ready = False
        """No autoclear bit is left to be dropped, so data may be written in place."""
        self.announced = False
        """Every `before` group is durable: the map may change."""
        self.broken = False
        """Metadata were found that a write must not go by: nothing is written any more."""
        self._checked: set[int] = set()
        """Places of L2 tables without entries that point at metadata: only through them may data
        be written in place."""
        self._parts: dict[int, set[int]] = {}
        self._l1_parts: set[int] = set()
        self._reftable_parts: set[int] = set()
        self._new_l2: set[int] = set()
        self._asked_blocks: set[int] = set()
        self._short: dict[int, array[int]] = {}
        self._short_write: dict[int, array[int]] = {}
        self._wide: dict[int, array[int]] = {}
        self._wide_write: dict[int, array[int]] = {}
        self._generation = -1
        self._codec: Codec | None = None
        self.freeing = "other"
        """Why clusters are freed just now; see `discards`."""
        self.keeps = False
        """A discard keeps the host clusters (discard-no-unref)."""
        self.free = RunSet()
        self.clean = RunSet()
        self.quarantine = RunSet()
        self.reserved = RunSet()
        self.cursor = 0
        self.fresh = 0

    def use_header(self, h: Header) -> None:
        """Take the geometry from a checked header."""
        self.header = h
        self.size = h.size
        self.external = bool(h.incompatible & hd.DATA_FILE)
        """Guest data are in a file of their own, each byte at its guest offset."""
        self.data_slot = DATA_SLOT if self.external else SLOT
        self.cluster_bits = bits = h.cluster_bits
        self.unit = self.cluster_size = 1 << bits
        self.cluster_mask = self.cluster_size - 1
        self.extended = bool(h.incompatible & hd.EXTENDED_L2)
        self.stride = 2 if self.extended else 1
        """Words of 64 bits that make an L2 entry."""
        self.entry_bits = 4 if self.extended else 3
        self.zero_unit = self.unit >> 5 if self.extended else self.unit
        self.l2_bits = bits - self.entry_bits
        self.l2_mask = (1 << self.l2_bits) - 1
        self.l1_shift = bits + self.l2_bits
        order = h.refcount_order if h.version > 2 else 4
        self.refcount_bits = 1 << order
        self.block_shift = bits + 3 - order
        self.per_block = 1 << self.block_shift
        self.part_bits = min(_PART, self.cluster_size).bit_length() - 1
        wanted = self.options.get("lazy-refcounts")
        by_header = bool(h.compatible & hd.LAZY_REFCOUNTS)
        self.lazy = h.version > 2 and (by_header if wanted is None else bool(wanted))

    @property
    def raw_data(self) -> bool:
        """The data file is to read like the disk."""
        return self.external and bool(self.header.autoclear & hd.RAW_DATA_FILE)

    @property
    def max_clusters(self) -> int:
        """Host clusters that an entry of 56 bits, and the caller's limit, can address."""
        limit = hd.MAX_OFFSET >> self.cluster_bits
        most = self.options.get("max_file_size")
        return limit if most is None else min(limit, int(most) >> self.cluster_bits)

    # -- what this version does not do
    def check_read(self) -> None:
        """Raise UnsupportedFeature by name when guest data cannot be read."""
        if self.refuse_io is not None:
            raise UnsupportedFeature(self.refuse_io)

    def check_write(self) -> None:
        """Raise UnsupportedFeature by name when guest data cannot be written."""
        self.check_read()
        if self.refuse_write is not None:
            raise UnsupportedFeature(self.refuse_write)
        if not self.writable:
            raise PermissionError(1, "Operation not permitted: the image was opened read-only")
        if self.broken:
            raise OSError(errno.EIO, "Input/output error: the image is corrupt")

    # -- writing, as far as an image is asked that is only read
    @property
    def pack_codec(self) -> Codec | None:
        """See :attr:`.packing.Packing.pack_codec`; None, for nothing is stored."""
        return None

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta | None:
        """See :meth:`.planning.Planner.plan`; raises what keeps the image from being written."""
        self.check_write()
        raise NotImplementedError

    def commit(self, plan: Plan) -> None:
        """There is none."""

    def abort(self, plan: Plan) -> None:
        """There is none."""

    def freeze(self) -> Groups:
        """Nothing is dirty."""
        return Groups([])

    def settle(self, token: Any) -> list[HostRange]:
        """Nothing becomes free."""
        return []

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Nothing was free."""

    def discards(self, what: str) -> bool:
        """Whether host space is given back to the file below when it becomes free by a ``request``
        of the guest, with a ``snapshot`` or for any ``other`` reason."""
        asked = self.options.get(f"pass-discard-{what}")
        return asked is None or bool(asked)

    def zeroes(self, guest: int, host: int, length: int) -> bytes:
        """What reads as zeroes at ``guest``, stored at ``host``."""
        return bytes(length)

    # -- compressed clusters
    @property
    def codec(self) -> Codec:
        """Of the compression type in the header, at the level of the options."""
        if self._codec is None:
            level = self.options.get("compression-level")
            if self.header.compression_type:
                from ....codecs.zstd import Zstd

                self._codec = Zstd() if level is None else Zstd(level)
            else:
                from ....codecs.deflate import Deflate

                self._codec = Deflate(level, _WINDOW)
        return self._codec

    @property
    def packed_bits(self) -> int:
        """Bits of a compressed cluster's descriptor that hold the host offset; above them up to
        bit 61 stands how many sectors the data touch beyond the first."""
        return 62 - (self.cluster_bits - 8)

    def packed_range(self, entry: int) -> Range:
        """(offset, length) of the host bytes that the descriptor of a compressed cluster names, to
        the end of their last sector: at most two clusters."""
        shift = self.packed_bits
        host = entry & (1 << shift) - 1
        sectors = ((entry & PACKED - 1) >> shift) + 1
        return host, (sectors << 9) - (host & 511)

    def hosts_of(self, entry: int) -> Run:
        """The host clusters that an L2 entry refers to, an empty run for none (those of a data
        file are nobody else's, and have no reference counts)."""
        bits = self.cluster_bits
        if self.external:
            return (0, 0)
        if entry & PACKED:
            host, length = self.packed_range(entry)
            return host >> bits, ((host + length - 1) >> bits) + 1
        host = (entry & OFFSET) >> bits
        return (host, host + 1) if host else (0, 0)

    # -- tables
    def l2_offset(self, l1_index: int) -> int:
        """Where the L2 table of an L1 entry is; 0 without one.  Raises CorruptImage."""
        offset = self.l1[l1_index] & OFFSET
        if offset & (self.cluster_size - 1):
            raise CorruptImage(
                f"L2 table offset {offset:#x} unaligned (L1 index: {l1_index:#x})",
                field="L1 entry",
                offset=self.header.l1_offset + 8 * l1_index,
            )
        return offset

    def l2_table(self, offset: int) -> Table | None:
        """The decoded L2 table at ``offset``, None when it is not in memory."""
        table = self.tables.get(SLOT, offset)
        if table is not None and type(table.data) is not array:
            raise CorruptImage("L2 table overlaps a refcount block", offset=offset)
        return table

    def block_offset(self, index: int) -> int:
        """Where a refcount block is; 0 without one.  Raises CorruptImage."""
        if index >= len(self.reftable):
            return 0
        offset = self.reftable[index] & REFTABLE_OFFSET_MASK
        if offset & (self.cluster_size - 1) or offset >= hd.MAX_OFFSET:
            raise CorruptImage(
                f"Refblock offset {offset:#x} unaligned (reftable index: {index:#x})",
                field="refcount table entry",
                offset=self.header.reftable_offset + 8 * index,
            )
        return offset

    def block_table(self, offset: int) -> Table | None:
        """The refcount block at ``offset``; None (and remembered as asked) when not in memory."""
        table = self.tables.get(SLOT, offset)
        if table is None:
            self._asked_blocks.add(offset)
        elif type(table.data) is array:
            raise CorruptImage("Refcount block overlaps an L2 table", offset=offset)
        return table

    # -- dirty parts
    def touch_l2(self, table: Table, start: int, stop: int) -> None:
        """Entries [start, stop) of an L2 table changed."""
        self._touch(table, start << self.entry_bits, stop << self.entry_bits)

    def touch_block(self, table: Table, start: int, stop: int) -> None:
        """Counts [start, stop) of a refcount block changed."""
        bits = self.refcount_bits
        self._touch(table, start * bits >> 3, (stop * bits + 7) >> 3)

    def _touch(self, table: Table, start: int, stop: int) -> None:
        shift = self.part_bits
        parts = self._parts.get(table.offset)
        if parts is None:
            parts = self._parts[table.offset] = set()
        parts.update(range(start >> shift, ((stop - 1) >> shift) + 1))
        if not table.dirty:
            self.tables.mark(table)

    def set_l1(self, l1_index: int, entry: int) -> None:
        """Change an L1 entry."""
        self.l1[l1_index] = entry
        self._l1_parts.add(l1_index >> (self.part_bits - 3))
        for shortcuts in (self._short, self._short_write, self._wide, self._wide_write):
            shortcuts.pop(l1_index, None)

    def replace_l1(self, entries: array[int]) -> None:
        """Take another L1 table, which is on the disk as it is."""
        self.l1 = entries
        self._l1_parts = set()
        for shortcuts in (self._short, self._short_write, self._wide, self._wide_write):
            shortcuts.clear()

    def set_reftable(self, index: int, offset: int) -> None:
        """Change an entry of the refcount table."""
        self.reftable[index] = offset
        self._reftable_parts.add(index >> (self.part_bits - 3))

    def block(self, table: Table) -> RefBlock:
        """The counts in a table."""
        data: RefBlock = table.data
        return data
