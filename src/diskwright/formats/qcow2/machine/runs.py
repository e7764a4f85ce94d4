"""Sets of clusters, kept as sorted runs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

Run = tuple[int, int]  # (start, end) in clusters, end exclusive


class RunSet:
    """Disjoint runs of cluster indexes in ascending order; neighbours are merged."""

    __slots__ = ("ends", "starts", "total")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.total = 0

    def __len__(self) -> int:
        """The number of runs."""
        return len(self.starts)

    def __iter__(self) -> Iterator[Run]:
        return iter(list(zip(self.starts, self.ends, strict=True)))

    def __contains__(self, cluster: int) -> bool:
        i = bisect_right(self.starts, cluster) - 1
        return i >= 0 and cluster < self.ends[i]

    def add(self, start: int, end: int) -> None:
        """Add [start, end); what is there already stays."""
        if start >= end:
            return
        starts, ends = self.starts, self.ends
        first = bisect_left(ends, start)
        last = bisect_right(starts, end)
        if first < last:
            start = min(start, starts[first])
            end = max(end, ends[last - 1])
            for i in range(first, last):
                self.total -= ends[i] - starts[i]
        starts[first:last] = [start]
        ends[first:last] = [end]
        self.total += end - start

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out; what is not there is no matter."""
        if start >= end:
            return
        starts, ends = self.starts, self.ends
        if starts and starts[0] == start and end < ends[0]:
            starts[0] = end  # what an allocator takes
            self.total -= end - start
            return
        first = bisect_right(ends, start)
        last = bisect_left(starts, end)
        if first >= last:
            return
        left, right = starts[first], ends[last - 1]
        for i in range(first, last):
            self.total -= ends[i] - starts[i]
        keep: list[Run] = []
        if left < start:
            keep.append((left, start))
        if right > end:
            keep.append((end, right))
        starts[first:last] = [run[0] for run in keep]
        ends[first:last] = [run[1] for run in keep]
        self.total += sum(run[1] - run[0] for run in keep)

    def outside(self, start: int, end: int) -> list[Run]:
        """The parts of [start, end) that are not in the set."""
        if not self.starts:
            return [(start, end)] if start < end else []
        out = []
        i = bisect_right(self.ends, start)
        while start < end:
            if i == len(self.starts) or self.starts[i] >= end:
                out.append((start, end))
                break
            if start < self.starts[i]:
                out.append((start, self.starts[i]))
            start = self.ends[i]
            i += 1
        return out

    def cut(self, keep: int) -> int:
        """Forget all runs but the first ``keep``; the start of the first one forgotten."""
        start = self.starts[keep]
        for i in range(keep, len(self.starts)):
            self.total -= self.ends[i] - self.starts[i]
        del self.starts[keep:], self.ends[keep:]
        return start
