"""Threads for calls that block."""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .futures import BaseDriver, Future

T = TypeVar("T")


_LIMIT = 16
_ADDRESSES = 256 << 20
"""Bytes of address space for each thread where that is limited: its stack, and the 64 to 128 MiB
that glibc reserves for the heap of each."""


class Pool:
    """Threads of one driver.  Started on demand, at most ``limit`` (of 16)."""

    def __init__(self, driver: BaseDriver, limit: int = _LIMIT) -> None:
        self.driver = driver
        self.limit = min(limit, _threads())
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.busy = 0

    def submit(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> Future[T]:
        """Call ``function`` in a thread.  Raises OSError (EAGAIN) when none can be had."""
        future: Future[T] = Future(io=True)
        self.busy += 1
        if self.busy > len(self.threads) and len(self.threads) < self.limit:
            thread = threading.Thread(target=self._work, name="diskwright-pool", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no room for it: those that are there do it all
                if not self.threads:
                    self.busy -= 1
                    raise OSError(errno.EAGAIN, "No thread can be started") from None
                self.limit = len(self.threads)
            else:
                self.threads.append(thread)
        self.jobs.put((function, arguments, future))
        return future

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            function, arguments, future = job
            try:
                value, error = function(*arguments), None
            except BaseException as caught:
                value, error = None, caught
            self.driver.from_thread(lambda f=future, v=value, e=error: self._done(f, v, e))  # type: ignore[misc]
            job = function = arguments = future = value = error = None

    def _done(self, future: Future[Any], value: Any, error: BaseException | None) -> None:
        self.busy -= 1
        future.set(value, error)

    def stop(self) -> None:
        """Wait for the end of all jobs and threads."""
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()


def _threads() -> int:
    """How many threads there may be at most."""
    if sys.platform == "win32":
        return _LIMIT
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return _LIMIT
    return min(max(most // _ADDRESSES, 1), _LIMIT)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
