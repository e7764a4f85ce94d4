"""Drivers for tests: one interleaving of the engine's coroutines out of very many, by a seed; and
one without threads.

For :class:`SeededDriver` time is virtual: nothing ever waits.  At each turn one of the ready
callbacks, or the next timer, is picked at random, so two tasks that are both ready may run in
either order, however long their I/O is said to take.  The same seed gives the same run.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from ..engine.futures import BaseDriver, Deadlock, Future, Task, Timer
from ..engine.kernel import Driver

T = TypeVar("T")


def _run(future: Future[T], function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    """A pool job, in the calling thread."""
    try:
        value = function(*arguments)
    except Exception as error:
        future.set(None, error)
    else:
        future.set(value)


class InlineDriver(Driver):
    """The ordinary driver, but what is for the pool is done at once: of thousands of short runs,
    starting threads would take most of the time."""

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run it now."""
        future: Future[T] = Future(io=True)
        _run(future, function, arguments)
        return future

    compute = call


class Livelock(RuntimeError):
    """Callbacks kept running and the awaited task did not come to an end."""


class SeededDriver(BaseDriver):
    """Runs coroutines in an order drawn from ``seed``.

    ``eager`` chooses how groups start their children (see :class:`BaseDriver`); None leaves it to
    the seed, so that both ways are met.  ``steps`` bounds the callbacks of one :meth:`run`.
    """

    def __init__(self, seed: int, eager: bool | None = False, steps: int = 100_000) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.eager = self.rng.random() < 0.4 if eager is None else eager
        self.steps = steps
        self.clock = 0
        """Counts events (see :meth:`tick`); orders what happened, across all nodes."""
        self._time = 0.0
        self._serial = 0
        self._ready: list[Callable[[], None]] = []
        self._timers: list[tuple[float, int, Timer]] = []

    def tick(self) -> int:
        """The next moment of the run: every call gives a larger number."""
        self.clock += 1
        return self.clock

    # -- driver
    def soon(self, callback: Callable[[], None]) -> None:
        self._ready.append(callback)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        self._serial += 1
        heapq.heappush(self._timers, (self._time + seconds, self._serial, timer))
        return timer

    def now(self) -> float:
        return self._time

    def from_thread(self, callback: Callable[[], None]) -> None:
        self.soon(callback)

    def readable(self, fd: int) -> Future[None]:
        raise NotImplementedError("no descriptors in virtual time")

    def writable(self, fd: int) -> Future[None]:
        raise NotImplementedError("no descriptors in virtual time")

    def forget(self, fd: int) -> None:
        """Nothing is ever watched."""

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """A pool job: its effect happens at one moment between now and its end."""
        future: Future[T] = Future(io=True)
        _ = self.later(self.delay(20), partial(_run, future, function, arguments))
        return future

    def compute(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """The same."""
        return self.call(function, *arguments)

    def delay(self, most: int) -> float:
        """A random time for an I/O: often none, usually up to ``most``, rarely much longer."""
        pick = self.rng.random()
        if pick < 0.2:
            return 0.0
        time = float(self.rng.randrange(most + 1))
        return time * 20 if pick > 0.95 else time

    # -- running
    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Run ``coro`` to its end and return its result.

        Raises what it raises, :class:`Deadlock` with the chains of all waiters, or
        :class:`Livelock`.
        """
        task = Task(self, coro, name="main")
        self._run_until(lambda: task.done)
        if task.error is not None:
            raise task.error
        return task.value  # type: ignore[return-value]

    def settle(self) -> None:
        """Run what is left until nothing is ready and no timer is pending."""
        self._run_until(lambda: not self._ready and not self._timers)

    def _run_until(self, ended: Callable[[], bool]) -> None:
        rng, ready, timers = self.rng, self._ready, self._timers
        for _ in range(self.steps):
            if ended():
                return
            while timers and timers[0][2].callback is None:
                heapq.heappop(timers)
            if ready and (not timers or rng.random() < 0.9):
                ready.pop(rng.randrange(len(ready)))()
            elif timers:
                self._time, _, timer = heapq.heappop(timers)
                if timer.callback is not None:
                    timer.callback()
            else:
                raise Deadlock("nothing left to wait for\n" + self.stuck())
        raise Livelock(f"no end after {self.steps} steps\n" + self.stuck())
