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

    def compose(self, guest: int, target: memoryview, holes: list[tuple[int, memoryview]]) -> None:
        """Lay the requests over ``target``, which is the range from ``guest``; what none of them
        covers is added to ``holes`` as (guest offset, view) to be read."""
        end = guest + len(target)
        first = bisect_left(self.starts, guest - self.longest)
        last = bisect_left(self.starts, end)
        parts = [
            i
            for i in range(first, last)
            if self.starts[i] + len(self.buffers[i]) > guest and len(self.buffers[i])
        ]
        covered = guest
        for i in parts:
            start = self.starts[i]
            if start > covered:
                holes.append((covered, target[covered - guest : start - guest]))
            covered = max(covered, start + len(self.buffers[i]))
        if covered < end:
            holes.append((covered, target[covered - guest :]))
        if self.overlapping:
            parts.sort(key=self.order.__getitem__)
        for i in parts:
            start = self.starts[i]
            a, b = max(start, guest), min(start + len(self.buffers[i]), end)
            target[a - guest : b - guest] = memoryview(self.buffers[i])[a - start : b - start]
