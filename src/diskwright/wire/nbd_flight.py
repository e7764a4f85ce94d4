"""What an NBD client asks together, in columns, and what it knows of the answers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from ..records import NamedTuple

MOST = 4096
"""Most requests of a flight."""
MOST_GAPS = 4096
"""Parts that do not touch each other, of one read: a server sends them nearly in order."""


class Coverage:
    """Disjoint ranges (start, end), in order; those that touch are one."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Take a range.  False when some of it was there, or when there are too many parts."""
        starts, ends = self._starts, self._ends
        at = bisect_right(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            return False
        joins_left = bool(at) and ends[at - 1] == start
        joins_right = at < len(starts) and starts[at] == end
        if joins_left and joins_right:
            ends[at - 1] = ends.pop(at)
            del starts[at]
        elif joins_left:
            ends[at - 1] = end
        elif joins_right:
            starts[at] = start
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        return len(starts) <= MOST_GAPS

    def covers(self, length: int) -> bool:
        """True when everything up to ``length`` has come, and nothing else."""
        return self._starts == [0] and self._ends == [length]


class Failure(NamedTuple):
    """An error that the server answered: the protocol's number, and what it said to it."""

    number: int
    text: str


class Flight:
    """Requests of one kind that are sent together.

    ``buffers``: for reads where the bytes go (views as long as asked), for writes what is written.
    When all are answered, ``failure`` is the first error, and ``status`` what a block status
    request was told: (length, flags) by the number of the context.  ``ended``, ``coverage`` and
    ``chunks`` are the machine's notes of single requests.
    """

    __slots__ = (
        "buffers", "chunks", "command", "coverage", "ended", "failure", "flags", "left", "lengths",
        "number", "offsets", "status",
    )  # fmt: skip

    def __init__(
        self,
        command: int,
        offsets: Sequence[int],
        lengths: Sequence[int],
        buffers: Sequence[Any] = (),
        flags: int = 0,
    ) -> None:
        self.command, self.flags = command, flags
        self.offsets, self.lengths = offsets, lengths
        self.buffers: Sequence[Any] | None = buffers
        self.reset()

    def reset(self) -> None:
        """As if nothing had been answered: it is sent again."""
        self.number = -1
        self.left = len(self.offsets)
        self.failure: Failure | None = None
        self.status: dict[int, list[tuple[int, int]]] = {}
        self.ended = bytearray(self.left)
        self.coverage: dict[int, Coverage] = {}
        self.chunks: dict[int, int] = {}

    def fail(self, number: int, text: str) -> None:
        """Keep the first error."""
        if self.failure is None:
            self.failure = Failure(number, text)
