"""Threads for calls that block."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from .futures import BaseDriver, Future

T = TypeVar("T")


class Pool:
    """Threads of one driver.  Started on demand, at most ``limit``."""

    limit = 16

    def __init__(self, driver: BaseDriver) -> None:
        self.driver = driver
        self.jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.busy = 0

    def submit(self, function: Callable[..., T], arguments: tuple[Any, ...]) -> Future[T]:
        future: Future[T] = Future(io=True)
        self.busy += 1
        if self.busy > len(self.threads) and len(self.threads) < self.limit:
            thread = threading.Thread(target=self._work, name="diskwright-pool", daemon=True)
            self.threads.append(thread)
            thread.start()
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
        for _ in self.threads:
            self.jobs.put(None)
        for thread in self.threads:
            thread.join()
