"""What the tables of a qcow2 image refer to, counted per host cluster."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...contract import Length, Procedure, Progress, Read
from ...findings import CheckResult
from ...ondisk import big_endian_array
from . import header as hd
from .core import COPIED, OFFSET, PACKED, REFTABLE_OFFSET_MASK, SLOT, ZERO_FLAG

if TYPE_CHECKING:
    from .format import Qcow2

_L1_RESERVED = ~(OFFSET | COPIED) & (1 << 64) - 1
_L2_RESERVED = ~(OFFSET | COPIED | PACKED | ZERO_FLAG) & (1 << 64) - 1
CHUNK_BITS = 12
CHUNK = 1 << CHUNK_BITS
_READ_BYTES = 1 << 20
# L2 entries between two yields: about two milliseconds.
_SLICE = 8192


class Counts:
    """References per host cluster: a byte each, in chunks made when first needed, so that a long
    sparse file costs no more than what its tables name."""

    def __init__(self) -> None:
        self.chunks: dict[int, bytearray] = {}
        self.more: dict[int, int] = {}
        """Clusters with 255 references or more."""
        self.shared = False
        """Some cluster has more than one reference."""

    def add(self, cluster: int) -> None:
        """One more reference."""
        chunk = self.chunks.get(cluster >> CHUNK_BITS)
        if chunk is None:
            chunk = self.chunks[cluster >> CHUNK_BITS] = bytearray(CHUNK)
        at = cluster & CHUNK - 1
        value = chunk[at]
        if value:
            self.shared = True
            if value == 255:
                self.more[cluster] = self.more.get(cluster, 255) + 1
                return
        chunk[at] = value + 1

    def get(self, cluster: int) -> int:
        """The references of one cluster."""
        chunk = self.chunks.get(cluster >> CHUNK_BITS)
        value = chunk[cluster & CHUNK - 1] if chunk is not None else 0
        return self.more.get(cluster, value) if value == 255 else value

    def used(self) -> Iterator[int]:
        """All clusters with references, ascending."""
        for index in sorted(self.chunks):
            for at, value in enumerate(self.chunks[index]):
                if value:
                    yield (index << CHUNK_BITS) + at

    def several(self) -> Iterator[int]:
        """All clusters with more than one reference."""
        for index, chunk in self.chunks.items():
            if max(chunk) > 1:
                for at, value in enumerate(chunk):
                    if value > 1:
                        yield (index << CHUNK_BITS) + at

    @property
    def end(self) -> int:
        """One more than the highest cluster with references."""
        for index in sorted(self.chunks, reverse=True):
            used = len(self.chunks[index].rstrip(b"\0"))
            if used:
                return (index << CHUNK_BITS) + used
        return 0


def uncovered(h: hd.Header) -> list[str]:
    """What a check of an image with this header does not look at."""
    out = []
    if h.crypt_method == 2:
        out.append("encryption header")
    if h.incompatible & hd.EXTENDED_L2:
        out.append("extended L2 entries: subcluster bitmaps")
    if h.incompatible & hd.DATA_FILE:
        out.append("external data file")
    if h.nb_snapshots:
        out.append("internal snapshots")
    return out


class Walker:
    """Counts references into ``counts``; what breaks the specification goes into ``result``."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.header = image.header
        self.result = CheckResult()
        self.counts = Counts()
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
        self.blocks: dict[int, int] = {}
        """Offsets of the usable refcount blocks by their index."""
        self.unsound = False
        """The refcount table or a block of it cannot be relied on, or lies over something."""

    # -- references
    def walk(self, refcounts: bool = True) -> Procedure:
        """Count all references; entries that break the specification are corruptions.

        ``refcounts`` False leaves out the refcount table and its blocks.
        """
        h, result = self.header, self.result
        length = yield Length(SLOT)
        self.file_clusters = -(-length >> self.bits)
        result.total_clusters = -(-h.size >> self.bits)
        self.add_region(0, self.size)
        if h.l1_size:
            self.add_region(h.l1_offset, h.l1_size * 8)
        if refcounts:
            whole = self.add_region(h.reftable_offset, h.reftable_clusters << self.bits)
            self.unsound |= not whole
        if h.nb_snapshots:
            yield from self._snapshot_table()
        if h.extension(hd.EXT_BITMAPS) is not None:
            from .bitmapwalk import count_bitmaps

            yield from count_bitmaps(self)
        offsets: dict[int, None] = {}  # a table that two entries share is walked once
        for start in range(0, len(self.image.l1), _SLICE):
            self._count_l1(self.image.l1[start : start + _SLICE], offsets)
            yield Progress(start, len(self.image.l1))
        tables = list(offsets)
        for start in range(0, len(tables), self.batch):
            yield from self._l2_batch(tables[start : start + self.batch], start, len(tables))
        if refcounts:
            yield from self._refcount_blocks()

    def _count_l1(self, entries: array[int], offsets: dict[int, None]) -> None:
        """Count what these L1 entries refer to; usable L2 tables go into ``offsets``."""
        if entries.count(0) == len(entries):
            return
        result = self.result
        for entry in entries:
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
                self.uncopied |= not entry & COPIED
                offsets[offset] = None

    def add_region(self, offset: int, length: int) -> bool:
        """Count a reference to every cluster of the region, unless it is outside the file."""
        first, last = offset >> self.bits, (offset + length - 1) >> self.bits
        if last >= self.file_clusters:
            self.result.corruptions += 1
            self.result.say(
                "ERROR: counting reference for region exceeding the end of the file by one "
                f"cluster or more: offset {offset:#x} size {length:#x}"
            )
            return False
        for cluster in range(first, last + 1):
            self.counts.add(cluster)
        return True

    def _l2_batch(self, offsets: list[int], done: int, total: int) -> Procedure:
        raws = yield Read(SLOT, [(offset, self.size) for offset in offsets], "l2_load")
        for raw in raws:
            table = big_endian_array(64, raw)
            contiguous = 0
            for start in range(0, len(table), _SLICE):
                part = table[start : start + _SLICE : self.stride]
                contiguous = self._count_entries(part, contiguous)
                yield Progress(done, total)
            done += 1

    def _count_entries(self, entries: array[int], contiguous: int) -> int:
        """Count what these L2 entries refer to; returns where the next contiguous cluster is."""
        result, size, bits = self.result, self.size, self.bits
        mask = size - 1
        add, end = self.counts.add, self.file_clusters
        zero_ok = self.header.version > 2 and self.stride == 1
        for entry in entries:
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
                self._count_packed(entry)
                continue
            if entry & _L2_RESERVED or (entry & ZERO_FLAG and not zero_ok):
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
            if self.external:
                continue
            if not entry & COPIED:
                self.uncopied = True
            if host & mask or host >> bits >= end:
                if not host & mask:
                    self.add_region(host, size)
                continue
            add(host >> bits)
        return contiguous

    def _count_packed(self, entry: int) -> None:
        """A compressed cluster refers to every host cluster that it touches."""
        host, length = self.image.packed_range(entry)
        if self.add_region(host, length) and self.packed is not None:
            for cluster in range(host >> self.bits, ((host + length - 1) >> self.bits) + 1):
                self.packed.add(cluster)

    def _snapshot_table(self) -> Procedure:
        """The snapshot table is counted; what the snapshots hold is not covered."""
        h = self.header
        at = h.snapshots_offset
        for _ in range(h.nb_snapshots):
            (raw,) = yield Read(SLOT, [(at, 40)])
            id_length, name_length = struct.unpack_from(">HH", raw, 12)
            (extra,) = struct.unpack_from(">I", raw, 36)
            if extra > 1024:
                self.result.corruption("snapshot table entry has too much extra data")
                return
            at += 40 + extra + id_length + name_length
            at += -at % 8
        self.add_region(h.snapshots_offset, at - h.snapshots_offset)

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
