"""Opening a qcow2 image that is damaged: what is left of its tables is found and put in place.

1. The header, or as much of it as can be; without one what the caller says, and otherwise what most
   tables in the file speak for (:mod:`.heading`).
2. The L1 table that it names.  An entry counts if what it names looks like an L2 table.
3. Every cluster of the file that nothing names so far is looked at.  Those that look like tables
   are candidates: an L1 table among them takes the place of a lost one; L2 tables go where a
   snapshot had the same clusters, the others into the places that are left, in the order of the
   file, and what is read through them is guessed.
4. If clusters with contents are left that no table names, what reads as unallocated is doubtful.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from ....contract import Length, Open, Procedure, Progress
from ....errors import DiskError
from ....hints import Any
from ....ondisk import big_endian_array, zeros
from .. import header as hd
from ..machine.core import COPIED, OFFSET, SLOT
from ..opening import open_data_file
from ..snapshots.table import read_table
from .assumed import assumed
from .evidence import Geometry, Seen, l1_entry_problem, look
from .heading import find_codec, find_header, unlock, unlock_by_search
from .marks import Marks
from .others import Others
from .placing import Placer
from .reading import Salvaged, read_some
from .scanning import Scan

_MOST_SNAPSHOT_ENTRIES = 1 << 22
_SAMPLE = 64


def open_salvaged(options: Mapping[str, Any]) -> tuple[Salvaged, Procedure]:
    """A format that reads what is left, and the procedure that fills it in."""
    image = Salvaged(options)
    return image, Salvage(image).run()


class Salvage:
    """One opening."""

    def __init__(self, image: Salvaged) -> None:
        self.image = image
        self.length = 0
        self.assumed = assumed(image.options)
        self.has_header = True
        self.has_counts = True
        self.found = Scan()
        self.packed: list[int] = []
        """Where some compressed clusters are."""
        self.snapshots: list[array[int]] = []
        """Their L1 tables."""

    def run(self) -> Procedure:
        """Returns the format."""
        image = self.image
        self.length = yield Length(SLOT)
        h = yield from find_header(self)
        image.use_header(h)
        image.geometry = Geometry(
            h.cluster_bits, self.length, h.version, image.stride, image.external
        )
        unlocked = yield from unlock(self)
        yield from open_data_file(image)
        image.metadata.use(0)
        image.marks.use(0)
        yield from self._counts()
        yield from self._snapshots()
        if h.crypt_method or h.extension(hd.EXT_BITMAPS) is not None:
            yield from Others(self).run()
        entries = yield from self._named_l1()
        yield from self._adopt(entries)
        yield from self.found.run(self)
        yield from Placer(self).run()
        if not unlocked:
            yield from unlock_by_search(self)
        yield from find_codec(self)
        self._judge()
        yield from self._backing()
        return image

    @property
    def sized(self) -> bool:
        """The size of the disk is known."""
        return self.has_header or self.assumed.size is not None

    def say(self, text: str) -> None:
        """Add a remark."""
        self.image.remarks.append(text)

    # -- what has no guest data
    def _counts(self) -> Procedure:
        """The refcount table and its blocks are named."""
        image, h = self.image, self.image.header
        size = h.reftable_clusters << h.cluster_bits
        if not h.reftable_offset or h.reftable_offset + size > self.length:
            self.has_counts = False
            return
        raw, _ = yield from read_some(SLOT, h.reftable_offset, size)
        first = h.reftable_offset >> h.cluster_bits
        image.marks.use_run(first, first + h.reftable_clusters)
        image.metadata.use_run(first, first + h.reftable_clusters)
        for entry in big_endian_array(64, raw):
            if entry and not entry & image.cluster_mask and entry < self.length:
                image.marks.use(entry >> h.cluster_bits, alone=False)

    def _snapshots(self) -> Procedure:
        """What snapshots hold is named, too; their tables say where a table belongs."""
        image, h = self.image, self.image.header
        if not h.nb_snapshots:
            return
        try:
            found, size = yield from read_table(image)
        except (OSError, DiskError) as error:
            self.say(f"The snapshot table cannot be read: {error}")
            return
        bits = h.cluster_bits
        self.use_region(h.snapshots_offset, size)
        room, done = _MOST_SNAPSHOT_ENTRIES, Marks(16 << 20)
        places: set[int] = set()
        for snapshot in found:
            if snapshot.l1_offset in places or snapshot.l1_size > room:
                continue
            places.add(snapshot.l1_offset)
            room -= snapshot.l1_size
            raw, _ = yield from read_some(SLOT, snapshot.l1_offset, 8 * snapshot.l1_size)
            entries = big_endian_array(64, raw)
            self.snapshots.append(entries)
            self.use_region(snapshot.l1_offset, 8 * snapshot.l1_size)
            for entry in entries:
                if not entry or l1_entry_problem(entry, image.geometry):
                    continue
                if done.used((entry & OFFSET) >> bits):
                    continue
                done.use((entry & OFFSET) >> bits)
                image.marks.use((entry & OFFSET) >> bits, soft=True)
                data, _ = yield from read_some(SLOT, entry & OFFSET, image.cluster_size)
                self.use_targets(data, soft=True)
                yield Progress(0, 1)

    def use_region(self, offset: int, length: int) -> None:
        """These bytes are metadata."""
        bits = self.image.cluster_bits
        end = min(offset + length, self.length)
        self.image.marks.use_run(offset >> bits, -(-end >> bits), alone=False)
        self.image.metadata.use_run(offset >> bits, -(-end >> bits))

    def use_targets(self, data: bytes, soft: bool = False) -> Seen:
        """Everything that a table names is named."""
        image = self.image
        seen = look(data, image.geometry)
        for first, stop in seen.pairs():
            image.marks.use_run(first, stop, soft=soft)
        if seen.packed:
            for entry in big_endian_array(64, data)[:: image.stride]:
                if entry >> 62 == 1:
                    image.marks.use_run(*image.hosts_of(entry), alone=False)
                    if len(self.packed) < _SAMPLE:
                        self.packed.append(image.packed_range(entry)[0])
        return seen

    # -- L1
    def _named_l1(self) -> Procedure:
        """The L1 table that the header names, as far as it lies in the file."""
        image, h = self.image, self.image.header
        wanted = hd.l1_entries(h.size, h.cluster_bits, image.extended)
        size = 8 * h.l1_size
        if not self.sized:
            return zeros(64, 0)
        if not self.has_header or not h.l1_offset or h.l1_offset >= self.length:
            if self.has_header and wanted:
                self.say("The place of the L1 table is lost")
            return zeros(64, wanted)
        raw, lost = yield from read_some(SLOT, h.l1_offset, size)
        for sector in lost:
            for index in range(sector * 64, min(sector * 64 + 64, wanted)):
                image.l1_lost[index] = "the L1 entry of its table cannot be read"
        return big_endian_array(64, raw)

    def _adopt(self, entries: array[int]) -> Procedure:
        """Take the entries that name tables; the others are lost."""
        image = self.image
        image.l1 = zeros(64, len(entries))
        for index, entry in enumerate(entries):
            if not entry:
                continue
            why = l1_entry_problem(entry, image.geometry)
            if not why:
                why = yield from self.take(index, entry & OFFSET)
            if why:
                image.cut_off |= "behind" in why
                image.l1_lost[index] = why
        if self.has_header and any(image.l1):
            self.use_region(image.header.l1_offset, 8 * image.header.l1_size)

    def take(self, index: int, offset: int) -> Procedure:
        """Put the table at ``offset`` into its place; returns why not, "" when it is there.

        Several entries that name the same table are all doubtful: one of them may be right.
        """
        image = self.image
        place = offset >> image.cluster_bits
        if image.tables_at.used(place):
            image.tables_at.use(place)
            image.l1[index] = offset
            return ""
        data, lost = yield from read_some(SLOT, offset, image.cluster_size)
        found = look(data, image.geometry)
        if found.bad > found.good + found.beyond:
            return "what its L1 entry names is no L2 table"
        image.cut_off |= bool(found.beyond)
        image.tables_at.use(place)
        image.l1[index] = offset | COPIED
        image.marks.use(place)
        self.use_targets(data)
        if lost:
            image.patch(offset, data, lost)
        yield Progress(index, len(image.l1))
        return ""

    def _judge(self) -> None:
        """Is anything left that should belong somewhere?"""
        image = self.image
        for index, entry in enumerate(image.l1):
            if entry and image.tables_at.shared((entry & OFFSET) >> image.cluster_bits):
                image.l1_guessed[index] = "another L1 entry names the same L2 table"
        for cluster, seen in self.found.plain.items():
            if all(self.found.counts.used(block) for block in seen.clusters()):
                image.marks.use(cluster)
        h = image.header
        if self.has_header and h.l1_offset:
            for cluster in range(
                h.l1_offset >> h.cluster_bits, -(-(h.l1_offset + 8 * h.l1_size) >> h.cluster_bits)
            ):
                image.marks.use(cluster, alone=False)
        left = sum(not image.marks.used(cluster) for cluster in self.found.orphans)
        if image.marks.full or self.found.full:
            image.doubtful = "it reads as unallocated, and too much is in the file to tell"
        elif left:
            image.doubtful = "it reads as unallocated, but the file has contents that nothing names"
            self.say(f"{left} clusters of the file have contents and are named by nothing")
        if not self.has_header:
            image.doubtful = (
                image.doubtful or "it reads as unallocated, by tables that were guessed"
            )

    def _backing(self) -> Procedure:
        image = self.image
        name = image.backing_file
        if "backing" in image.options:
            image.has_backing = image.options["backing"] is not None
        elif name:
            image.has_backing = True
            yield Open("backing", name, image.backing_format)
