"""Jobs of one file that run one after the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..engine.kernel import BaseDriver, Future
from ..hints import Any


class Lane:
    """One thread of the pool does all that is asked for, in order.

    The system lets one write at a time into a file's cached pages, so a second thread would only
    spin at its lock, and take a processor from whoever makes ready what is written next.
    """

    __slots__ = ("_busy", "_jobs", "_lock", "driver")

    def __init__(self, driver: BaseDriver) -> None:
        self.driver = driver
        self._jobs: deque[tuple[Future[None], Callable[..., None], tuple[Any, ...]]] = deque()
        self._busy = False
        self._lock = threading.Lock()

    def call(self, function: Callable[..., None], *arguments: Any) -> Future[None]:
        """Run a blocking function behind those that were asked for before."""
        future: Future[None] = Future(io=True)
        with self._lock:
            self._jobs.append((future, function, arguments))
            idle, self._busy = not self._busy, True
        if idle:
            _ = self.driver.call(self._work)
        return future

    def _work(self) -> None:
        """In the pool: until nothing is left to do."""
        while True:
            with self._lock:
                if not self._jobs:
                    self._busy = False
                    return
                future, function, arguments = self._jobs.popleft()
            error: BaseException | None = None
            try:
                function(*arguments)
            except BaseException as caught:
                error = caught
            self.driver.from_thread(lambda f=future, e=error: f.set(None, e))  # type: ignore[misc]
            del future, function, arguments, error
