"""Counting what L2 tables refer to."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ....contract import Compute, Procedure, Progress, Read
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ..machine.core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from ..machine.submapping import ALL, SUBCLUSTERS
from .counts import CHUNK_BITS, MOST_CHUNKS, Counts
from .scan import Loose, Piece, Run, pieces_of, span

if TYPE_CHECKING:
    from .. import header as hd
    from ..image import Image

_RESERVED = ~(OFFSET | COPIED | PACKED | ZERO_FLAG) & (1 << 64) - 1
_STATISTICS = ("allocated_clusters", "fragmented_clusters", "compressed_clusters")


class TableWalk:
    """The part of a walk that is about L2 tables; see `Walker` for the attributes."""

    image: Image
    header: hd.Header
    result: CheckResult
    counts: Counts
    bits: int
    size: int
    stride: int
    batch: int
    external: bool
    file_clusters: int
    uncopied: bool
    packed: Counts | None
    active: dict[int, int]
    inactive: dict[int, int]
    spans: tuple[array[int], array[int]] | None

    def add_region(self, offset: int, length: int, times: int = 1) -> bool:
        """Count ``times`` references to the clusters of a range; False when it is outside."""
        raise NotImplementedError

    def walk_tables(self) -> Procedure:
        """Count what all L2 tables refer to.  Those that several L1 tables share are read once."""
        inactive = [offset for offset in self.inactive if offset not in self.active]
        known = self.spans
        if known is None and self.file_clusters > MOST_CHUNKS << CHUNK_BITS:
            self.spans = array("Q"), array("Q")
        yield from self._walk_tables(list(self.active), 0, known)
        if inactive:
            # What only snapshots refer to is counted, but is no part of the disk as it is.
            result = self.result
            kept = [getattr(result, name) for name in _STATISTICS]
            yield from self._walk_tables(inactive, len(self.active), known)
            for name, value in zip(_STATISTICS, kept, strict=True):
                setattr(result, name, value)

    def _walk_tables(
        self, offsets: list[int], first: int, known: tuple[array[int], array[int]] | None
    ) -> Procedure:
        """``first``: the number of the first one among all tables."""
        done, total = 0, len(offsets)
        for part in self._batches(offsets, first, known):
            raws = yield Read(SLOT, [(offset, self.size) for offset in part], "l2_load")
            found: list[list[Piece]] = yield Compute(pieces_of, (raws, self.size, self.stride == 2))
            for offset, table in zip(part, found, strict=True):
                if known is None and self.spans is not None:
                    low, high = span(table, self.size, self.image.packed_bits)
                    self.spans[0].append(low >> self.bits)
                    self.spans[1].append(min(high >> self.bits, 1 << 62))
                times = self.inactive.get(offset, 0)
                contiguous = 0
                for piece in table:
                    if self.external:
                        contiguous = self._count_external(piece, offset, contiguous)
                        yield Progress(done, total)
                    elif isinstance(piece, Run):
                        contiguous = self._count_run(piece, offset, times, contiguous)
                    else:
                        contiguous = self._count_loose(piece, offset, times, contiguous)
                        yield Progress(done, total)
            done += len(part)
            yield Progress(done, total)

    def _batches(
        self, offsets: list[int], first: int, known: tuple[array[int], array[int]] | None
    ) -> Iterator[list[int]]:
        """The tables that are to be read; asked for one batch after the other, since it is by
        counting that the end of what is counted comes down."""
        if known is None:
            for start in range(0, len(offsets), self.batch):
                yield offsets[start : start + self.batch]
            return
        part = []
        for offset, low, high in zip(offsets, known[0][first:], known[1][first:], strict=False):
            if high > self.counts.start and low < (self.counts.stop or high):
                part.append(offset)
                if len(part) == self.batch:
                    yield part
                    part = []
        if part:
            yield part

    def _count_run(self, run: Run, table: int, times: int, contiguous: int) -> int:
        """Count what the entries of the run refer to; returns where the next contiguous cluster
        is."""
        host = run.entry & OFFSET
        first = host >> self.bits
        active = table in self.active
        if first + run.length > self.file_clusters:
            entries = array("Q", [run.entry + i * self.size for i in range(run.length)])
            return self._count_loose(Loose(run.at, entries, None), table, times, contiguous)
        self.result.allocated_clusters += run.length
        self.result.fragmented_clusters += bool(contiguous) and host != contiguous
        if active and not run.entry & COPIED:
            self.uncopied = True
        self.counts.add_run(first, first + run.length, times + active)
        return host + run.length * self.size

    def _count_loose(self, piece: Loose, table: int, times: int, contiguous: int) -> int:
        """The same for entries of any kind."""
        result, size, bits = self.result, self.size, self.bits
        mask = size - 1
        add, end = self.counts.add, self.file_clusters
        zero_ok = self.header.version > 2 and self.stride == 1
        active = table in self.active
        times += active
        if piece.bitmaps is not None:
            self._check_bitmaps(piece.at, piece.entries, piece.bitmaps)
        for entry in piece.entries:
            if not entry:
                continue
            if entry & PACKED:
                result.allocated_clusters += 1
                result.compressed_clusters += 1
                result.fragmented_clusters += 1
                if entry & COPIED:
                    coffset = entry & (1 << self.image.packed_bits) - 1
                    result.corruptions += 1
                    result.say(
                        f"ERROR: coffset={coffset:#x}: copied flag must never be set for "
                        "compressed clusters"
                    )
                self._count_packed(entry, times)
                continue
            if entry & _RESERVED or (entry & ZERO_FLAG and not zero_ok):
                result.corruption(f"found l2 entry with reserved bits set: {entry:x}")
            host = entry & OFFSET
            if not host:
                continue
            if host & mask:
                what = "Preallocated" if entry & ZERO_FLAG else "Data"
                result.corruption(
                    f"offset={host:x}: {what} cluster is not properly aligned; L2 entry corrupted."
                )
            result.allocated_clusters += 1
            if contiguous and host != contiguous:
                result.fragmented_clusters += 1
            contiguous = host + size
            if active and not entry & COPIED:
                self.uncopied = True
            if host & mask or host >> bits >= end:
                if not host & mask:
                    self.add_region(host, size, times)
                continue
            add(host >> bits, times)
        return contiguous

    def _count_external(self, piece: Piece, table: int, contiguous: int) -> int:
        """Entries of an image with a data file: each has its own place there, which nothing counts,
        or none."""
        result, size, bits = self.result, self.size, self.bits
        per_table = size >> 3 if self.stride == 1 else size >> 4
        base = (self.active.get(table, 0) * per_table + piece.at) << bits
        if isinstance(piece, Run):
            if piece.entry == base | COPIED:
                result.allocated_clusters += piece.length
                result.fragmented_clusters += bool(contiguous) and base != contiguous
                return base + piece.length * size
            end = piece.entry + piece.length * size
            entries, bitmaps = array("Q", range(piece.entry, end, size)), None
        else:
            entries, bitmaps = piece.entries, piece.bitmaps
        if bitmaps is not None:
            self._check_bitmaps(piece.at, entries, bitmaps)
        for number, entry in enumerate(entries):
            if not entry:
                continue
            if entry & PACKED:
                result.corruption(
                    f"compressed cluster {piece.at + number} with data file, entry={entry:#x}"
                )
                continue
            if entry & _RESERVED or (entry & ZERO_FLAG and self.stride == 2):
                result.corruption(f"found l2 entry with reserved bits set: {entry:x}")
            if not entry & (COPIED | OFFSET):
                continue
            host, guest = entry & OFFSET, base + (number << bits)
            if host & size - 1:
                what = "Preallocated" if entry & ZERO_FLAG else "Data"
                result.corruption(
                    f"offset={host:x}: {what} cluster is not properly aligned; L2 entry corrupted."
                )
            elif host != guest and table in self.active:
                result.corruption(
                    f"External data file host cluster offset {host:#x} does not match guest "
                    f"cluster offset: {guest:#x}"
                )
            elif not entry & COPIED:
                result.corruption(f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=1")
            result.allocated_clusters += 1
            result.fragmented_clusters += bool(contiguous) and host != contiguous
            contiguous = host + size
        return contiguous

    def _check_bitmaps(self, first: int, entries: array[int], bitmaps: array[int]) -> None:
        """What the subclusters of extended entries, from index ``first`` on, may not say."""
        for index, (entry, bitmap) in enumerate(zip(entries, bitmaps, strict=True), first):
            if not bitmap:
                continue
            if entry & PACKED:
                self.result.corruption(
                    f"compressed cluster {index} with non-zero subcluster allocation bitmap, "
                    f"entry={entry:#x}"
                )
            elif not entry & (OFFSET | COPIED if self.external else OFFSET):
                if bitmap & ALL:
                    self.result.corruption(
                        f"Unallocated cluster {index} has non-zero subcluster allocation map"
                    )
            elif bitmap >> SUBCLUSTERS & bitmap:
                self.result.corruption(
                    f"offset={entry & OFFSET:x}: Allocated cluster has corrupted subcluster "
                    "allocation bitmap"
                )

    def _count_packed(self, entry: int, times: int) -> None:
        """A compressed cluster refers to every host cluster that it touches."""
        host, length = self.image.packed_range(entry)
        if self.add_region(host, length, times) and self.packed is not None:
            self.packed.add_run(host >> self.bits, ((host + length - 1) >> self.bits) + 1, times)
