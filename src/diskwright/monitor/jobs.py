"""Jobs: what takes longer than a command may, and the commands about them."""

from __future__ import annotations

import re
from collections.abc import Coroutine
from typing import Any, Literal

from ..engine.kernel import Cancelled, Task
from ..errors import DiskError, UsageError
from ..graph.closing import explain
from ..records import NamedTuple
from .commands import command, event
from .daemon import Daemon
from .session import Monitor

Status = Literal[
    "undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending",
    "aborting", "concluded", "null",
]  # fmt: skip
Kind = Literal["create"]
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class JobChange(NamedTuple):
    """The job, and its new status."""

    id: str
    status: Status


event("JOB_STATUS_CHANGE", JobChange, "A job has got another status.")


class JobInfo(NamedTuple):
    """A job.  Progress has no unit; ``error`` says why it failed, once it is concluded."""

    id: str
    type: Kind
    status: Status
    current_progress: int
    total_progress: int
    error: str | None = None


class Job:
    """One job: ``work`` runs until it has ended or is cancelled; then the job is concluded, and
    stays until it is dismissed."""

    def __init__(self, daemon: Daemon, id: str, kind: Kind) -> None:
        if not _ID.fullmatch(id):
            raise UsageError(f"Invalid job ID '{id}'")
        if id in daemon.jobs:
            raise UsageError(f"Job ID '{id}' already in use")
        self.daemon, self.id, self.kind = daemon, id, kind
        self.status: Status = "undefined"
        self.error: str | None = None
        self.done = 0
        self._task: Task[None] | None = None
        daemon.jobs[id] = self

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin."""
        self._to("created")
        self._to("running")
        self._task = self.daemon.driver.spawn(self._run(work), name=f"job {self.id}")

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Cancelled:
            self.error = "Operation canceled"
        except (DiskError, OSError) as error:
            self.error = explain(error).partition("\n")[0]
        self.done = 1
        if self.error is not None:
            self._to("aborting")
        else:
            self._to("waiting")
            self._to("pending")
        self._to("concluded")

    def cancel(self) -> None:
        """End it; what it has made so far is not to be used."""
        if self._task is not None:
            self._task.cancel()

    async def ended(self) -> None:
        """Wait until it is concluded."""
        if self._task is not None and not self._task.done:
            await self._task

    def dismiss(self) -> None:
        """Forget it."""
        self._to("null")
        del self.daemon.jobs[self.id]

    def check(self, verb: str, *allowed: Status) -> None:
        """Raise UsageError unless its status is one of ``allowed``."""
        if self.status not in allowed:
            raise UsageError(
                f"Job '{self.id}' in state '{self.status}' cannot accept command verb '{verb}'"
            )

    def info(self) -> JobInfo:
        """What query-jobs tells."""
        return JobInfo(self.id, self.kind, self.status, self.done, 1, self.error)

    def _to(self, status: Status) -> None:
        self.status = status
        self.daemon.emit("JOB_STATUS_CHANGE", JobChange(self.id, status))


@command("query-jobs")
def query_jobs(monitor: Monitor) -> list[JobInfo]:
    """List the jobs; a concluded one until it is dismissed."""
    return [job.info() for job in monitor.daemon.jobs.values()]


@command("job-cancel")
def job_cancel(monitor: Monitor, id: str) -> None:
    """End a job.  It is concluded with an error when nothing of it is on its way any more."""
    job = _job(monitor, id)
    job.check("cancel", "created", "running")
    job.cancel()


@command("job-dismiss")
def job_dismiss(monitor: Monitor, id: str) -> None:
    """Forget a job that is concluded."""
    job = _job(monitor, id)
    job.check("dismiss", "concluded")
    job.dismiss()


def _job(monitor: Monitor, id: str) -> Job:
    found = monitor.daemon.jobs.get(id)
    if found is None:
        raise UsageError("Job not found")
    return found


async def cancel_all(daemon: Daemon) -> None:
    """End and forget all jobs."""
    for job in list(daemon.jobs.values()):
        job.cancel()
        await job.ended()
        job.dismiss()
