"""Requests that are not aligned, on something that only takes aligned ones.

This is the one place that widens reads and that reads, changes and writes back the units at the
ends of a write.  Such a write holds an exclusive lease on its units; aligned writes hold a shared
one, so that neither loses bytes of the other.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Sequence

from ..engine.leases import Lease, Leases
from .base import Buffer

Reader = Callable[[Sequence[int], Sequence[int]], Awaitable[Sequence[Buffer]]]
Writer = Callable[[Sequence[int], Sequence[Buffer]], Awaitable[None]]


class Bounce:
    """``alignment`` is a power of two in bytes.  ``read`` and ``write`` take aligned columns; what
    is beyond the end reads as zeroes.

    ``end``, when given, tells where the disk ends: a write is then not widened beyond that (or
    beyond what was asked, if that is more), so that its end may be unaligned there.
    """

    def __init__(
        self,
        alignment: int,
        read: Reader,
        write: Writer,
        end: Callable[[], int] | None = None,
    ) -> None:
        self.alignment = alignment
        self.leases = Leases(alignment)
        self._read, self._write, self._end = read, write, end

    def aligned(self, offsets: Sequence[int], lengths: Sequence[int]) -> bool:
        """True when nothing has to be widened."""
        mask = self.alignment - 1
        bits = 0
        for offset, length in zip(offsets, lengths, strict=True):
            bits |= offset | length
        return not bits & mask

    def widen(self, offset: int, length: int) -> tuple[int, int]:
        """(start, end) of the units that the range touches."""
        mask = self.alignment - 1
        return offset & ~mask, (offset + length + mask) & ~mask

    async def lock(self, offsets: Sequence[int], lengths: Sequence[int]) -> Lease:
        """The lease for a change of these ranges that is not done by :meth:`write` (zeroes,
        discard): shared when they are aligned.  Give it back to ``leases.drop``."""
        spans = [self.widen(o, n) for o, n in zip(offsets, lengths, strict=True) if n]
        return await self.leases.take(spans, not self.aligned(offsets, lengths))

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read any ranges."""
        spans = [self.widen(o, n) for o, n in zip(offsets, lengths, strict=True)]
        wide = await self._read([a for a, _ in spans], [b - a for a, b in spans])
        if into is None:
            return [
                buffer if len(buffer) == n else memoryview(buffer)[o - a : o - a + n]
                for (a, _), o, n, buffer in zip(spans, offsets, lengths, wide, strict=True)
            ]
        for (a, _), o, n, buffer, view in zip(spans, offsets, lengths, wide, into, strict=True):
            view[:] = buffer if len(buffer) == n else memoryview(buffer)[o - a : o - a + n]
        return into

    async def write(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        """Write any ranges; of overlapping ones the later wins."""
        if self.alignment == 1:
            await self._write(offsets, buffers)
            return
        lengths = list(map(len, buffers))
        if self.aligned(offsets, lengths):
            spans = [(o, o + n) for o, n in zip(offsets, lengths, strict=True) if n]
            lease = self.leases.try_take(spans, False) or await self.leases.take(spans, False)
            try:
                await self._write(offsets, buffers)
            finally:
                self.leases.drop(lease)
            return
        requests = [(o, b) for o, b in zip(offsets, buffers, strict=True) if len(b)]
        if not requests:
            return
        spans = _merged([self.widen(o, len(b)) for o, b in requests])
        lease = await self.leases.take(spans, True)
        try:
            starts, whole = await self._fill(spans, requests)
            await self._write(starts, whole)
        finally:
            self.leases.drop(lease)

    async def _fill(
        self, spans: list[tuple[int, int]], requests: list[tuple[int, Buffer]]
    ) -> tuple[list[int], list[Buffer]]:
        """The units of ``spans`` with the requests put in, as columns."""
        unit = self.alignment
        partial: set[int] = set()
        for offset, buffer in requests:
            if offset % unit:
                partial.add(offset - offset % unit)
            end = offset + len(buffer)
            if end % unit:
                partial.add(end - end % unit)
        units = sorted(partial)
        old = dict(
            zip(units, await self._read(units, [unit] * len(units)), strict=True) if units else ()
        )
        by_span: dict[int, list[tuple[int, Buffer]]] = {start: [] for start, _ in spans}
        index = sorted(by_span)
        for offset, buffer in requests:
            by_span[index[bisect_right(index, offset) - 1]].append((offset, buffer))
        limit = max(
            [o + len(b) for o, b in requests] + ([self._end()] if self._end is not None else [])
        )
        starts: list[int] = []
        whole: list[Buffer] = []
        for start, end in spans:
            if self._end is not None:
                end = min(end, limit)
            joined = bytearray(end - start)
            for base in units[bisect_left(units, start) : bisect_left(units, end)]:
                part = memoryview(old[base])[: end - base]
                joined[base - start : base - start + len(part)] = part
            for offset, buffer in by_span[start]:
                joined[offset - start : offset - start + len(buffer)] = buffer
            starts.append(start)
            whole.append(joined)
        return starts, whole


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with those that overlap joined."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out
