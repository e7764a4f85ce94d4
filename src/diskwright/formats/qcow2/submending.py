"""Mending extended L2 entries, each by itself: what its bitmap and its descriptor may not say."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ...contract import Procedure, Progress, Read
from ...ondisk import big_endian_array
from .core import COPIED, OFFSET, PACKED, SLOT
from .mending import write_entries
from .submapping import ALL, ALL_ZERO, SUBCLUSTERS

if TYPE_CHECKING:
    from .checking import Checker
    from .format import Qcow2

_SLICE = 8192


class SubMender:
    """One pass over the L2 tables of the disk; ``found``: the walk before.

    Subclusters that are allocated and zero have their data back.  What could not be read, or lay
    outside the file, reads as zeroes.  A table that lies over something else stays as it is, and so
    does what two entries share: the counts and flags are to say so.
    """

    def __init__(self, image: Qcow2, found: Checker) -> None:
        self.image = image
        self.found = found
        self.end = found.file_clusters
        self.mended = 0

    def run(self) -> Procedure:
        """Mend all entries."""
        image, counts = self.image, self.found.counts
        for l1_index, entry in enumerate(image.l1):
            place = entry & OFFSET
            cluster = place >> image.cluster_bits
            if not place or place & image.cluster_mask or cluster >= self.end:
                if l1_index % _SLICE == 0:
                    yield Progress(l1_index, len(image.l1))
                continue
            if counts.get(cluster) != 1:
                continue
            (raw,) = yield Read(SLOT, [(place, image.cluster_size)], "l2_load")
            words = big_endian_array(64, raw)
            changed: list[int] = []
            for start in range(0, len(words), _SLICE):
                self._look(words, start, min(start + _SLICE, len(words)), changed)
                yield Progress(l1_index, len(image.l1))
            yield from write_entries(place, words, changed, "l2_update")

    def _look(self, words: array[int], start: int, stop: int, changed: list[int]) -> None:
        for index in range(start, stop, 2):
            old = words[index], words[index + 1]
            if not any(old):
                continue
            new = self._right(*old)
            if new != old:
                self.found.result.say(
                    f"Repairing L2 entry {index // 2}: {old[0]:x} {old[1]:x} => "
                    f"{new[0]:x} {new[1]:x}"
                )
                words[index], words[index + 1] = new
                changed += (index, index + 1)
                self.mended += 1

    def _right(self, entry: int, bitmap: int) -> tuple[int, int]:
        """What an entry and its bitmap ought to be."""
        image = self.image
        end = self.end << image.cluster_bits
        if entry & PACKED:
            host, length = image.packed_range(entry)
            if host >= end:
                return 0, ALL_ZERO
            if host + length > end:
                sectors = (end - 1 >> 9) - (host >> 9)
                entry = PACKED | sectors << image.packed_bits | host
            return entry & ~COPIED, 0
        host = entry & OFFSET
        allocated = bitmap & ALL
        if not host or host & image.cluster_mask or host >= end:
            return 0, (bitmap >> SUBCLUSTERS | allocated) << SUBCLUSTERS
        zero = bitmap >> SUBCLUSTERS & ~allocated
        return entry & (OFFSET | COPIED), zero << SUBCLUSTERS | allocated
