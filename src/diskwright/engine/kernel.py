"""The kernel: futures and tasks of our own, and the plain driver that runs them.

The engine suspends only on :class:`Future`, so the same coroutines run on the plain
:class:`Driver` here (a ready queue, timers, a selector; asyncio is never imported) and, by
``diskwright.engine.aio_driver``, on an asyncio loop.  A handle belongs to one driver.
"""

from __future__ import annotations

import errno
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from time import perf_counter

from ..hints import TYPE_CHECKING, Any, TypeVar
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

if TYPE_CHECKING:
    import socket
    import threading

    from .poller import Poller

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
        self._poller: Poller | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._wake_fd = -1
        self._asleep = False
        self._alarm: threading.Event | None = None
        self._waiters: dict[int, list[Future[None] | None]] = {}
        self._readers: dict[int, Callable[[], None]] = {}
        self._masks: dict[int, int] = {}
        self.linger = 0.0
        """Seconds to go on polling before sleeping.  Servers set it: a client that waits for each
        reply sends its next request within microseconds, and to be woken takes longer than that."""
        self._vain = 0
        self._skip = 0

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
            assert self._alarm is not None
            self._alarm.set()
            wake = self._wake
            if wake is not None:
                try:
                    wake[1].send(b"\0")
                except OSError:
                    pass  # it will hear of those that it has not read yet, or it has ended since

    # -- descriptors: registered once and kept, so that waiting again costs no system call
    def _hear(self, fd: int, bit: int) -> None:
        if self._poller is None:
            from .poller import Poller, wake_pair

            self._poller = Poller()
            self._wake = wake_pair()
            self._wake_fd = self._wake[0].fileno()
            self._poller.set(self._wake_fd, 1, 0)
        have = self._masks.get(fd, 0)
        if not have & bit:
            self._poller.set(fd, have | bit, have)
            self._masks[fd] = have | bit

    def _wait_for(self, fd: int, direction: int) -> Future[None]:
        pair = self._waiters.get(fd)
        if pair is None:
            pair = self._waiters[fd] = [None, None]
        future: Future[None] = Future()
        pair[direction] = future
        self._hear(fd, 1 << direction)
        return future

    def readable(self, fd: int) -> Future[None]:
        return self._wait_for(fd, 0)

    def writable(self, fd: int) -> Future[None]:
        return self._wait_for(fd, 1)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._readers[fd] = callback
        self._hear(fd, 1)

    def unwatch(self, fd: int) -> None:
        self._readers.pop(fd, None)

    def forget(self, fd: int) -> None:
        self._readers.pop(fd, None)
        mask = self._masks.pop(fd, 0)
        if mask and self._poller is not None:
            self._poller.set(fd, 0, mask)
        for future in self._waiters.pop(fd, ()):
            if future is not None:
                future.set(error=OSError(errno.EBADF, "descriptor closed"))

    def _poll(self, timeout: float | None) -> None:
        """Wait for descriptors, threads or the timeout."""
        alarm = self._alarm
        if alarm is None:
            from threading import Event

            alarm = self._alarm = Event()
        self._asleep = True
        try:
            if self._from_threads:
                timeout = 0
            if self._poller is None:
                if timeout != 0:
                    alarm.wait(timeout)
                alarm.clear()
                return
            if self.linger and timeout != 0:
                found = self._linger(self._poller)
            else:
                found = None
            for fd, events in found or self._poller.poll(timeout):
                if fd == self._wake_fd:
                    assert self._wake is not None
                    self._wake[0].recv(4096)
                    continue
                reader = self._readers.get(fd)
                if reader is not None and events & 1:
                    self._ready.append(reader)
                    events &= ~1
                    if not events:
                        continue
                pair = self._waiters.get(fd)
                unheard = 0
                for direction in (0, 1):
                    if events & (1 << direction):
                        future = pair[direction] if pair is not None else None
                        if future is not None and pair is not None:
                            pair[direction] = None
                            future.set()
                        else:  # nobody waits: stop hearing of it until somebody does
                            unheard |= 1 << direction
                if unheard and (have := self._masks.get(fd, 0)) & unheard:
                    self._poller.set(fd, have & ~unheard, have)
                    self._masks[fd] = have & ~unheard
        finally:
            self._asleep = False

    def _linger(self, poller: Poller) -> list[tuple[int, int]] | None:
        """Poll for a moment without sleeping.  After it was in vain several times in a row, it is
        tried again only now and then."""
        if self._skip:
            self._skip -= 1
            return None
        poll, now = poller.poll, perf_counter
        end = now() + self.linger
        while True:
            found = poll(0)
            if found:
                self._vain = 0
                return found
            if now() >= end:
                break
        self._vain += 1
        if self._vain > 4:
            self._skip = min(1 << self._vain, 256)
        return None

    def run(self, coro: Coroutine[Any, Any, T], patient: bool = False) -> T:
        """Run ``coro`` to its end and return its result.

        Raises what it raises; :class:`Deadlock` when it waits for something that cannot come.
        KeyboardInterrupt cancels it (``patient``: the second one does), waits for its issued I/O,
        and is raised again.
        """
        task = Task(self, coro)
        interrupted: KeyboardInterrupt | None = None
        while not task.done:
            try:
                self._run_until(task)
            except KeyboardInterrupt as error:
                if not patient or interrupted is not None:
                    task.cancel()
                interrupted = error
        if interrupted is not None:
            raise interrupted
        if task.error is not None:
            raise task.error
        return task.value  # type: ignore[return-value]

    def _run_until(self, task: Task[Any]) -> None:
        ready, threads, timers = self._ready, self._from_threads, self._timers
        while not task.done:
            while threads:
                ready.append(threads.popleft())
            if timers and timers[0][0] <= self.now():
                _, _, timer = heapq.heappop(timers)
                if timer.callback is not None:
                    ready.append(timer.callback)
            if ready:
                for _ in range(len(ready)):
                    ready.popleft()()
                if ready and self._masks:  # neither side may starve the other
                    self._poll(0)
                continue
            while timers and timers[0][2].callback is None:
                heapq.heappop(timers)
            timeout = None
            if timers:
                timeout = max(0.0, timers[0][0] - self.now())
            elif not (any(self._masks.values()) or self._pool_busy() or threads or self.visitors):
                raise Deadlock("nothing left to wait for\n" + self.stuck())
            self._poll(timeout)

    def _pool_busy(self) -> bool:
        return self._pool is not None and self._pool.busy > 0

    @property
    def idle(self) -> bool:
        """True when no thread works for it."""
        return not self._pool_busy()

    def close(self) -> None:
        """End the pool and close the driver's own descriptors."""
        self.stop_pool()
        if self.trace is not None:
            self.trace.close()
        if self._poller is not None and self._wake is not None:
            self._poller.close()
            for end in self._wake:
                end.close()
            self._poller = self._wake = None
