"""Zeroes and discards: whole units by the map, ragged ends with care."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator, Sequence

from ..contract import (
    DISCARD,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    WRITE,
    WRITE_ZERO,
    ZERO_UNMAP,
    Range,
)
from ..extents import HOLE, ZERO, Data, Extent
from ..hints import TYPE_CHECKING
from ..units import align_down, align_up
from .leases import Span
from .spans import Overlay, merge_spans

if TYPE_CHECKING:
    from .engine import Engine


# One plan covers at most so many bytes (about: whole units), so that a request over terabytes
# neither runs for seconds without giving way nor dirties more tables than the budget holds.
_PIECE = 1 << 30
# From so much on that was discarded it is made sure of, so that it can be used again before the
# file grows for want of it.
_RECLAIM = 8 << 20

# From this length on the host zeroes a range sooner than it takes that much data.
_IN_PLACE = 64 << 10
_ZEROES = memoryview(bytes(1 << 20))


def pieces(start: int, end: int, unit: int) -> Iterator[Range]:
    """(offset, length) of the parts that one plan each takes."""
    # Where nothing is mapped one call of the system does it.
    piece = end - start if unit == 1 else align_up(_PIECE, unit)
    while start < end:
        length = min(piece, end - start)
        yield start, length
        start += length


def portions(start: int, end: int, unit: int, size: int) -> Iterator[Range]:
    """`pieces`, and what are only parts of units by itself: they may have to go another way."""
    low, high = align_up(start, unit), end if end >= size else align_down(end, unit)
    if low >= end:
        yield start, end - start
        return
    if start < low:
        yield start, low - start
    yield from pieces(low, high, unit)
    if high < end:
        yield high, end - high


class Zeroer:
    """Zeroes and discards of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._given_up = 0  # bytes that were discarded since it was last made sure of

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        """Make ranges read as zeroes: whole units by the map, ragged ends as data."""
        kind = ZERO_UNMAP if flags & MAY_UNMAP else WRITE_ZERO
        for offset, length in zip(offsets, lengths, strict=True):
            if length:
                await self._zero_one(offset, length, kind, flags)
        if flags & FUA:
            await self.engine.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Drop whole units; ragged ends keep their bytes (a last partial unit counts as whole)."""
        unit, size = self.engine.zero_unit, self.engine.format.size
        if self.engine.bitmaps.active:
            # The ragged ends as well, which some hosts drop, as other programs have it.
            self.engine.bitmaps.mark(
                [(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
            )
        spans = []
        for offset, length in zip(offsets, lengths, strict=True):
            start = align_up(offset, unit)
            end = offset + length if offset + length >= size else align_down(offset + length, unit)
            if start < end:
                spans.append((start, end))
        whole = self.engine.format.unit
        if sum(end - start for start, end in spans) <= _PIECE:
            ranges = [
                part for start, end in merge_spans(spans)
                for part in portions(start, end, whole, size)
            ]
            await self.engine.allocator.allocate(ranges, DISCARD, None)
        else:
            for start, end in spans:
                for part in portions(start, end, whole, size):
                    await self.engine.allocator.allocate([part], DISCARD, None)
        self._given_up += sum(end - start for start, end in spans)
        if self._given_up >= _RECLAIM:
            self._given_up = 0
            await self.engine.reclaim()

    async def _zero_one(self, offset: int, length: int, kind: str, flags: int) -> None:
        """Zero one range.  A ragged end whose unit holds nothing else but zeroes takes the whole
        unit; any other is written as data."""
        engine = self.engine
        unit, size = engine.zero_unit, engine.format.size
        end = offset + length
        inner = (align_up(offset, unit), end if end >= size else align_down(end, unit))
        ragged: list[Span] = []
        if inner[0] > inner[1]:
            ragged.append((offset, end))
        else:  # the ends are judged each by itself, also where no whole unit is between them
            ragged += [s for s in ((offset, inner[0]), (inner[1], end)) if s[0] < s[1]]
            if inner[0] < inner[1]:
                for part in portions(*inner, engine.format.unit, size):
                    await self._zero_units([part], kind, flags)
        for start, stop in ragged:
            await self._zero_ragged(start, stop, kind, flags)

    async def _zero_units(self, ranges: list[Range], kind: str, flags: int) -> None:
        if await self.engine.allocator.allocate(ranges, kind, None, flags):
            return
        if flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "zeroes can only be written as data here")
        for offset, length in ranges:
            await self._write_zeroes(offset, length)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, len(_ZEROES)):
            await self.engine.writer.write([at], [_ZEROES[: offset + length - at]])

    async def _zero_ragged(self, start: int, stop: int, kind: str, flags: int) -> None:
        engine = self.engine
        unit, size = engine.zero_unit, engine.format.size
        first, last = align_down(start, unit), min(align_up(stop, unit), size)
        whole = engine.format.unit
        span = (align_down(start, whole), align_up(stop, whole))
        lease = await engine.leases.take([span], exclusive=True)
        try:
            epoch = [engine.epochs.enter()]
            try:
                zero = await self.reads_zero(first, start) and await self.reads_zero(stop, last)
                if zero and await self.engine.allocator.plan_and_move(
                    [(first, last - first)], kind, None, epoch, flags
                ):
                    return
                await self._zero_inside(start, stop, kind, flags, epoch)
            finally:
                if engine.bitmaps.active:
                    engine.bitmaps.mark([(start, stop)])
                if epoch:
                    engine.epochs.leave(epoch[0])
        finally:
            engine.leases.drop(lease)
        self.engine.allocator.press()

    async def _zero_inside(
        self, start: int, stop: int, kind: str, flags: int, epoch: list[int]
    ) -> None:
        """Zero a part of units that hold other bytes, too: what is data and long is zeroed where
        it lies (a unit may be hundreds of MiB), the rest is written."""
        engine = self.engine
        # Also behind the end of a backing file, which may grow: what was written stays hidden.
        below = engine.slots.get("backing") is not None
        unmap = MAY_UNMAP if kind == ZERO_UNMAP else 0
        async for extent in self._extents(start, stop):
            end = start + extent.length
            if extent.kind == ZERO or (extent.kind == HOLE and not below):
                pass
            elif (
                isinstance(extent, Data)
                and extent.writable
                and not extent.xform
                and extent.length >= _IN_PLACE
            ):
                child = engine.slots[extent.slot]
                if child.wants_events:
                    await engine.announce(extent.slot, "write_aio")
                await child.zero([extent.host], [extent.length], unmap | flags & NO_FALLBACK)
            elif flags & NO_FALLBACK:
                raise OSError(errno.ENOTSUP, "zeroes can only be written as data here")
            else:
                for at in range(start, end, len(_ZEROES)):
                    overlay = Overlay([at], [_ZEROES[: end - at]])
                    await engine.allocator.plan_and_move(overlay.ranges(), WRITE, overlay, epoch)
            start = end

    async def _extents(self, start: int, stop: int) -> AsyncIterator[Extent]:
        """The map of a range, which may be as long as the disk, some of it at a time."""
        while start < stop:
            for extent in await self.engine.map_range(start, min(stop - start, _PIECE)):
                yield extent
                start += extent.length

    async def reads_zero(self, start: int, stop: int) -> bool:
        """True when the maps alone, here and below, say that the range reads as zeroes."""
        if start >= stop:
            return True
        backing = self.engine.slots.get("backing")
        async for extent in self._extents(start, stop):
            if extent.kind == HOLE:
                if backing is not None and start < backing.size:
                    end = min(start + extent.length, backing.size)
                    if not await backing.reads_zero(start, end - start):
                        return False
            elif extent.kind != ZERO:
                return False
            start += extent.length
        return True
