"""Interval work of a write batch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from ..contract import Range, Step
from .leases import Span
from .node import Buffer


def merge_spans(spans: list[Span]) -> list[Span]:
    """Sorted and joined; spans that touch become one."""
    if len(spans) == 1:
        return spans
    out: list[Span] = []
    end = -1
    for span in sorted(spans):
        if span[0] <= end:
            if span[1] > end:
                end = span[1]
                out[-1] = (out[-1][0], end)
        else:
            out.append(span)
            end = span[1]
    return out


class Overlay:
    """The bytes of a write batch, laid over what a step covers.

    Of requests that overlap, the later one wins.
    """

    def __init__(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        self.starts = [offsets[i] for i in order]
        self.buffers = [buffers[i] for i in order]
        self.order = order
        self.longest = max((len(b) for b in buffers), default=0)
        self.overlapping = any(
            start + len(buffer) > following
            for start, buffer, following in zip(
                self.starts, self.buffers, self.starts[1:], strict=False
            )
        )

    def ranges(self) -> list[Range]:
        """The exact ranges in guest order."""
        return [(o, len(b)) for o, b in zip(self.starts, self.buffers, strict=True) if len(b)]

    def whole(self, step: Step) -> Buffer | None:
        """The bytes of a step that one request covers alone; None when it must be composed."""
        if self.overlapping:
            return None
        guest, length = step.guest, step.length
        i = bisect_right(self.starts, guest) - 1
        if i < 0:
            return None
        skip, buffer = guest - self.starts[i], self.buffers[i]
        if len(buffer) < skip + length:
            return None
        return buffer if len(buffer) == length else memoryview(buffer)[skip : skip + length]

    def holes(self, guest: int, target: memoryview) -> list[tuple[int, memoryview]]:
        """What must be read into ``target``, the range from ``guest``, before the requests are
        laid over it: (guest offset, view).  Where they cover less than half it is all of it: one
        read costs less than two."""
        end = guest + len(target)
        out: list[tuple[int, memoryview]] = []
        covered, missing = guest, 0
        for i in self._parts(guest, end):
            start = self.starts[i]
            if start > covered:
                out.append((covered, target[covered - guest : start - guest]))
                missing += start - covered
            covered = max(covered, start + len(self.buffers[i]))
        if covered < end:
            out.append((covered, target[covered - guest :]))
            missing += end - covered
        return [(guest, target)] if len(out) > 1 and 2 * missing > len(target) else out

    def lay(self, guest: int, target: memoryview) -> None:
        """Lay the requests over ``target``, which is the range from ``guest``."""
        end = guest + len(target)
        parts = self._parts(guest, end)
        if self.overlapping:
            parts.sort(key=self.order.__getitem__)
        for i in parts:
            start = self.starts[i]
            a, b = max(start, guest), min(start + len(self.buffers[i]), end)
            target[a - guest : b - guest] = memoryview(self.buffers[i])[a - start : b - start]

    def _parts(self, guest: int, end: int) -> list[int]:
        """The requests that touch a range."""
        first = bisect_left(self.starts, guest - self.longest)
        last = bisect_left(self.starts, end)
        return [
            i
            for i in range(first, last)
            if self.starts[i] + len(self.buffers[i]) > guest and len(self.buffers[i])
        ]
