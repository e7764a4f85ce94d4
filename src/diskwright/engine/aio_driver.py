"""The bridge: the engine's coroutines on a running asyncio loop."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine

from ..hints import Any, TypeVar
from .kernel import BaseDriver, Future, Task, Timer

T = TypeVar("T")


class AsyncioDriver(BaseDriver):
    """Bound to one asyncio loop; every handle made with it is used from that loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self.loop = loop or asyncio.get_running_loop()
        self._waiters: dict[tuple[int, int], Future[None]] = {}

    def soon(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)

        def due() -> None:
            if timer.callback is not None:
                timer.callback()

        self.loop.call_later(seconds, due)
        return timer

    def from_thread(self, callback: Callable[[], None]) -> None:
        self.loop.call_soon_threadsafe(callback)

    def readable(self, fd: int) -> Future[None]:
        return self._wait_for(fd, 0, self.loop.add_reader, self.loop.remove_reader)

    def writable(self, fd: int) -> Future[None]:
        return self._wait_for(fd, 1, self.loop.add_writer, self.loop.remove_writer)

    def _wait_for(
        self, fd: int, direction: int, add: Callable[..., None], remove: Callable[[int], bool]
    ) -> Future[None]:
        future: Future[None] = Future()
        self._waiters[fd, direction] = future

        def ready() -> None:
            remove(fd)
            future.set()

        add(fd, ready)
        return future

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self.loop.add_reader(fd, callback)

    def unwatch(self, fd: int) -> None:
        self.loop.remove_reader(fd)

    def forget(self, fd: int) -> None:
        self.loop.remove_reader(fd)
        self.loop.remove_writer(fd)
        for direction in (0, 1):
            future = self._waiters.pop((fd, direction), None)
            if future is not None:
                future.set(error=OSError(errno.EBADF, "descriptor closed"))

    async def bridge(self, coro: Coroutine[Any, Any, T], patient: bool = False) -> T:
        """Await an engine coroutine from asyncio.

        A cancellation of the asyncio task cancels the coroutine (``patient``: the second one does)
        and waits until its issued I/O has ended before it is raised.
        """
        task = Task(self, coro)
        ended = asyncio.Event()
        task.callbacks.append(lambda _: ended.set())
        cancelled = False
        while not task.done:
            try:
                await ended.wait()
            except asyncio.CancelledError:
                if not patient or cancelled:
                    task.cancel()
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        return await task_result(task)


async def task_result(task: Task[T]) -> T:
    """The result of a finished task."""
    if task.error is not None:
        raise task.error
    return task.value  # type: ignore[return-value]
