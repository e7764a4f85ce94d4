"""Our own futures, tasks, groups and conditions, and what every driver can do.

Issued I/O is never abandoned: a task that is cancelled while it waits for a future marked ``io``
sees the cancellation when that I/O has ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence

from ..hints import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from .budget import Budget
    from .pool import Pool
    from .trace import Tracer

T = TypeVar("T")


class Cancelled(BaseException):
    """Thrown into a coroutine whose task was cancelled."""


class Deadlock(RuntimeError):
    """Nothing is ready, nothing is pending, and the awaited task is not done."""


class Future(Generic[T]):
    """A result to come.  ``io``: a waiter may not be cancelled away from it."""

    __slots__ = ("callbacks", "done", "error", "io", "value")

    def __init__(self, io: bool = False) -> None:
        self.done = False
        self.value: T | None = None
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[Future[T]], None]] = []
        self.io = io

    def set(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Resolve it; a second call is ignored."""
        if self.done:
            return
        self.done, self.value, self.error = True, value, error
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback(self)

    def __await__(self) -> Generator[Future[Any], None, T]:
        if not self.done:
            yield self
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class Task(Future[T]):
    """A coroutine that a driver runs."""

    __slots__ = ("_cancelling", "_queued", "_waiting", "coro", "driver", "name")

    def __init__(
        self,
        driver: BaseDriver,
        coro: Coroutine[Any, Any, T],
        io: bool = False,
        name: str = "",
        waiting: Future[Any] | None = None,
    ) -> None:
        super().__init__(io)
        self.driver = driver
        self.coro = coro
        self.name = name
        self._cancelling = False
        self._queued = False
        self._waiting: Future[Any] | None = None
        driver.tasks.add(self)
        if waiting is None:
            self._queued = True
            driver.soon(self._step)
        else:
            self._wait(waiting)

    def _wait(self, future: Future[Any]) -> None:
        self._waiting = future
        if future.done:
            self._wake(future)
        else:
            future.callbacks.append(self._wake)

    def _wake(self, future: Future[Any]) -> None:
        if self._waiting is future and not self._queued:
            self._queued = True
            self.driver.soon(self._step)

    def _step(self) -> None:
        self._queued = False
        self._waiting = None
        try:
            if self._cancelling:
                self._cancelling = False
                future = self.coro.throw(Cancelled())
            else:
                future = self.coro.send(None)
        except StopIteration as stop:
            self._finish(stop.value, None)
        except (Exception, Cancelled) as error:
            self._finish(None, error)
        except BaseException as error:  # KeyboardInterrupt: whoever awaits must see it too
            self._finish(None, error)
            raise
        else:
            self._wait(future)

    def _finish(self, value: T | None, error: BaseException | None) -> None:
        self.driver.tasks.discard(self)
        self.set(value, error)

    def cancel(self) -> None:
        """Ask the coroutine to stop.  If it waits for I/O, it is told when that has ended."""
        if self.done:
            return
        self._cancelling = True
        waiting = self._waiting
        if waiting is not None and not self._queued and not waiting.io:
            self._queued = True
            self.driver.soon(self._step)


class BaseDriver:
    """What the engine may ask of a driver."""

    eager = True
    """Start the children of a group at once, without a task while they do not suspend."""

    def __init__(self) -> None:
        limits = sys.modules.get(f"{__package__}.budget")  # nothing sets one without it
        self.budget: Budget | None = None if limits is None else limits.current()
        """What all that runs here may use."""
        self.tasks: set[Task[Any]] = set()
        self.trace: Tracer | None = None
        """Follows the nodes that are opened, if requests are traced."""
        self.visitors = 0
        """Threads of others that may call :meth:`from_thread`: who waits for them is not stuck."""
        self._pool: Pool | None = None

    def in_time(self, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
        """``work``, held to the budget of time; see :func:`.budget.within`."""
        if self.budget is None:
            return work
        from .budget import within

        return within(self, work)

    # -- to be given by each driver
    def soon(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` at the next turn."""
        raise NotImplementedError

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` after ``seconds``, unless the timer is cancelled."""
        raise NotImplementedError

    def now(self) -> float:
        """Monotonic time in seconds."""
        return time.monotonic()

    def from_thread(self, callback: Callable[[], None]) -> None:
        """`soon`, from any thread."""
        raise NotImplementedError

    def readable(self, fd: int) -> Future[None]:
        """Resolved when ``fd`` can be read.  One waiter a direction and descriptor."""
        raise NotImplementedError

    def writable(self, fd: int) -> Future[None]:
        """Resolved when ``fd`` can be written."""
        raise NotImplementedError

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` can be read, until :meth:`unwatch`: for those who read
        again and again, without a future and a task's step each time.  A call may come although
        there is nothing to read (any more)."""
        raise NotImplementedError

    def unwatch(self, fd: int) -> None:
        """End :meth:`watch`; nothing happens if it was not called."""
        raise NotImplementedError

    def forget(self, fd: int) -> None:
        """Must be called before ``fd`` is closed, if it was ever waited for."""
        raise NotImplementedError

    # -- common
    def spawn(self, coro: Coroutine[Any, Any, T], name: str = "", io: bool = False) -> Task[T]:
        """Start a task of its own."""
        return Task(self, coro, io, name)

    def start(self, coro: Coroutine[Any, Any, T], name: str = "", io: bool = False) -> Future[T]:
        """Run ``coro`` until it first suspends; a task is made only if it does."""
        if not self.eager:
            return Task(self, coro, io, name)
        try:
            waiting = coro.send(None)
        except StopIteration as stop:
            done: Future[T] = Future(io)
            done.set(stop.value)
            return done
        except (Exception, Cancelled) as error:
            failed: Future[T] = Future(io)
            failed.set(None, error)
            return failed
        return Task(self, coro, io, name, waiting)

    async def sleep(self, seconds: float) -> None:
        """Wait; a cancellation ends the wait."""
        future: Future[None] = Future()
        timer = self.later(seconds, future.set)
        try:
            await future
        finally:
            timer.cancel()

    async def turn(self) -> None:
        """Let other tasks run once."""
        future: Future[None] = Future()
        self.soon(future.set)
        await future

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run a blocking function in the pool; it should give up the GIL once."""
        return self._threads().submit(function, arguments)

    def compute(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run what is a lot of work for a processor in the pool; no more of it at once than there
        are processors."""
        return self._threads().submit(function, arguments, computes=True)

    def _threads(self) -> Pool:
        if self._pool is None:
            from .pool import Pool

            self._pool = Pool(self)
        return self._pool

    def stop_pool(self) -> None:
        """Give the pool's threads up; jobs that were submitted still run."""
        if self._pool is not None:
            self._pool.stop()
        self._pool = None

    def stuck(self) -> str:
        """The chains of waiters of all unfinished tasks, for a deadlock's message."""
        lines = []
        for task in self.tasks:
            chain = []
            coro: Any = task.coro
            while coro is not None and getattr(coro, "cr_frame", None) is not None:
                code = coro.cr_code
                chain.append(f"{code.co_qualname}:{coro.cr_frame.f_lineno}")
                coro = coro.cr_await
            lines.append(f"{task.name or 'task'}: " + " > ".join(chain))
        return "\n".join(sorted(lines))


class Timer:
    """A pending `later`."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """It will not be called any more."""
        self.callback = None


async def gather(driver: BaseDriver, coros: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all; return their results in order.

    Always waits for **all** of them, also after the first error or a cancellation, and then
    raises the first error (a cancellation, if there was one).
    """
    return await wait_all([driver.start(c, io=True) for c in coros])


async def wait_all(futures: Sequence[Future[T]]) -> list[T]:
    """Wait for every future; then raise the first error or return all results."""
    error: BaseException | None = None
    for future in futures:
        while True:
            try:
                await future
            except Cancelled as cancelled:
                error = cancelled
                if not future.done:
                    continue
            except Exception as first:
                error = error or first
            break
    if error is not None:
        raise error
    return [f.value for f in futures]  # type: ignore[misc]


class Condition:
    """Waiters for something to change; each looks again when it is woken."""

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: list[Future[None]] = []

    async def wait(self) -> None:
        """Until the next :meth:`notify`."""
        future: Future[None] = Future()
        self._waiters.append(future)
        try:
            await future
        finally:
            if future in self._waiters:
                self._waiters.remove(future)

    def notify(self) -> None:
        """Wake all who wait now."""
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            future.set()


class Shared:
    """Work that several askers share runs once, in its own task: cancelling an asker leaves it."""

    __slots__ = ("driver", "tasks")

    def __init__(self, driver: BaseDriver) -> None:
        self.driver = driver
        self.tasks: dict[Any, Task[Any]] = {}

    def run(self, key: Any, make: Callable[[], Coroutine[Any, Any, T]]) -> Task[T]:
        """The running task for ``key``, or a new one made by ``make``."""
        task = self.tasks.get(key)
        if task is None:
            task = self.tasks[key] = self.driver.spawn(make(), name=str(key))
            task.callbacks.append(lambda _: self._ended(key))
        return task

    def _ended(self, key: Any) -> None:
        del self.tasks[key]

    async def drain(self) -> None:
        """Wait until nothing shared runs (their errors went to their askers)."""
        while self.tasks:
            for task in list(self.tasks.values()):
                try:
                    await task
                except Exception:  # noqa: S110 - told to those who asked
                    pass
