"""Interval work of a write batch."""

from __future__ import annotations

from bisect import bisect_left
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

    def sources(self, steps: Sequence[Step]) -> tuple[list[Buffer], list[tuple[int, memoryview]]]:
        """What each step writes, and the (guest offset, view) that must be read into it first."""
        out: list[Buffer] = []
        holes: list[tuple[int, memoryview]] = []
        starts, buffers = self.starts, self.buffers
        for step in steps:
            guest, length = step.guest, step.length
            i = bisect_left(starts, guest)
            if (
                not self.overlapping
                and i < len(starts)
                and starts[i] == guest
                and len(buffers[i]) >= length
            ):
                buffer = buffers[i]
                out.append(buffer if len(buffer) == length else memoryview(buffer)[:length])
                continue
            out.append(self._compose(guest, length, holes))
        return out, holes

    def _compose(self, guest: int, length: int, holes: list[tuple[int, memoryview]]) -> Buffer:
        end = guest + length
        first = bisect_left(self.starts, guest - self.longest)
        last = bisect_left(self.starts, end)
        parts = [
            i
            for i in range(first, last)
            if self.starts[i] + len(self.buffers[i]) > guest and len(self.buffers[i])
        ]
        if len(parts) == 1:
            i = parts[0]
            start = self.starts[i]
            if start <= guest and start + len(self.buffers[i]) >= end:
                return memoryview(self.buffers[i]).cast("B")[guest - start : end - start]
        target = memoryview(bytearray(length))
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
            target[a - guest : b - guest] = memoryview(self.buffers[i]).cast("B")[
                a - start : b - start
            ]
        return target
