"""The kernel: futures and tasks of our own, and the plain driver that runs them.

The engine suspends only on :class:`Future`, so the same coroutines run on the plain
:class:`Driver` here (a ready queue, timers, a selector; asyncio is never imported) and, by
``diskwright.engine.aio_driver``, on an asyncio loop.  A handle belongs to one driver.
"""

from __future__ import annotations

import heapq
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from .futures import (
    BaseDriver,
    Cancelled,
    Condition,
    Deadlock,
    Future,
    Shared,
    Task,
    Timer,
    gather,
    wait_all,
)

__all__ = [
    "BaseDriver",
    "Cancelled",
    "Condition",
    "Deadlock",
    "Driver",
    "Future",
    "Shared",
    "Task",
    "Timer",
    "gather",
    "wait_all",
]

T = TypeVar("T")


class Driver(BaseDriver):
    """Runs coroutines without asyncio: for the synchronous API, the CLI and our own servers.

    Between calls of :meth:`run` nothing runs; timers that came due run at the next call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ready: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._serial = 0
        self._from_threads: deque[Callable[[], None]] = deque()
        self._selector: selectors.BaseSelector | None = None
        self._wake_read = self._wake_write = -1
        self._asleep = False
        self._alarm = threading.Event()
        self._waiters: dict[int, list[Future[None] | None]] = {}
        self._masks: dict[int, int] = {}
        self._pid = os.getpid()

    def soon(self, callback: Callable[[], None]) -> None:
        self._ready.append(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        self._serial += 1
        heapq.heappush(self._timers, (self.now() + seconds, self._serial, timer))
        return timer

    def from_thread(self, callback: Callable[[], None]) -> None:
        self._from_threads.append(callback)
        if self._asleep:  # set before the sleeper looks at the queue a last time
            if self._selector is not None:
                try:
                    os.write(self._wake_write, b"\0")
                except BlockingIOError:
                    pass
            else:
                self._alarm.set()

    # -- descriptors: registered once and kept, so that waiting again costs no system call
    def _watch(self, fd: int, direction: int) -> Future[None]:
        if self._selector is None:
            self._selector = selectors.DefaultSelector()
            self._wake_read, self._wake_write = _pipe()
            self._selector.register(self._wake_read, selectors.EVENT_READ)
        pair = self._waiters.setdefault(fd, [None, None])
        future: Future[None] = Future()
        pair[direction] = future
        want = self._masks.get(fd, 0)
        bit = selectors.EVENT_WRITE if direction else selectors.EVENT_READ
        if not want & bit:
            if want:
                self._selector.modify(fd, want | bit)
            else:
                self._selector.register(fd, bit)
            self._masks[fd] = want | bit
        return future

    def readable(self, fd: int) -> Future[None]:
        return self._watch(fd, 0)

    def writable(self, fd: int) -> Future[None]:
        return self._watch(fd, 1)

    def forget(self, fd: int) -> None:
        if self._masks.pop(fd, 0) and self._selector is not None:
            self._selector.unregister(fd)
        for future in self._waiters.pop(fd, ()):
            if future is not None:
                future.set(error=OSError(9, "descriptor closed"))

    def _poll(self, timeout: float | None) -> None:
        """Wait for descriptors, threads or the timeout."""
        self._asleep = True
        try:
            if self._from_threads:
                timeout = 0
            if self._selector is None:
                if timeout != 0:
                    self._alarm.wait(timeout)
                self._alarm.clear()
                return
            for key, events in self._selector.select(timeout):
                fd: int = key.fd
                if fd == self._wake_read:
                    os.read(fd, 4096)
                    continue
                pair = self._waiters[fd]
                keep = self._masks[fd]
                for direction, bit in ((0, selectors.EVENT_READ), (1, selectors.EVENT_WRITE)):
                    if events & bit:
                        future = pair[direction]
                        if future is not None:
                            pair[direction] = None
                            future.set()
                        else:  # nobody waits: stop hearing of it until somebody does
                            keep &= ~bit
                if keep != self._masks[fd]:
                    self._masks[fd] = keep
                    if keep:
                        self._selector.modify(fd, keep)
                    else:
                        self._selector.unregister(fd)
        finally:
            self._asleep = False

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run ``coro`` to its end and return its result.

        Raises what it raises; :class:`Deadlock` when it waits for something that cannot come.
        KeyboardInterrupt cancels it, waits for its issued I/O, and is raised again.
        """
        task = Task(self, coro)
        interrupted: KeyboardInterrupt | None = None
        while True:
            try:
                self._run_until(task)
                break
            except KeyboardInterrupt as error:
                interrupted = error
                if task.done:
                    break
                task.cancel()
        if interrupted is not None:
            raise interrupted
        if task.error is not None:
            raise task.error
        return task.value  # type: ignore[return-value]

    def _run_until(self, task: Task[Any]) -> None:
        ready, threads = self._ready, self._from_threads
        while not task.done:
            while threads:
                ready.append(threads.popleft())
            if self._timers and self._timers[0][0] <= self.now():
                _, _, timer = heapq.heappop(self._timers)
                if timer.callback is not None:
                    ready.append(timer.callback)
            if ready:
                for _ in range(len(ready)):
                    ready.popleft()()
                if self._masks and not task.done:
                    self._poll(0)
                continue
            while self._timers and self._timers[0][2].callback is None:
                heapq.heappop(self._timers)
            timeout = None
            if self._timers:
                timeout = max(0.0, self._timers[0][0] - self.now())
            elif (
                not self._masks and not (self._pool is not None and self._pool.busy) and not threads
            ):
                raise Deadlock("nothing left to wait for\n" + self.stuck())
            self._poll(timeout)

    def close(self) -> None:
        """End the pool and close the driver's own descriptors."""
        self.stop_pool()
        if self._selector is not None:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._selector = None


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write
