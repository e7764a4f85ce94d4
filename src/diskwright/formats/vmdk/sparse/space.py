"""The space of one extent file: runs of sectors, and where new grains come from.

VMDK counts no references: what is free inside a file is known only of what was freed since it was
opened.  Everything else is taken at the end of the file.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from ....errors import NoSpace
from ....units import align_up

Run = tuple[int, int]  # (start, end) in sectors, end exclusive
Taken = tuple[int, int, bool]  # (start, end, reads as zeroes)

_TABLE_ALIGN = 8  # sectors


class Runs:
    """Disjoint runs in ascending order; neighbours are merged."""

    __slots__ = ("ends", "starts")

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        """``runs`` by ascending start."""
        self.starts = array("Q")
        self.ends = array("Q")
        for start, end in runs:
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(end, self.ends[-1])
            elif start < end:
                self.starts.append(start)
                self.ends.append(end)

    def __iter__(self) -> Iterator[Run]:
        return zip(self.starts, self.ends, strict=True)

    def __len__(self) -> int:
        """The number of runs."""
        return len(self.starts)

    def touches(self, start: int, end: int) -> bool:
        """True when a sector of [start, end) is in one of them."""
        i = bisect_right(self.ends, start)
        return i < len(self.starts) and self.starts[i] < end

    def add(self, start: int, end: int) -> None:
        """Add [start, end); what is there already stays."""
        first = bisect_left(self.ends, start)
        last = bisect_right(self.starts, end)
        if first < last:
            start = min(start, self.starts[first])
            end = max(end, self.ends[last - 1])
        self.starts[first:last] = array("Q", [start])
        self.ends[first:last] = array("Q", [end])


class Space:
    """``end``: the first sector behind all that is used; ``limit``: the first one that no entry
    can name (or that the file cannot have); ``grain`` in sectors."""

    def __init__(self, end: int, grain: int, limit: int, zero_beyond_end: bool) -> None:
        self.end = end
        self.grain = grain
        self.limit = limit
        self.zero_beyond_end = zero_beyond_end
        self.slack = grain - 1 if end % grain else 0
        """The last grain may reach so many sectors beyond ``end``: where the file is no whole
        number of grains, they may lie on another grid, and the last one be cut short."""
        self._pool: list[Taken] = []
        self._pooled = 0

    def forget(self) -> None:
        """Forget what was freed since the file was opened."""
        self._pool.clear()
        self._pooled = 0

    def check(self, grains: int, tables: int) -> None:
        """Raise NoSpace unless so many grains and sectors of tables can be had."""
        needed = max(grains * self.grain - self._pooled, 0)
        start = self.end + self.slack
        if tables:
            start = align_up(start, _TABLE_ALIGN) + tables
        if tables + needed and align_up(start, self.grain) + needed > self.limit:
            raise NoSpace

    def take_tables(self, sectors: int) -> int:
        """Sectors behind the end, for tables; returns the first."""
        start = align_up(self.end + self.slack, _TABLE_ALIGN)
        self.end = start + sectors
        self.slack = 0
        return start

    def take(self, grains: int) -> list[Taken]:
        """Runs of ``grains`` grains in all."""
        needed = grains * self.grain
        out: list[Taken] = []
        while needed and self._pool:
            start, end, zero = self._pool.pop()
            if end - start > needed:
                self._pool.append((start + needed, end, zero))
                end = start + needed
            out.append((start, end, zero))
            needed -= end - start
            self._pooled -= end - start
        if needed:
            start = align_up(self.end + self.slack, self.grain)
            self.end = start + needed
            self.slack = 0
            out.append((start, self.end, self.zero_beyond_end))
        return out

    def give(self, start: int, end: int, zero: bool) -> None:
        """Whole grains that nothing refers to any more."""
        self._pool.append((start, end, zero))
        self._pooled += end - start
