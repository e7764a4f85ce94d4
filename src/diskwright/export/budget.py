"""Byte budgets: what clients may have in memory at a time, each and together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..engine.kernel import Cancelled, Future

CLIENT_LIMIT = 64 << 20
TOTAL_LIMIT = 512 << 20


class Budget:
    """At most ``limit`` bytes, granted in the order in which they were asked for; what is taken
    here is taken from ``parent`` too.  A request above the whole limit is granted alone.

    ``reclaim`` are asked, when somebody must wait, to give back what they hold without need.
    """

    __slots__ = ("_asking", "_waiters", "limit", "parent", "peak", "reclaim", "used")

    def __init__(self, limit: int, parent: Budget | None = None) -> None:
        self.limit = limit
        self.parent = parent
        self.used = 0
        self.peak = 0
        self.reclaim: set[Callable[[], None]] = set()
        self._asking = 0  # how often it waits for its parent
        self._waiters: deque[tuple[int, Future[None]]] = deque()

    def take(self, count: int) -> bool:
        """Take ``count`` bytes at once, or nothing."""
        used = self.used
        if self._waiters or (used and used + count > self.limit):
            return False
        if self.parent is not None and not self.parent.take(count):
            return False
        self.used = used = used + count
        if used > self.peak:
            self.peak = used
        return True

    async def acquire(self, count: int) -> None:
        """Wait for ``count`` bytes."""
        await self._wait(count)
        if self.parent is not None:
            self._asking += 1
            try:
                await self.parent.acquire(count)
            except BaseException:
                self._give(count)
                raise
            finally:
                self._asking -= 1

    async def _wait(self, count: int) -> None:
        if not self._waiters and not (self.used and self.used + count > self.limit):
            self.used += count
        else:
            future: Future[None] = Future()
            self._waiters.append((count, future))
            for ask in list(self.reclaim):
                ask()
            try:
                await future
            except Cancelled:
                if future.done:
                    self._give(count)
                else:
                    self._waiters.remove((count, future))
                    self._wake()
                raise
        if self.used > self.peak:
            self.peak = self.used

    def release(self, count: int) -> None:
        """Give ``count`` bytes back."""
        self._give(count)
        if self.parent is not None:
            self.parent._give(count)

    def _give(self, count: int) -> None:
        self.used -= count
        if self._waiters:
            self._wake()

    def _wake(self) -> None:
        while self._waiters:
            count, future = self._waiters[0]
            if self.used and self.used + count > self.limit:
                return
            self._waiters.popleft()
            self.used += count
            future.set()

    @property
    def contended(self) -> bool:
        """Somebody waits."""
        return bool(self._waiters)

    @property
    def others_wait(self) -> bool:
        """Somebody else waits for the parent."""
        return self.parent is not None and len(self.parent._waiters) > self._asking
