"""Which bytes of a file have been replaced, and where the new ones are kept."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

ZEROES = -1
"""The place of bytes that read as zeroes."""
KEPT = -2
"""The place of bytes that are what they were."""


class Patches:
    """Disjoint ranges in ascending order, each with a *place*: an offset in the store of new
    bytes, or :data:`ZEROES`.  24 bytes of memory a range."""

    def __init__(self) -> None:
        self._starts = array("q")
        self._ends = array("q")
        self._places = array("q")

    def __len__(self) -> int:
        return len(self._starts)

    def put(self, start: int, end: int, place: int) -> None:
        """Replace [start, end)."""
        starts, ends, places = self._starts, self._ends, self._places
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        new: list[tuple[int, int, int]] = []
        if first < last and starts[first] < start:
            new.append((starts[first], start, places[first]))
        new.append((start, end, place))
        if first < last and ends[last - 1] > end:
            old, skip = places[last - 1], end - starts[last - 1]
            new.append((end, ends[last - 1], old if old < 0 else old + skip))
        if first and ends[first - 1] == new[0][0]:
            before, (_, stop, at) = places[first - 1], new[0]
            follows = before + ends[first - 1] - starts[first - 1]
            if at == before == ZEROES or (before >= 0 and at == follows):
                first -= 1
                new[0] = (starts[first], stop, before)
        starts[first:last] = array("q", [part[0] for part in new])
        ends[first:last] = array("q", [part[1] for part in new])
        places[first:last] = array("q", [part[2] for part in new])

    def cut(self, end: int) -> None:
        """Forget what was replaced at ``end`` and behind it."""
        first = bisect_right(self._ends, end)
        if first < len(self) and self._starts[first] < end:
            self._ends[first] = end
            first += 1
        del self._starts[first:], self._ends[first:], self._places[first:]

    def parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """All of [start, end) as (start, end, place)."""
        starts, ends, places = self._starts, self._ends, self._places
        index = bisect_right(ends, start)
        while start < end:
            if index == len(starts) or starts[index] >= end:
                yield start, end, KEPT
                return
            if starts[index] > start:
                yield start, starts[index], KEPT
                start = starts[index]
            stop = min(ends[index], end)
            place = places[index]
            yield start, stop, place if place < 0 else place + start - starts[index]
            start = stop
            index += 1

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """All that was replaced as (start, end, place), in ascending order."""
        return zip(self._starts, self._ends, self._places, strict=True)
