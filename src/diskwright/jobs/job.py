"""A job: some work, the state it is in, and what is asked of it.

Work rests at the points that it chooses (:meth:`Job.rest`): only there it is paused, and only there
it learns that it was cancelled.  So nothing that it has begun is left half done.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from ..engine.futures import Condition
from ..engine.kernel import BaseDriver, Cancelled, Task
from ..errors import DiskError, UsageError
from ..graph.closing import explain
from .groups import Group
from .speed import Pace
from .states import NEXT, VERBS, Status
from .work import CANCELED, Stopped, Work

OnError = Literal["report", "ignore", "enospc", "stop", "auto"]
Action = Literal["report", "ignore", "stop"]
Operation = Literal["read", "write"]
IoStatus = Literal["ok", "failed", "nospace"]
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Job:
    """One job among ``jobs``.  Without ``auto_finalize`` it waits for :meth:`finalize` when its
    work is done, without ``auto_dismiss`` it stays until :meth:`dismiss`."""

    def __init__(
        self,
        jobs: Jobs,
        id: str,
        work: Work,
        *,
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        group: Group | None = None,
    ) -> None:
        if not _ID.fullmatch(id):
            raise UsageError(f"Invalid job ID '{id}'")
        if id in jobs.all:
            raise UsageError(f"Job ID '{id}' already in use")
        self.pace = Pace(speed)
        self.jobs, self.id, self.work = jobs, id, work
        self.auto_finalize, self.auto_dismiss = auto_finalize, auto_dismiss
        self.status: Status = "undefined"
        self.error: str | None = None
        """Why it failed."""
        self.done, self.total = 0, 0
        """How far it is; the unit is the work's."""
        self.io_status: IoStatus = "ok"
        self.cancelled = False
        self.completing = False
        """It is ready, and is to come to its end."""
        self.leaving = False
        """It is ready, and is to end without being completed."""
        self.ended = False
        """Its work has ended, well or not."""
        self.busy = False
        """It is not at rest."""
        self.paused = False
        """Somebody asked that it rests."""
        self._held = 0
        self._changed = Condition()
        self._task: Task[None] | None = None
        jobs.all[id] = self
        self.group = group or Group()
        self.group.add(self)
        self._to("created")

    @property
    def ready(self) -> bool:
        """It can be completed."""
        return self.status in ("ready", "standby")

    # -- verbs
    def check(self, verb: str) -> None:
        """Raise UsageError unless ``verb`` is accepted in the state that it is in."""
        if self.status not in VERBS[verb]:
            raise UsageError(
                f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'"
            )

    def start(self) -> None:
        """Begin."""
        self._to("running")
        self.busy = True
        self._task = self.jobs.driver.spawn(self._run(), name=f"job {self.id}")

    def pause(self) -> None:
        """Rest at the next point where that is possible, until :meth:`resume`."""
        self.check("pause")
        if self.paused:
            raise UsageError("Job is already paused")
        self.paused = True
        self._changed.notify()

    def resume(self) -> None:
        """Go on; errors that it stopped for are forgotten."""
        if not self.paused:
            raise UsageError("Can't resume a job that was not paused")
        self.check("resume")
        self.paused = False
        self.io_status = "ok"
        self._changed.notify()

    def set_speed(self, speed: int) -> None:
        """Process at most ``speed`` bytes a second from now on; 0: as many as possible."""
        self.check("set-speed")
        self.pace = Pace(speed)
        self._changed.notify()

    def complete(self) -> None:
        """Let a job that is ready come to its end."""
        self.check("complete")
        self.completing = True
        self._changed.notify()

    def cancel(self, force: bool = True) -> None:
        """End it.  What is ready and can be left (``Work.leaves``) ends well without ``force``."""
        self.check("cancel")
        if not force and self.work.leaves and self.ready:
            self.leaving = True
            self._changed.notify()
        else:
            self.stop()

    def stop(self) -> None:
        """End it, in whatever state it is, unless its end is settled."""
        if self.group.closing:
            return
        self.cancelled = True
        self._changed.notify()
        if self.status == "created":
            self.ended = True
        if self.ended:
            self.group.fail()

    def finalize(self) -> None:
        """Let a job whose work is done come to its end, and those of its group with it."""
        self.check("finalize")
        self.group.finalize()

    def dismiss(self) -> None:
        """Forget it."""
        self.check("dismiss")
        self._to("null")
        del self.jobs.all[self.id]

    # -- for the work
    async def rest(self, seconds: float | None = 0.0) -> None:
        """A point where it can be paused.  Raises Stopped when it was cancelled.

        Waits for ``seconds`` (None: for whatever comes), or until something is asked of it.
        """
        driver = self.jobs.driver
        self._idle()
        if self._may_go_on() and seconds == 0:
            await driver.turn()
        elif self._may_go_on():
            timer = None if seconds is None else driver.later(seconds, self._changed.notify)
            await self._changed.wait()
            if timer is not None:
                timer.cancel()
        if not self._may_go_on():
            before = self.status
            self._to("standby" if before == "ready" else "paused")
            while not self._may_go_on():
                await self._changed.wait()
            self._to(before)
        self.busy = True
        if self.cancelled:
            raise Stopped

    def _may_go_on(self) -> bool:
        return self.cancelled or not (self.paused or self._held)

    async def spend(self, count: int) -> None:
        """``count`` bytes were processed; :meth:`rest` for as long as the speed asks for."""
        self.done += count
        self.pace.spend(count, self.jobs.driver.now())
        await self.rest()
        while (left := self.pace.left(self.jobs.driver.now())) > 0:
            await self.rest(left)

    def become_ready(self) -> None:
        """From now on it ends when that is asked for: see ``completing`` and ``leaving``."""
        self._to("ready")
        self.jobs.on_event(self, "ready", {})

    def failed(self, error: OSError, operation: Operation, policy: OnError) -> Action:
        """Tell of an error, and what is to be done as ``policy`` says: ``report`` (fail),
        ``ignore`` or ``stop`` (:meth:`rest`, and try again)."""
        no_space = error.errno == errno.ENOSPC
        action: Action
        if policy in ("enospc", "auto"):
            action = "stop" if no_space else "report"
        else:
            action = policy  # type: ignore[assignment]
        self.jobs.on_event(self, "error", {"operation": operation, "action": action})
        if action == "stop":
            self.paused = True
            self.io_status = "nospace" if no_space else "failed"
        return action

    # -- for who needs a moment without requests
    def hold(self) -> None:
        """Rest until :meth:`release`."""
        self._held += 1

    def release(self) -> None:
        """Once as often as :meth:`hold`."""
        self._held -= 1
        self._changed.notify()

    async def quiet(self) -> None:
        """Wait until it rests."""
        while self.busy:
            await self.jobs.changed.wait()

    # -- life
    async def _run(self) -> None:
        try:
            await self.rest()
            await self.work.run(self)
        except (Stopped, Cancelled):
            self.cancelled = True
        except Exception as error:
            self.fail(error)
        self.ended = True
        self._idle()
        if self.cancelled or self.error is not None:
            self.aborting()
            self.group.fail()
        else:
            self._to("waiting")
            self.group.came()

    def fail(self, error: Exception) -> None:
        """Remember why it failed.  What is no answer of a disk or a caller is a defect of ours, of
        which standard error is told whole; the job ends all the same."""
        self.error = explain(error).partition("\n")[0]
        if not isinstance(error, (DiskError, OSError)):
            self.error = f"internal error: {type(error).__name__}: {self.error}"
            import traceback

            print(f"diskwright: job '{self.id}': {self.error}", file=sys.stderr)
            traceback.print_exception(error)

    def aborting(self) -> None:
        """It has failed, or is not to succeed."""
        if self.error is None:
            self.error = CANCELED
            self.cancelled = True
        if self.status != "aborting":
            self._to("aborting")

    def pending(self) -> None:
        """It only waits for :meth:`finalize`."""
        self._to("pending")
        if not self.auto_finalize:
            self.jobs.on_event(self, "pending", {})

    async def conclude(self) -> None:
        """The end, as its state says."""
        started = self._task is not None
        try:
            if self.status == "aborting":
                await self.work.abort(self)
            else:
                await self.work.commit(self)
        except Exception as error:
            self.fail(error)
        if started:
            self.jobs.on_event(self, "cancelled" if self.cancelled else "completed", {})
        self._to("concluded")
        if self.auto_dismiss or not started:
            self.dismiss()

    def _idle(self) -> None:
        self.busy = False
        if self._held:
            self.jobs.changed.notify()

    async def until_ended(self) -> None:
        """Wait until it is concluded."""
        while self.status not in ("concluded", "null"):
            await self.jobs.changed.wait()

    def _to(self, status: Status) -> None:
        assert status in NEXT[self.status], (self.status, status)
        self.status = status
        self.jobs.on_event(self, "status", {})
        self.jobs.changed.notify()


class Jobs:
    """All jobs, by their ids.  ``on_event(job, what, more)`` is told when one has got another
    ``status``, is ``ready``, ``pending``, ``completed`` or ``cancelled``, or met an ``error``."""

    def __init__(
        self, driver: BaseDriver, on_event: Callable[[Job, str, Mapping[str, Any]], None]
    ) -> None:
        self.driver = driver
        self.on_event = on_event
        self.all: dict[str, Job] = {}
        self.changed = Condition()

    def __iter__(self) -> Iterator[Job]:
        """Those that began last first."""
        return reversed(list(self.all.values()))

    async def cancel_all(self) -> None:
        """End and forget all jobs."""
        for job in self:
            if job.status not in ("concluded", "null"):
                job.stop()
            await job.until_ended()
            if job.id in self.all:
                job.dismiss()
