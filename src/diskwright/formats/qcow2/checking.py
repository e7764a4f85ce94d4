"""Checking a qcow2 image: do the reference counts say what the tables say?"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ...contract import Procedure, Progress, Read
from ...ondisk import big_endian_array
from .core import COPIED, OFFSET, PACKED, SLOT
from .refblock import RefBlock, WideBlock, decode
from .references import CHUNK, CHUNK_BITS, Walker, uncovered

if TYPE_CHECKING:
    from .format import Qcow2

# Entries between two yields where each one is looked at: a few milliseconds.
_SLICE = 8192
_MOST_BLOCKS = 16


class Checker(Walker):
    """One check of an image on disk."""

    def run(self) -> Procedure:
        """The whole check; returns the CheckResult."""
        result = self.result
        result.uncovered = uncovered(self.header)
        yield from self.walk()
        yield from self.compare()
        if self.uncopied or self.counts.shared or result.corruptions or result.leaks:
            yield from self.check_copied()
        return result

    def _block_indexes(self) -> list[int]:
        """The refcount blocks that exist or ought to, ascending."""
        shift = self.image.block_shift
        found = set(self.blocks)
        for number, chunk in self.counts.chunks.items():
            first = number << CHUNK_BITS
            if shift >= CHUNK_BITS:
                found.add(first >> shift)
                continue
            for start in range(0, CHUNK, 1 << shift):
                if any(chunk[start : start + (1 << shift)]):
                    found.add((first + start) >> shift)
        return sorted(found)

    def compare(self) -> Procedure:
        """Compare every count with the references."""
        image = self.image
        indexes = self._block_indexes()
        end = 0
        for done, index in enumerate(indexes):
            first = index << image.block_shift
            stop = min(first + image.per_block, self.file_clusters)
            block = yield from self._read_block(index)
            for start in range(first, stop, CHUNK):
                end = max(end, self._compare_part(block, first, start, min(stop, start + CHUNK)))
                yield Progress(done, len(indexes))
        self.result.image_end_offset = end << self.bits

    def _read_block(self, index: int) -> Procedure:
        offset = self.blocks.get(index)
        if offset is None:
            return None
        (raw,) = yield Read(SLOT, [(offset, self.size)], "refblock_load")
        return decode(self.image.refcount_bits, raw)

    def _compare_part(self, block: RefBlock | None, first: int, start: int, stop: int) -> int:
        """Compare the counts of clusters [start, stop), at most a chunk; returns one more than
        the last of them that is in use."""
        chunk = self.counts.chunks.get(start >> CHUNK_BITS)
        inside = start & CHUNK - 1
        expected = chunk[inside : inside + stop - start] if chunk is not None else None
        if isinstance(block, WideBlock):
            actual = block.values[start - first : stop - first]
            if expected is None:
                if not any(actual.tobytes()):
                    return 0
            elif 255 not in expected and actual == array(actual.typecode, list(expected)):
                used = len(expected.rstrip(b"\0"))
                return start + used if used else 0
        elif block is None and expected is None:
            return 0
        end = 0
        for cluster in range(start, stop):
            count = block.get(cluster - first) if block is not None else 0
            wanted = self.counts.get(cluster)
            if count or wanted:
                end = cluster + 1
            if count != wanted:
                self._mismatch(cluster, count, wanted)
        return end

    def _mismatch(self, cluster: int, count: int, wanted: int) -> None:
        result = self.result
        if count < wanted:
            result.corruption(f"cluster {cluster} refcount={count} reference={wanted}")
        elif not result.uncovered:
            result.leaks += 1
            result.say(f"Leaked cluster {cluster} refcount={count} reference={wanted}")

    # -- flags
    def check_copied(self) -> Procedure:
        """COPIED must say exactly that the count is one."""
        cache: dict[int, RefBlock | None] = {}
        offsets: dict[int, None] = {}
        for l1_index, entry in enumerate(self.image.l1):
            if l1_index % _SLICE == 0:
                yield Progress(l1_index, len(self.image.l1))
            offset = entry & OFFSET
            if not offset or offset & (self.size - 1):
                continue
            count = yield from self._count_of(offset >> self.bits, cache)
            if (count == 1) != bool(entry & COPIED):
                self.result.corruption(
                    f"OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} "
                    f"refcount={count}"
                )
            if offset >> self.bits < self.file_clusters:
                offsets[offset] = None
        if self.external:
            return
        for done, offset in enumerate(offsets):
            (raw,) = yield Read(SLOT, [(offset, self.size)], "l2_load")
            table = big_endian_array(64, raw)
            for start in range(0, len(table), _SLICE):
                yield from self._check_entries(table[start : start + _SLICE : self.stride], cache)
                yield Progress(done, len(offsets))

    def _check_entries(
        self, entries: array[int], cache: dict[int, RefBlock | None]
    ) -> Procedure:
        mask = self.size - 1
        for entry in entries:
            host = entry & OFFSET
            if not host or entry & PACKED or host & mask:
                continue
            count = yield from self._count_of(host >> self.bits, cache)
            if (count == 1) != bool(entry & COPIED):
                self.result.corruption(
                    f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
                )

    def _count_of(self, cluster: int, cache: dict[int, RefBlock | None]) -> Procedure:
        """The count on disk of one cluster."""
        index = cluster >> self.image.block_shift
        if index not in cache:
            if len(cache) >= _MOST_BLOCKS:
                cache.pop(next(iter(cache)))
            cache[index] = yield from self._read_block(index)
        block = cache[index]
        return block.get(cluster - (index << self.image.block_shift)) if block is not None else 0


def check(image: Qcow2) -> Procedure:
    """Check the image on disk (with nothing dirty); returns a CheckResult."""
    return (yield from Checker(image).run())
