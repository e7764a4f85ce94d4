"""What was asked of a node: how many requests, how many bytes, how long they took."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from ..errors import UsageError

READ, WRITE, FLUSH, UNMAP = KINDS = ("rd", "wr", "flush", "unmap")
"""Zeroes that are written count as writes; discards are ``unmap``."""


class Histogram:
    """How many requests took how long: ``bins[i]`` those of less than ``boundaries[i]``
    nanoseconds (and no less than the one before), the last one all others."""

    __slots__ = ("bins", "boundaries")

    def __init__(self, boundaries: Sequence[int]) -> None:
        """Raises UsageError unless the boundaries are positive and grow."""
        if not boundaries or any(a >= b for a, b in pairwise((0, *boundaries))):
            raise UsageError("the boundaries of a histogram must be positive and grow")
        self.boundaries = list(boundaries)
        self.bins = [0] * (len(boundaries) + 1)


class Counter:
    """Requests of one kind.  Those that fail are among ``failed`` alone, but take time as well."""

    __slots__ = ("bytes", "failed", "histogram", "nanoseconds", "operations")

    def __init__(self) -> None:
        self.bytes = self.operations = self.failed = self.nanoseconds = 0
        self.histogram: Histogram | None = None

    def done(self, count: int, size: int, nanoseconds: int) -> None:
        """``count`` requests of together ``size`` bytes took so long, each of them."""
        self.operations += count
        self.bytes += size
        self.nanoseconds += nanoseconds * count
        found = self.histogram
        if found is not None:
            found.bins[bisect_right(found.boundaries, nanoseconds)] += count

    def add(self, other: Counter) -> None:
        """Count what ``other`` has counted, but for its histogram."""
        self.bytes += other.bytes
        self.operations += other.operations
        self.failed += other.failed
        self.nanoseconds += other.nanoseconds


class Stats:
    """All that somebody asked of a disk, or all that was asked of a node."""

    def __init__(self) -> None:
        self.counters = {kind: Counter() for kind in KINDS}
        self.last: int | None = None
        """When the last request ended, by ``time.perf_counter_ns``; None: there was none."""

    def add(self, other: Stats) -> None:
        """Count what ``other`` has counted."""
        for kind, counter in self.counters.items():
            counter.add(other.counters[kind])
        if other.last is not None:
            self.last = max(other.last, self.last or 0)
