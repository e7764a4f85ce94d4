"""A leaf of the graph that remembers everything, and breaks on demand.

:class:`RecordingNode` keeps bytes in memory.  It logs each change and each barrier with the moments
at which it was issued and at which it ended; from that log :meth:`~.recorded.Recorded.crash_state`
makes what a loss of power could have left.  I/O may end in any order, fail at its n-th request,
meet a full disk, or ask for aligned requests.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..contract import NO_FALLBACK, Limits
from ..engine.futures import BaseDriver, Future, wait_all
from ..extents import Extent
from ..protocols.base import Buffer, Leaf
from ..protocols.bounce import Bounce
from .recorded import NEVER, Change, Recorded

__all__ = ["NEVER", "POISON", "Change", "RecordingNode"]

POISON = 0xDD
"""What discarded bytes turn into where the leaf does not say that they read as zeroes."""


class RecordingNode(Recorded, Leaf):
    """Bytes in memory with a log of changes and barriers.

    ``delay``: longest virtual time of an I/O (0: everything ends at once); it needs a driver with
    ``delay`` and ``rng``, see :class:`~diskwright.testing.scheduler.SeededDriver`.  ``capacity`` in
    bytes: writing beyond it is ENOSPC.  ``alignment``: requests below it are widened under leases,
    as the file protocol does with O_DIRECT.  ``zeroes_discards``: what is discarded reads as zeroes
    and fast zeroing works; otherwise discarded bytes are poisoned and fast zeroing is refused.
    """

    def __init__(
        self,
        driver: BaseDriver,
        data: bytes = b"",
        *,
        name: str = "",
        delay: int = 0,
        capacity: int = NEVER,
        alignment: int = 1,
        zeroes_discards: bool = False,
        clock: Callable[[], int] | None = None,
        sector: int = 64,
    ) -> None:
        Leaf.__init__(self, driver, "recording", name)
        Recorded.__init__(self, data)
        self.size = len(data)
        self.delay = delay
        self.capacity = capacity
        self.zeroes_discards = zeroes_discards
        self.sector = sector
        self.requests = 0
        self.fail_at: dict[int, int] = {}
        """errno by the number of the request (1 is the first) that is to fail."""
        self.failed: list[tuple[int, str, int]] = []
        """(number, kind, errno) of what did fail."""
        self.counts: Counter[str] = Counter()
        """Requests by kind: read, write, zero, discard, flush, truncate."""
        self.in_flight = 0
        self._ticks = 0
        self._tick: Callable[[], int]
        self._tick = clock if clock is not None else getattr(driver, "tick", self._own_tick)
        self.limits = Limits(alignment=alignment)
        self.bounce: Bounce | None = None
        if alignment > 1:
            self.bounce = Bounce(alignment, self._read_raw, self._write_raw)

    def _own_tick(self) -> int:
        self._ticks += 1
        return self._ticks

    # -- one I/O
    def _issue(self, kind: str, change: Change | None, finish: Callable[[], Any]) -> Future[Any]:
        """Start an I/O whose effect on the bytes is ``finish``."""
        self.check_open()
        self.requests += 1
        self.counts[kind] += 1
        number = self.requests
        code = self.fail_at.pop(number, 0)
        if code:
            self.failed.append((number, kind, code))
        if change is not None:
            self.log.append(change)
            end = change.offset + len(change.data)
            if not code and max(end, change.size) > self.capacity:
                code = errno.ENOSPC
        future: Future[Any] = Future(io=True)
        self.in_flight += 1

        def ended() -> None:
            self.in_flight -= 1
            value = None
            if change is not None:
                change.done = self._tick()
                if code:
                    self._spoil(change)
                change.apply(self.data)
                self.size = len(self.data)
            if not code:
                value = finish()
            future.set(value, OSError(code, os.strerror(code)) if code else None)

        time = self._time()
        if time:
            _ = self.driver.later(time, ended)
        else:
            ended()
        return future

    def _time(self) -> float:
        if not self.delay:
            return 0.0
        time: float = self.driver.delay(self.delay)  # type: ignore[attr-defined]
        return time

    def _spoil(self, change: Change) -> None:
        """A request that fails may have changed a part."""
        change.lost = True
        rng: random.Random = getattr(self.driver, "rng", None) or random.Random(self.requests)
        kept = rng.choice([0, 0, rng.randrange(len(change.data) + 1)]) if change.data else 0
        change.data = change.data[: kept - kept % self.sector]
        change.size = -1

    # -- requests
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        if self.bounce is not None and not self.bounce.aligned(offsets, lengths):
            return await self.bounce.read(offsets, lengths, into)
        found = await self._read_raw(offsets, lengths)
        if into is None:
            return found
        for view, part in zip(into, found, strict=True):
            view[:] = part
        return into

    def _get(self, offset: int, length: int) -> bytes:
        part = bytes(self.data[offset : offset + length])
        return part + bytes(length - len(part))

    def _late(self, offset: int, length: int, early: bytes | None) -> bytes:
        return self._get(offset, length) if early is None else early

    async def _read_raw(self, offsets: Sequence[int], lengths: Sequence[int]) -> Sequence[Buffer]:
        pending: list[Future[bytes]] = []
        for offset, length in zip(offsets, lengths, strict=True):
            # The bytes are those of some moment between issue and end.
            rng = getattr(self.driver, "rng", None)
            early = self._get(offset, length) if rng is None or rng.random() < 0.5 else None
            pending.append(self._issue("read", None, partial(self._late, offset, length, early)))
        return await wait_all(pending)

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        if self.bounce is not None:
            await self.bounce.write(offsets, buffers)
        else:
            await self._write_raw(offsets, buffers)

    async def _write_raw(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        pending = []
        later: list[tuple[int, Buffer]] = []
        taken: list[tuple[int, int]] = []
        for offset, buffer in zip(offsets, buffers, strict=True):
            end = offset + len(buffer)
            if later or any(a < end and offset < b for a, b in taken):
                later.append((offset, buffer))  # overlapping parts of a batch keep their order
                continue
            taken.append((offset, end))
            pending.append(self._start("write", offset, bytes(buffer)))
        await wait_all(pending)
        for offset, buffer in later:
            await self._start("write", offset, bytes(buffer))

    def _start(self, kind: str, offset: int, data: bytes, size: int = -1) -> Future[Any]:
        change = Change(kind, self._tick(), offset, data, size)
        return self._issue(kind, change, lambda: None)

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        if flags & NO_FALLBACK and not self.zeroes_discards:
            raise OSError(errno.ENOTSUP, "zeroing is not fast here")
        await self._fill("zero", offsets, lengths, 0)

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        await self._fill("discard", offsets, lengths, 0 if self.zeroes_discards else POISON)

    async def _fill(
        self, kind: str, offsets: Sequence[int], lengths: Sequence[int], value: int
    ) -> None:
        lease = None if self.bounce is None else await self.bounce.lock(offsets, lengths)
        try:
            await wait_all(
                [
                    self._start(kind, offset, bytes([value]) * length)
                    for offset, length in zip(offsets, lengths, strict=True)
                    if length
                ]
            )
        finally:
            if lease is not None and self.bounce is not None:
                self.bounce.leases.drop(lease)

    async def flush(self) -> None:
        issued = self._tick()
        try:
            await self._issue("flush", None, lambda: self.barriers.append((issued, self._tick())))
        except OSError:
            self.forget()
            raise

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return self.all_data(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        await self._start("truncate", 0, b"", size)
        self.changed()

    async def close(self) -> None:
        self.closed = True
