"""Segments of a copy, rounded to whole units of a target that can store nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import pairwise

from ..units import align_down
from .copy import Segment
from .kernel import BaseDriver
from .node import Buffer, Node


async def whole_units(
    driver: BaseDriver, segments: AsyncIterator[Segment], unit: int, end: int
) -> AsyncIterator[Segment]:
    """``segments`` (in order, for a target of ``end`` bytes) so that all data are whole units.

    A unit that holds some data is read as a whole; what no segment names of it is read from the
    source of the others.
    """
    held: list[Segment] = []
    async for segment in segments:
        for piece in _cut(segment, unit):
            first = align_down(piece.target_offset, unit)
            if held and align_down(held[0].target_offset, unit) != first:
                for part in _joined(driver, held, unit, end):
                    yield part
                held = []
            stop = piece.target_offset + piece.length
            if piece.target_offset == first and (stop % unit == 0 or stop == end):
                yield piece
            else:
                held.append(piece)
    for part in _joined(driver, held, unit, end):
        yield part


def _cut(segment: Segment, unit: int) -> Iterator[Segment]:
    """The part before the first border of a unit, the whole units, and the rest."""
    start, stop = segment.target_offset, segment.target_offset + segment.length
    borders = {start, min(-(-start // unit) * unit, stop), max(align_down(stop, unit), start), stop}
    for a, b in pairwise(sorted(borders)):
        yield segment._replace(
            source_offset=segment.source_offset + a - start, target_offset=a, length=b - a
        )


def _joined(driver: BaseDriver, held: list[Segment], unit: int, end: int) -> list[Segment]:
    """The pieces of one unit as one segment, unless all of them are zeroes."""
    data = [piece for piece in held if not piece.zero]
    if not data:
        return held
    start = align_down(held[0].target_offset, unit)
    stop = min(start + unit, end)
    source = data[0].source
    moved = data[0].source_offset - data[0].target_offset
    alike = all(p.source is source and p.source_offset - p.target_offset == moved for p in held)
    if alike and start + moved >= 0 and stop + moved <= source.size:
        return [Segment(source, start + moved, start, stop - start)]
    return [Segment(Mosaic(driver, data, end), start, start, stop - start)]


class Mosaic(Node):
    """Bytes of several sources at their places in the target; all others are zero."""

    def __init__(self, driver: BaseDriver, parts: Sequence[Segment], size: int) -> None:
        super().__init__(driver, "mosaic")
        self.parts = parts
        self.size = size

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        views = into if into is not None else [memoryview(bytearray(n)) for n in lengths]
        for offset, length, view in zip(offsets, lengths, views, strict=True):
            view[:] = bytes(length)
            for part in self.parts:
                first = max(offset, part.target_offset)
                last = min(offset + length, part.target_offset + part.length)
                if first < last:
                    at = part.source_offset + first - part.target_offset
                    target = view[first - offset : last - offset]
                    await part.source.read([at], [last - first], [target])
        return views
