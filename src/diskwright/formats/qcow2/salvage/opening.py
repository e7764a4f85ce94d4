"""Opening a qcow2 image that is damaged: what is left of its tables is found and put in place.

1. The header, or as much of it as can be; without one the cluster size is what most tables in the
   file speak for.
2. The L1 table that it names.  An entry counts if what it names looks like an L2 table.
3. Every cluster of the file that nothing names so far is looked at.  Those that look like tables
   are candidates: an L1 table among them takes the place of a lost one; L2 tables go where a
   snapshot had the same clusters, the others into the places that are left, in the order of the
   file, and what is read through them is guessed.
4. If clusters with contents are left that no table names, what reads as unallocated is doubtful.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ....contract import DataRanges, Length, Open, Procedure, Progress, Read
from ....errors import DiskError, ImageError, UnsupportedFeature
from ....ondisk import big_endian_array, zeros
from .. import header as hd
from ..encryption import open_encryption
from ..machine.core import COPIED, OFFSET, SLOT
from ..opening import open_data_file, read_header
from ..snapshots.table import read_table
from .evidence import (
    Geometry,
    Marks,
    Seen,
    is_table,
    l1_entry_problem,
    look,
    may_be_counts,
    may_be_table,
    vote,
    winner,
)
from .others import Others
from .placing import Placer
from .reading import Salvaged
from .torn import broken_header

_WINDOW = 1 << 20
_LOOK = 1 << 30
_SECTOR = 512
_MOST_LOOSE = 1 << 22
_MOST_ENTRIES = 1 << 24
_DEFAULT_BITS = 16


def open_salvaged(options: Mapping[str, Any]) -> tuple[Salvaged, Procedure]:
    """A format that reads what is left, and the procedure that fills it in."""
    image = Salvaged(options)
    return image, Salvage(image).run()


def read_some(slot: str, offset: int, length: int) -> Procedure:
    """Read; returns the bytes, with zeroes for sectors that cannot be read, and those sectors."""
    try:
        (data,) = yield Read(slot, [(offset, length)])
        return data, []
    except OSError:
        pass
    out, lost = bytearray(length), []
    for at in range(0, length, _SECTOR):
        try:
            (data,) = yield Read(slot, [(offset + at, min(_SECTOR, length - at))])
            out[at : at + len(data)] = data
        except OSError:
            lost.append(at // _SECTOR)
    return bytes(out), lost


class Salvage:
    """One opening."""

    def __init__(self, image: Salvaged) -> None:
        self.image = image
        self.length = 0
        self.has_header = True
        self.has_counts = True
        self.loose: list[int] = []
        """Clusters that look like tables, and that nothing names."""
        self.entries = 0
        """What they hold together: it stays in memory, so it is bounded."""
        self.counts = Marks(1 << 13)
        """Clusters that look like blocks of reference counts, where no table tells which are."""
        self.plain: dict[int, array[int]] = {}
        """What clusters name that have the looks of a refcount table."""
        self.orphans = array("Q")
        """Clusters with contents that nothing named when they were looked at."""
        self.snapshots: list[array[int]] = []
        """Their L1 tables."""

    def run(self) -> Procedure:
        """Returns the format."""
        image = self.image
        self.length = yield Length(SLOT)
        h = yield from self._header()
        image.use_header(h)
        image.geometry = Geometry(
            h.cluster_bits, self.length, h.version, image.stride, image.external
        )
        if h.crypt_method or image.options.get("encrypt.format") is not None:
            yield from open_encryption(image)
        image.metadata.use(0)
        image.marks.use(0)
        yield from self._counts()
        yield from self._snapshots()
        if h.crypt_method or h.extension(hd.EXT_BITMAPS) is not None:
            yield from Others(self).run()
        entries = yield from self._named_l1()
        yield from self._adopt(entries)
        yield from self._scan()
        placer = Placer(self)
        yield from placer.run()
        self._judge()
        yield from open_data_file(image)
        yield from self._backing()
        return image

    def say(self, text: str) -> None:
        """Add a remark."""
        self.image.remarks.append(text)

    # -- the header
    def _header(self) -> Procedure:
        try:
            return (yield from read_header())
        except (OSError, ImageError) as error:
            if isinstance(error, UnsupportedFeature) and not error.feature.startswith("version"):
                raise
            reason = error
        head, _ = yield from read_some(SLOT, 0, _SECTOR)
        h, dropped = broken_header(head, self.length)
        if h is not None:
            self.say(f"The header is damaged ({reason}); left out: {', '.join(dropped)}")
            return h
        self.has_header = False
        votes: Counter[int] = Counter()
        for offset in range(0, self.length, _LOOK):
            ranges = yield DataRanges(SLOT, offset, min(_LOOK, self.length - offset))
            for start, length in ranges:
                for at in range(start - start % _WINDOW, start + length, _WINDOW):
                    size = min(_WINDOW, self.length - at) & -_SECTOR
                    if size:
                        data, _ = yield from read_some(SLOT, at, size)
                        vote(data, self.length, votes)
                        yield Progress(at, self.length)
        h = hd.Header()
        h.cluster_bits = winner(votes) or _DEFAULT_BITS
        how = "as most tables speak for" if votes else "as is usual, for nothing speaks for one"
        self.say(
            f"The header is lost; the clusters are taken for {1 << h.cluster_bits} bytes, {how}"
        )
        return h

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
        for cluster in range(first, first + h.reftable_clusters):
            image.marks.use(cluster)
            image.metadata.use(cluster)
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
        room, done = _MOST_LOOSE, Marks(1 << 13)
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
        for cluster in range(offset >> bits, -(-end >> bits)):
            self.image.marks.use(cluster, alone=False)
            self.image.metadata.use(cluster)

    def use_targets(self, data: bytes, soft: bool = False) -> Seen:
        """Everything that a table names is named."""
        image = self.image
        seen = look(data, image.geometry)
        for host in seen.targets:
            image.marks.use(host >> image.cluster_bits, soft=soft)
        if seen.packed:
            for entry in big_endian_array(64, data)[:: image.stride]:
                if entry >> 62 == 1:
                    start, end = image.hosts_of(entry)
                    for cluster in range(start, end):
                        image.marks.use(cluster, alone=False)
        return seen

    # -- L1
    def _named_l1(self) -> Procedure:
        """The L1 table that the header names, as far as it lies in the file."""
        image, h = self.image, self.image.header
        wanted = hd.l1_entries(h.size, h.cluster_bits, image.extended)
        size = 8 * h.l1_size
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
            self._own_l1()

    def _own_l1(self) -> None:
        h, image = self.image.header, self.image
        for cluster in range(
            h.l1_offset >> h.cluster_bits, -(-(h.l1_offset + 8 * h.l1_size) >> h.cluster_bits)
        ):
            image.marks.use(cluster, alone=False)
            image.metadata.use(cluster)

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

    # -- what nothing names
    def _scan(self) -> Procedure:
        """Look at every cluster of the file that nothing names."""
        image = self.image
        bits, size, length = image.cluster_bits, image.cluster_size, self.length
        step = max(_WINDOW, size)
        for offset in range(0, length, _LOOK):
            ranges = yield DataRanges(SLOT, offset, min(_LOOK, length - offset))
            last = -1
            for start, count in ranges:
                first = max(start - start % step, last)
                for at in range(first, start + count, step):
                    last = at + step
                    wanted = [
                        cluster
                        for cluster in range(at >> bits, min(at + step, length) >> bits)
                        if not image.marks.used(cluster)
                    ]
                    if wanted:
                        yield from self._look_at(wanted, size)
                    yield Progress(at, length)

    def _look_at(self, clusters: list[int], size: int) -> Procedure:
        first, bits = clusters[0], self.image.cluster_bits
        data, _ = yield from read_some(
            SLOT, first << bits, (clusters[-1] + 1 << bits) - (first << bits)
        )
        for cluster in clusters:
            part = data[(cluster - first) * size : (cluster - first + 1) * size]
            if part.count(0) == size:
                continue
            if not self.has_counts and may_be_counts(part):
                self.counts.use(cluster)
                continue
            if len(self.orphans) < _MOST_LOOSE:
                self.orphans.append(cluster)
            geometry = self.image.geometry
            flagless = not self.has_counts and part[::8].count(0) << 3 == size
            if geometry != geometry.of_l1 and may_be_table(part):
                # What may be an L1 table, whatever L2 tables are like.
                seen = look(part, geometry.of_l1)
                if is_table(seen) and self.entries < _MOST_ENTRIES:
                    self.loose.append(cluster)
                    self.entries += len(seen.targets) + 64
                    continue
            if (flagless or may_be_table(part, geometry.stride)) and self.entries < _MOST_ENTRIES:
                seen = look(part, geometry)
                if flagless and seen.targets and not (seen.bad or seen.packed):
                    self.plain[cluster] = seen.targets
                    self.entries += len(seen.targets) + 64
                elif is_table(seen):
                    self.loose.append(cluster)
                    self.entries += len(seen.targets) + 64

    def _judge(self) -> None:
        """Is anything left that should belong somewhere?"""
        image = self.image
        for index, entry in enumerate(image.l1):
            if entry and image.tables_at.shared((entry & OFFSET) >> image.cluster_bits):
                image.l1_guessed[index] = "another L1 entry names the same L2 table"
        for cluster, targets in self.plain.items():
            if all(self.counts.used(host >> image.cluster_bits) for host in targets):
                image.marks.use(cluster)
        h = image.header
        if self.has_header and h.l1_offset:
            for cluster in range(
                h.l1_offset >> h.cluster_bits, -(-(h.l1_offset + 8 * h.l1_size) >> h.cluster_bits)
            ):
                image.marks.use(cluster, alone=False)
        left = sum(not image.marks.used(cluster) for cluster in self.orphans)
        if image.marks.full:
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
