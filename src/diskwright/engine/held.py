"""Segments whose bytes are in memory: read once for several takers."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress

from ..errors import DiskError
from ..hints import Any
from .buffers import page_buffer
from .copy import CopyFailed, Segment
from .kernel import BaseDriver, Cancelled, Condition, Future, Task, wait_all
from .node import Buffer, Node

CHUNK = 1 << 20
"""Most bytes that are held as one."""
_AHEAD = 4
"""Chunks that are being read."""
_WAITING = 8
"""Segments that one taker may be behind the fastest."""

Taker = Callable[[AsyncIterator[Segment]], Coroutine[Any, Any, None]]


class Held(Node):
    """Bytes in memory, to be read like a disk."""

    def __init__(self, driver: BaseDriver, data: memoryview) -> None:
        super().__init__(driver, "held")
        self.data = data
        self.size = len(data)

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        parts = [self.data[at : at + n] for at, n in zip(offsets, lengths, strict=True)]
        if into is None:
            return parts
        for view, part in zip(into, parts, strict=True):
            view[:] = part
        return into


async def held(
    driver: BaseDriver, segments: AsyncIterator[Segment]
) -> AsyncGenerator[Segment, None]:
    """``segments`` with their bytes, of which the next few are being read.  Raises CopyFailed."""
    ahead: deque[Future[Segment]] = deque()
    try:
        async for segment in segments:
            step = segment.length if segment.zero else CHUNK
            for done in range(0, segment.length, step):
                part = segment._replace(
                    source_offset=segment.source_offset + done,
                    target_offset=segment.target_offset + done,
                    length=min(step, segment.length - done),
                )
                ahead.append(driver.start(_read(driver, part), name="read ahead", io=True))
                if len(ahead) >= _AHEAD:
                    yield await ahead.popleft()
        while ahead:
            yield await ahead.popleft()
    finally:
        with suppress(Exception, Cancelled):
            await wait_all(list(ahead))


async def _read(driver: BaseDriver, part: Segment) -> Segment:
    if part.zero or isinstance(part.source, Held):
        return part
    view = page_buffer(part.length)
    try:
        await part.source.read([part.source_offset], [part.length], [view])
    except (OSError, DiskError) as error:
        raise CopyFailed("read", part.target_offset, error) from error
    return part._replace(source=Held(driver, view), source_offset=0)


class _Queue:
    """What one taker has not taken yet."""

    def __init__(self, changed: Condition) -> None:
        self.waiting: deque[Segment] = deque()
        self.ended = False
        self._changed = changed

    def __aiter__(self) -> _Queue:
        return self

    async def __anext__(self) -> Segment:
        while not self.waiting:
            if self.ended:
                raise StopAsyncIteration
            await self._changed.wait()
        self._changed.notify()
        return self.waiting.popleft()


async def share(
    driver: BaseDriver, segments: AsyncIterator[Segment], takers: Sequence[Taker]
) -> None:
    """Hand ``segments``, read once, to each of ``takers``; the slowest sets the pace.

    Raises the first error, when all takers have ended; one that fails ends the others.
    """
    changed = Condition()
    queues = [_Queue(changed) for _ in takers]
    failed: list[Exception] = []

    async def run(taker: Taker, queue: _Queue) -> None:
        try:
            await taker(queue)
        except Exception as error:
            failed.append(error)
            changed.notify()

    tasks: list[Task[None]] = [
        driver.spawn(run(taker, queue), "taker")
        for taker, queue in zip(takers, queues, strict=True)
    ]
    try:
        async with aclosing(held(driver, segments)) as read:
            async for segment in read:
                while not failed and any(len(q.waiting) >= _WAITING for q in queues):
                    await changed.wait()
                if failed:
                    break
                for queue in queues:
                    queue.waiting.append(segment)
                changed.notify()
        for queue in queues:
            queue.ended = True
        changed.notify()
        while not failed and not all(task.done for task in tasks):
            await next(task for task in tasks if not task.done)
    finally:
        for task in tasks:
            task.cancel()
        with suppress(Exception, Cancelled):
            await wait_all(tasks)
    if failed:
        raise failed[0]
