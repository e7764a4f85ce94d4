"""Threads for calls that block: one set for all drivers of the process, however many disks are
open.  A program that opens a hundred disks must not find hundreds of threads in itself."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable

from ..hints import Any, TypeVar
from .futures import BaseDriver, Future

T = TypeVar("T")

MOST_THREADS = 7
"""Most threads of ours in a process."""
_ADDRESSES = 256 << 20
"""Bytes of address space for each thread where that is limited: its stack, and the 64 to 128 MiB
that glibc reserves for the heap of each."""


class Pool:
    """The jobs of one driver."""

    def __init__(self, driver: BaseDriver) -> None:
        self.driver = driver
        self.busy = 0
        self._unfinished: set[Future[Any]] = set()
        self._all_done: threading.Event | None = None
        self._threads = _shared
        self._threads.enter()

    def submit(
        self, function: Callable[..., T], arguments: tuple[Any, ...], computes: bool = False
    ) -> Future[T]:
        """Call ``function`` in a thread.  ``computes``: it takes a processor, not a device.

        It is called at once where there are no threads to be had, and from within one of them (a
        disk in a file that is itself inside a disk): all of them may be waiting for such calls.
        """
        future: Future[T] = Future(io=True)
        job = (self, function, arguments, future, computes)
        if getattr(_here, "is_ours", False) or not self._threads.take(job):
            future.set(*_outcome(function, arguments))
        return future

    def began(self, future: Future[Any]) -> None:
        """A thread will run it."""
        self.busy += 1
        self._unfinished.add(future)

    def ended(self, future: Future[Any], value: Any, error: BaseException | None) -> None:
        """In the thread: tell the driver."""
        try:
            self.driver.from_thread(lambda: self._tell(future, value, error))
        except RuntimeError:
            pass  # the loop of an AsyncioDriver was closed: nobody waits
        self._unfinished.discard(future)
        if self._all_done is not None and not self._unfinished:
            self._all_done.set()

    def _tell(self, future: Future[Any], value: Any, error: BaseException | None) -> None:
        self.busy -= 1
        future.set(value, error)

    def stop(self) -> None:
        """Wait for the end of all jobs; the threads end with the last pool."""
        self._all_done = threading.Event()
        if self._unfinished:
            self._all_done.wait()
        self._threads.leave()


Job = tuple[Pool, Callable[..., Any], tuple[Any, ...], Future[Any], bool]


class Threads:
    """Started on demand, and ended when no pool is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._limit = MOST_THREADS
        self._pools = 0
        self._busy = 0
        # More threads that compute than processors would only wait for each other, most of all
        # for the GIL; and they must leave some to the devices.
        self._processors = min(processors(), MOST_THREADS - 1)
        self._computing = 0
        self._queued: deque[Job] = deque()

    def enter(self) -> None:
        """One more pool."""
        with self._lock:
            self._pools += 1
            if self._pools == 1:
                self._limit = _limit()

    def leave(self) -> None:
        """One pool less, whose jobs have all ended."""
        with self._lock:
            self._pools -= 1
            if self._pools:
                return
            for _ in self._threads:
                self._jobs.put(None)
            for thread in self._threads:
                thread.join()
            self._threads.clear()

    def take(self, job: Job) -> bool:
        """Have a thread run it; False when none can be started."""
        pool, _, _, future, computes = job
        with self._lock:
            if computes and self._computing >= self._processors:
                pool.began(future)
                self._queued.append(job)
                return True
            if self._busy >= len(self._threads) < self._limit:
                thread = threading.Thread(target=self._work, name="diskwright", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system has no room for it: those that are there do it
                    if not self._threads:
                        return False
                    self._limit = len(self._threads)
                else:
                    self._threads.append(thread)
            pool.began(future)
            self._busy += 1
            self._computing += computes
        self._jobs.put(job)
        return True

    def _work(self) -> None:
        _here.is_ours = True
        while (job := self._jobs.get()) is not None:
            while job is not None:
                pool, function, arguments, future, computes = job
                value, error = _outcome(function, arguments)
                job = self._next(computes)
                pool.ended(future, value, error)
                del pool, function, arguments, future, value, error

    def _next(self, computed: bool) -> Job | None:
        """A job has ended; what this thread is to do before it waits for another one."""
        with self._lock:
            if computed and self._queued:
                return self._queued.popleft()
            if computed:
                self._computing -= 1
            self._busy -= 1
        return None


def _outcome(
    function: Callable[..., T], arguments: tuple[Any, ...]
) -> tuple[T | None, BaseException | None]:
    try:
        return function(*arguments), None
    except BaseException as caught:
        return None, caught


def _limit() -> int:
    """How many threads there may be at most."""
    if sys.platform == "win32":
        return MOST_THREADS
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return MOST_THREADS
    return min(max(most // _ADDRESSES, 1), MOST_THREADS)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_here = threading.local()
_shared = Threads()


def _forked() -> None:
    """A child has none of the threads."""
    global _shared
    _shared = Threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
