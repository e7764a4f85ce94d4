"""What a call may use: time, memory for metadata, and bytes of metadata that are read.

A budget is set around calls (:func:`limited`), taken by the driver that runs them, and asked where
all metadata come in: when a procedure reads, and when tables are loaded.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic

from ..errors import OverBudget
from ..hints import TYPE_CHECKING, Any, TypeVar
from .futures import Cancelled
from .procedure import wait_out

if TYPE_CHECKING:
    from .futures import BaseDriver

T = TypeVar("T")


class Budget:
    """Limits, and what has been used of them; None: no limit.

    ``seconds`` run from now on.  ``metadata`` are bytes that are read of images' own structures, by
    all that has this budget together.  ``memory`` are bytes of them that are held: what is read to
    open images, and the tables that are kept.
    """

    def __init__(
        self,
        seconds: float | None = None,
        memory: int | None = None,
        metadata: int | None = None,
    ) -> None:
        self.seconds = seconds
        self.memory = memory
        self.metadata = metadata
        self.deadline = None if seconds is None else monotonic() + seconds
        self._read = 0
        self._held = 0

    @property
    def late(self) -> bool:
        """The time is over."""
        return self.deadline is not None and monotonic() >= self.deadline

    def check(self) -> None:
        """Raise OverBudget when the time is over."""
        if self.late:
            raise self.time_over()

    def time_over(self) -> OverBudget:
        """The error for it."""
        return OverBudget("time", self.seconds or 0)

    def read(self, length: int) -> None:
        """Bytes of metadata are about to be read.  Raises OverBudget."""
        self.check()
        self._read += length
        if self.metadata is not None and self._read > self.metadata:
            raise OverBudget("metadata", self.metadata)
        if self.memory is not None and length > self.memory:
            raise OverBudget("memory", self.memory)

    def hold(self, length: int) -> None:
        """Bytes of metadata are about to be held for as long as their image is open.  Raises
        OverBudget."""
        self._held += length
        if self.memory is not None and self._held > self.memory:
            raise OverBudget("memory", self.memory)


async def within(driver: BaseDriver, coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of ``coroutine``.  When the driver's budget of time is used up it is cancelled:
    what it has issued ends, its images are closed, and OverBudget is raised."""
    budget = driver.budget
    if budget is None or budget.deadline is None:
        return await coroutine
    task = driver.spawn(coroutine, "within a budget")
    timer = driver.later(max(budget.deadline - monotonic(), 0), task.cancel)
    try:
        return await task
    except Cancelled:
        if task.done and budget.late:
            raise budget.time_over() from None
        task.cancel()
        await wait_out(task)
        raise
    finally:
        timer.cancel()


_current: ContextVar[Budget | None] = ContextVar("budget", default=None)


def current() -> Budget | None:
    """The budget that is set around the caller."""
    return _current.get()


@contextmanager
def limited(budget: Budget | None) -> Iterator[Budget | None]:
    """Whatever is opened and called inside has this budget."""
    token = _current.set(budget)
    try:
        yield budget
    finally:
        _current.reset(token)
