"""Runs procedures: generators of a format that yield the requests of the contract."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from ..contract import (
    Barrier,
    Compute,
    Create,
    DataRanges,
    GuestRead,
    GuestWrite,
    Length,
    Open,
    Procedure,
    Progress,
    Punch,
    Quiesce,
    Read,
    Request,
    Timed,
    Truncate,
    Write,
    total,
)
from ..errors import NotSupported, Refused
from ..extents import ZERO
from ..hints import TYPE_CHECKING, Any
from .kernel import Cancelled, Future
from .leases import WHOLE

if TYPE_CHECKING:
    from .budget import Budget
    from .engine import Engine


class Procedures:
    """The procedures of one engine; one whole-image procedure at a time, by its lease."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.on_progress: Callable[[int, int], Awaitable[None] | None] | None = None
        """Told of every Progress; may have the procedure wait, or raise into it."""
        self.opening = False
        """What is read is held for as long as the image is open."""
        self._serial = 0

    async def run(self, procedure: Procedure, whole_image: bool) -> Any:
        """Run to the end and return what it returns.

        ``whole_image``: under the lease on everything, with new reads held at the gate, after
        active batches have ended and nothing is dirty or in quarantine.  It runs in its own task:
        a caller that is cancelled does not leave it half done.
        """
        engine = self.engine
        self._serial += 1
        if not whole_image:
            return await engine.shared.run(
                ("procedure", self._serial), lambda: self._steps(procedure)
            )
        lease = await engine.leases.take([WHOLE], exclusive=True)
        try:
            task = engine.shared.run(("procedure", self._serial), lambda: self._quiet(procedure))
            while not task.done:
                try:
                    await task
                except Cancelled:
                    if task.done:
                        raise
                    await wait_out(task)
                    raise
            return await task
        finally:
            engine.leases.drop(lease)

    async def _quiet(self, procedure: Procedure) -> Any:
        engine = self.engine
        gate = engine.gate = Future()
        try:
            await engine.epochs.quiet()
            # On a failed node dirty tables cannot come to rest, and would be forgotten.
            engine.check_failed()
            await engine.writeback.clean()
            return await self._steps(procedure)
        finally:
            engine.gate = None
            gate.set()

    async def _steps(self, procedure: Procedure) -> Any:
        """Drive the generator: execute what it yields, send the result or throw the error in.

        An I/O error that it lets through after its first write leaves the image between two
        states, so it becomes the sticky failure of the node.
        """
        wrote = False
        result: Any = None
        error: BaseException | None = None
        try:
            while True:
                try:
                    if error is not None:
                        request = procedure.throw(error)
                    else:
                        request = procedure.send(result)
                except StopIteration as stop:
                    return stop.value
                error = result = None
                wrote |= isinstance(request, (Write, Truncate, Punch, Create))
                try:
                    if self.engine.driver.budget is not None:
                        self._charge(self.engine.driver.budget, request, wrote)
                    result = await self._execute(request)
                except Exception as caught:
                    error = caught
        except OSError as failed:
            if wrote:
                self.engine.fail(failed)
            raise
        finally:
            if wrote:
                self.engine.view.clear()
                self.engine.forget_units()

    def _charge(self, budget: Budget, request: Request, wrote: bool) -> None:
        """Raise OverBudget for what goes beyond.  What has begun to write goes on to its end."""
        if wrote:
            return
        budget.check()
        if isinstance(request, Read):
            length = total(request.ranges)
            budget.read(length)
            if self.opening:
                budget.hold(length)

    async def _execute(self, request: Request) -> Any:
        engine = self.engine
        if isinstance(request, Read):
            child = engine.slots[request.slot]
            if child.wants_events:
                await engine.announce(request.slot, request.tag)
            data = await child.read([r[0] for r in request.ranges], [r[1] for r in request.ranges])
            return [bytes(part) for part in data]
        if isinstance(request, Write):
            return await engine.writeback.issue(request.writes)
        if isinstance(request, Barrier):
            return await engine.writeback.flush_slots(engine.data_slots)
        if isinstance(request, Quiesce):
            return engine.view.clear()
        if isinstance(request, Length):
            return engine.slots[request.slot].size
        if isinstance(request, DataRanges):
            at, ranges = request.offset, []
            for extent in await engine.slots[request.slot].extents(at, request.length):
                if extent.kind != ZERO:
                    ranges.append((at, extent.length))
                at += extent.length
            return ranges
        if isinstance(request, Truncate):
            return await engine.slots[request.slot].truncate(request.size, request.preallocation)
        if isinstance(request, Punch):
            told = [part for part in request.ranges if part.told]
            zeroed = len(told) == len(request.ranges)
            for slot in {part.slot for part in told}:
                parts = [part for part in told if part.slot == slot]
                zeroed &= await engine.epochs.punch(slot, parts)
            return zeroed
        if isinstance(request, Open):
            if engine.opener is None:
                raise Refused(request.reference, "nothing that an image names is opened here", "")
            return await engine.opener(*request)
        if isinstance(request, Create):
            if engine.creator is None:
                raise NotSupported("no file can be made beside this image")
            return await engine.creator(request.slot, request.name)
        if isinstance(request, Compute):
            return await engine.driver.call(request.function, *request.arguments)
        if isinstance(request, Timed):
            return await engine.driver.call(_timed, *request)
        if isinstance(request, GuestRead):
            (data_read,) = await engine.reader.inside([request.offset], [request.length])
            return bytes(data_read)
        if isinstance(request, GuestWrite):
            # The whole-image lease is ours, so the batch must not queue for one of its own.
            return await engine.allocator.write_leased(request.offset, request.data)
        assert isinstance(request, Progress)
        if self.on_progress is not None:
            pause = self.on_progress(request.done, request.total)
            if pause is not None:
                await pause
        return await engine.driver.turn()


def _timed(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    start = time.thread_time()
    result = function(*arguments)
    return result, time.thread_time() - start


async def wait_out(task: Future[Any]) -> None:
    """Wait for ``task`` whatever it does, ignoring further cancellations."""
    while not task.done:
        try:
            await task
        except (Exception, Cancelled):  # noqa: S110 - who asks for its result is told
            pass
