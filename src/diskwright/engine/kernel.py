"""Our own futures, tasks, groups and conditions, and the drivers that run them.

The engine suspends only on :class:`Future`, so the same coroutines run on the plain
:class:`Driver` (a ready queue, timers, a selector; asyncio is never imported) and, by
``diskwright.engine.aio_driver``, on an asyncio loop.  A handle belongs to one driver.

Issued I/O is never abandoned: a task that is cancelled while it waits for a future marked ``io``
sees the cancellation when that I/O has ended.
"""

from __future__ import annotations

import heapq
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from typing import Any, Generic, TypeVar

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
        self.tasks: set[Task[Any]] = set()
        self._pool: Pool | None = None

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
        if self._pool is None:
            self._pool = Pool(self)
        return self._pool.submit(function, arguments)

    def stop_pool(self) -> None:
        """End the pool's threads; jobs that were submitted still run."""
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
                chain.append(f"{coro.cr_code.co_qualname if hasattr(coro.cr_code, 'co_qualname') else coro.cr_code.co_name}:{coro.cr_frame.f_lineno}")
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


class Pool:
    """Threads for calls that block.  Started on demand, at most ``limit``."""

    limit = 16

    def __init__(self, driver: BaseDriver) -> None:
        import queue

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
            elif not self._masks and not (self._pool is not None and self._pool.busy) and not threads:
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


async def gather(driver: BaseDriver, coros: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all; return their results in order.

    Always waits for **all** of them, also after the first error or a cancellation, and then
    raises the first error (a cancellation, if there was one).
    """
    return await wait_all([driver.start(c, io=True) for c in coros])


async def wait_all(futures: list[Future[T]]) -> list[T]:
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
            task.callbacks.append(lambda _: self.tasks.pop(key, None))
        return task

    async def drain(self) -> None:
        """Wait until nothing shared runs (their errors went to their askers)."""
        while self.tasks:
            for task in list(self.tasks.values()):
                try:
                    await task
                except Exception:  # noqa: S110 - told to those who asked
                    pass
