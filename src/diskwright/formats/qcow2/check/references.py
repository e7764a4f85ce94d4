"""What the tables of a qcow2 image refer to, counted per host cluster.

One walk finds everything that refers to host clusters, in this order:

1. `Walker._structures`: the header, the active L1 table, the refcount table, an encryption header;
2. `snapwalk.count_snapshots`: the snapshot table and the snapshots' L1 tables;
3. `bitmapwalk.count_bitmaps`: directory, tables and clusters of persistent bitmaps;
4. the L2 tables of the active L1 table, then those that only snapshots have (`tablewalk`);
5. the refcount blocks.

A feature adds its references by `Walker.add_region`, or where it has L1 tables by
`Walker.inactive_l1`.
"""

from __future__ import annotations

from array import array

from ....contract import Length, Procedure, Progress, Read
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from .. import header as hd
from ..machine.core import COPIED, OFFSET, REFTABLE_OFFSET_MASK, SLOT
from .counts import CHUNK_BITS, Counts
from .meter import Meter
from .tablewalk import TableWalk

if TYPE_CHECKING:
    from ..image import Image

_L1_RESERVED = ~(OFFSET | COPIED) & (1 << 64) - 1
_READ_BYTES = 1 << 20
# Entries of L1 and refcount tables between two yields.
_SLICE = 8192


def uncovered(image: Image) -> list[str]:
    """What a check of the image cannot look at."""
    from ..snapshots.table import damage

    h = image.header
    lost = image.snapshot_damage is not None
    lost |= any(damage(h, snapshot) is not None for snapshot in image.snapshot_table)
    return ["internal snapshots"] if lost else []


class Walker(TableWalk):
    """Counts references into ``counts``; what breaks the specification goes into ``result``."""

    def __init__(self, image: Image, meter: Meter, most: int | None = None) -> None:
        """``most``: see `Counts`."""
        self.image = image
        self.header = image.header
        self.result = CheckResult()
        self.counts = Counts(most)
        self.bits = image.cluster_bits
        self.size = image.cluster_size
        self.stride = 2 if self.header.incompatible & hd.EXTENDED_L2 else 1
        self.batch = max(1, _READ_BYTES >> self.bits)
        self.external = bool(self.header.incompatible & hd.DATA_FILE)
        self.file_clusters = 0
        self.uncopied = False
        """An allocated entry without COPIED was met, so counts must be compared with flags."""
        self.packed: Counts | None = None
        """What compressed clusters alone refer to, for who sets it before the walk."""
        self.active: dict[int, int] = {}
        """The L2 tables of the active L1 table, in its order: offset, number of the entry; one that
        two entries share is walked once."""
        self.inactive: dict[int, int] = {}
        """How many snapshots refer to an L2 table, by its offset."""
        self.spans: tuple[array[int], array[int]] | None = None
        """The first cluster that each L2 table names and the end of them, in the order of the walk,
        where there may have to be another."""
        self.blocks: dict[int, int] = {}
        """Offsets of the usable refcount blocks by their index."""
        self.unsound = False
        """The refcount table or a block of it cannot be relied on, or lies over something."""
        self.meter = meter

    # -- the walk
    def walk(self, refcounts: bool = True) -> Procedure:
        """Count all references; entries that break the specification are corruptions.

        ``refcounts`` False leaves out the refcount table and its blocks.  When the counts did not
        fit (see `Counts`), `walk_on` goes on behind them.
        """
        h, result = self.header, self.result
        length = yield Length(SLOT)
        self.meter.passes += 1
        self.file_clusters = -(-length >> self.bits)
        result.total_clusters = -(-h.size >> self.bits)
        self._structures(refcounts)
        self.active, self.inactive = {}, {}
        yield from self._features()
        for start in range(0, len(self.image.l1), _SLICE):
            self._count_l1(self.image.l1[start : start + _SLICE], self.active, True, start)
            yield Progress(start, len(self.image.l1))
        self._expect(refcounts)
        yield from self.walk_tables()
        if refcounts:
            yield from self._refcount_blocks()

    def _expect(self, refcounts: bool) -> None:
        """Tell the meter what the walk, and comparing what it counts, will read."""
        if self.counts.first:
            return  # what further walks read was told by the first
        tables = len(self.active.keys() | self.inactive.keys())
        if self.counts.most is not None:
            # Each is read in the walk that counts what it names, and all of them in the first.
            once = self.counts.most << CHUNK_BITS
            tables += tables * max(0, self.file_clusters - once) // max(self.file_clusters, 1)
        if self.uncopied or self.counts.shared:
            tables += len(self.active)
        if refcounts:
            tables += sum(1 for entry in self.image.reftable if entry)
        self.meter.expect(tables << self.bits)

    def _features(self) -> Procedure:
        h = self.header
        if h.nb_snapshots:
            from ..snapshots.walk import count_snapshots

            yield from count_snapshots(self)
        if h.extension(hd.EXT_BITMAPS) is not None:
            from ..bitmaps.walk import count_bitmaps

            yield from count_bitmaps(self)

    def walk_on(self, refcounts: bool = True) -> Procedure:
        """Count the references to clusters behind those that were counted; says nothing that the
        first walk has said."""
        assert self.counts.limit is not None
        first, kept = self.counts, self.result
        shared = first.shared
        self.counts = Counts(first.most, self.counts.limit)
        self.result = CheckResult()
        yield from self.walk(refcounts)
        self.counts.shared |= shared
        self.result = kept

    def _structures(self, refcounts: bool) -> None:
        h = self.header
        self.add_region(0, self.size)
        if h.l1_size:
            self.add_region(h.l1_offset, h.l1_size * 8)
        if refcounts:
            whole = self.add_region(h.reftable_offset, h.reftable_clusters << self.bits)
            self.unsound |= not whole
        encryption = h.extension(hd.EXT_ENCRYPTION)
        if encryption is not None and len(encryption) == hd.POINTER.size:
            offset, length = hd.POINTER.unpack(encryption)
            if length:
                self.add_region(offset, length)

    def inactive_l1(self, offset: int, size: int) -> Procedure:
        """Count the L1 table of a snapshot, of ``size`` entries, and the L2 tables in it; what they
        refer to is counted with the active tables.  Returns False for one outside the file."""
        length = 8 * size
        if not length or not self.add_region(offset, length):
            return not length
        found: dict[int, int] = {}
        for at in range(0, length, _READ_BYTES):
            (raw,) = yield Read(SLOT, [(offset + at, min(_READ_BYTES, length - at))])
            entries = big_endian_array(64, raw)
            for start in range(0, len(entries), _SLICE):
                self._count_l1(entries[start : start + _SLICE], found, False, start)
                yield Progress(start, len(entries))
        for table in found:
            self.inactive[table] = self.inactive.get(table, 0) + 1
        return True

    def _count_l1(
        self, entries: array[int], offsets: dict[int, int], active: bool, first: int
    ) -> None:
        """Count what the L1 entries from number ``first`` on refer to; usable L2 tables go into
        ``offsets``, each with the number of the first entry that names it."""
        if entries.count(0) == len(entries):
            return
        result = self.result
        for index, entry in enumerate(entries, first):
            if not entry:
                continue
            if entry & _L1_RESERVED:
                result.corruption(f"found L1 entry with reserved bits set: {entry:x}")
            offset = entry & OFFSET
            if not offset:
                continue
            if offset & (self.size - 1):
                result.corruption(
                    f"l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            elif self.add_region(offset, self.size):
                self.uncopied |= active and not entry & COPIED
                offsets.setdefault(offset, index)

    def add_region(self, offset: int, length: int, times: int = 1) -> bool:
        """Count ``times`` references to every cluster of the region, unless it is outside the
        file."""
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if last >= self.file_clusters:
            self.result.corruptions += 1
            self.result.say(
                "ERROR: counting reference for region exceeding the end of the file by one "
                f"cluster or more: offset {offset:#x} size {length:#x}"
            )
            return False
        if first == last:
            self.counts.add(first, times)
        else:
            self.counts.add_run(first, last + 1, times)
        return True

    # -- refcount structure
    def _refcount_blocks(self) -> Procedure:
        """Count the refcount blocks; a reference to what is in use already is a corruption."""
        reftable = self.image.reftable
        for start in range(0, len(reftable), _SLICE):
            part = reftable[start : start + _SLICE]
            if part.count(0) < len(part):
                self._count_blocks(part, start)
            yield Progress(start, len(reftable))
        first = self.header.reftable_offset >> self.bits
        for cluster in range(first, first + self.header.reftable_clusters):
            self.unsound |= self.counts.get(cluster) > 1

    def _count_blocks(self, entries: array[int], first: int) -> None:
        for index, entry in enumerate(entries, first):
            if not entry:
                continue
            offset = entry & REFTABLE_OFFSET_MASK
            self.unsound |= entry != offset
            if offset & (self.size - 1):
                self.unsound = True
                self.result.corruption(
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >> self.bits >= self.file_clusters:
                self.unsound = True
                self.result.corruption(f"refcount block {index} is outside image")
            elif entry != offset:
                # Its counts are compared, but it is not where a sound table would have it.
                self.result.corruption(f"refcount table entry {index} has reserved bits set")
                if offset:
                    self.blocks[index] = offset
            else:
                self.counts.add(offset >> self.bits)
                self.blocks[index] = offset
                count = self.counts.get(offset >> self.bits)
                if count > 1:
                    self.unsound = True
                    self.result.corruption(f"refcount block {index} refcount={count}")


class Structures(Walker):
    """Counts what is neither an L2 table nor what one refers to."""

    def _count_l1(
        self, entries: array[int], offsets: dict[int, int], active: bool, first: int
    ) -> None:
        pass
