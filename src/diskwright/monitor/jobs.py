"""Commands and events about jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import UsageError
from ..jobs.job import Action, IoStatus, Job, Operation
from ..jobs.states import Status
from ..records import NamedTuple
from .commands import QmpError, command, event
from .session import Monitor

if TYPE_CHECKING:
    from .daemon import Daemon

Kind = Literal["create", "amend"]


class JobChange(NamedTuple):
    """The job, and its new status."""

    id: str
    status: Status


class BlockJobEvent(NamedTuple):
    """A block job: ``device`` is its id, ``offset`` and ``len`` how much of how much it has done,
    in bytes, ``speed`` in bytes a second."""

    type: Kind
    device: str
    len: int
    offset: int
    speed: int


class BlockJobCompleted(NamedTuple):
    """The same; with ``error`` it has failed."""

    type: Kind
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


class BlockJobPending(NamedTuple):
    """The job."""

    type: Kind
    id: str


class BlockJobError(NamedTuple):
    """The job, what failed, and what it does now."""

    device: str
    operation: Operation
    action: Action


event("JOB_STATUS_CHANGE", JobChange, "A job has got another status.")
event("BLOCK_JOB_COMPLETED", BlockJobCompleted, "A block job has succeeded or failed.")
event("BLOCK_JOB_CANCELLED", BlockJobEvent, "A block job was cancelled.")
event("BLOCK_JOB_READY", BlockJobEvent, "A block job can be completed.")
event("BLOCK_JOB_PENDING", BlockJobPending, "A block job waits for job-finalize.")
event("BLOCK_JOB_ERROR", BlockJobError, "A block job has met an error.")


class JobInfo(NamedTuple):
    """A job.  Progress has no unit; ``error`` says why it failed, once it is concluded."""

    id: str
    type: Kind
    status: Status
    current_progress: int
    total_progress: int
    error: str | None = None


class BlockJobInfo(NamedTuple):
    """A block job; see BLOCK_JOB_COMPLETED for the first five.  ``busy``: it is not at rest;
    ``paused``: it was asked to rest; ``ready``: it can be completed; ``io-status``: the error that
    it stopped for."""

    type: Kind
    device: str
    len: int
    offset: int
    speed: int
    busy: bool
    paused: bool
    io_status: IoStatus
    ready: bool
    status: Status
    auto_finalize: bool
    auto_dismiss: bool
    error: str | None = None


def tell(daemon: Daemon, job: Job, what: str, more: Mapping[str, Any]) -> None:
    """Tell the monitors what happened to ``job``; see :class:`.Jobs`."""
    if what == "status":
        daemon.emit("JOB_STATUS_CHANGE", JobChange(job.id, job.status))
    elif job.work.block:
        name = f"BLOCK_JOB_{what.upper()}"
        if what == "pending":
            daemon.emit(name, BlockJobPending(_kind(job), job.id))
        elif what == "error":
            daemon.emit(name, BlockJobError(job.id, **more))
        else:
            state = BlockJobEvent(_kind(job), job.id, job.total, job.done, job.pace.speed)
            failed = what == "completed" and job.error is not None
            daemon.emit(name, BlockJobCompleted(*state, job.error) if failed else state)


@command("query-jobs")
def query_jobs(monitor: Monitor) -> list[JobInfo]:
    """List the jobs; a concluded one until it is dismissed."""
    return [
        JobInfo(job.id, _kind(job), job.status, job.done, job.total, job.error)
        for job in monitor.daemon.jobs
    ]


@command("query-block-jobs")
def query_block_jobs(monitor: Monitor) -> list[BlockJobInfo]:
    """List the jobs that move a block device's data; a concluded one until it is dismissed."""
    return [
        BlockJobInfo(
            type=_kind(job),
            device=job.id,
            len=job.total,
            offset=job.done,
            speed=job.pace.speed,
            busy=job.busy,
            paused=job.paused,
            io_status=job.io_status,
            ready=job.ready,
            status=job.status,
            auto_finalize=job.auto_finalize,
            auto_dismiss=job.auto_dismiss,
            error=job.error,
        )
        for job in monitor.daemon.jobs
        if job.work.block
    ]


def _kind(job: Job) -> Kind:
    return cast(Kind, job.work.kind)


@command("job-pause")
def job_pause(monitor: Monitor, id: str) -> None:
    """Let a job rest, as soon as it comes to where it can."""
    _job(monitor, id).pause()


@command("job-resume")
def job_resume(monitor: Monitor, id: str) -> None:
    """Let a job go on that was paused, or that stopped at an error."""
    _job(monitor, id).resume()


@command("job-cancel")
def job_cancel(monitor: Monitor, id: str) -> None:
    """End a job, and those of its group.  It is concluded with an error when nothing of it is on
    its way any more."""
    _job(monitor, id).cancel()


@command("job-complete")
def job_complete(monitor: Monitor, id: str) -> None:
    """Let a job that is ready come to its end."""
    _job(monitor, id).complete()


@command("job-finalize")
def job_finalize(monitor: Monitor, id: str) -> None:
    """Let a job that is pending, and with it those of its group, come to its end."""
    _job(monitor, id).finalize()


@command("job-dismiss")
def job_dismiss(monitor: Monitor, id: str) -> None:
    """Forget a job that is concluded."""
    _job(monitor, id).dismiss()


def _job(monitor: Monitor, id: str) -> Job:
    found = monitor.daemon.jobs.all.get(id)
    if found is None:
        raise UsageError("Job not found")
    return found


# -- block jobs
@command("block-job-set-speed")
def block_job_set_speed(monitor: Monitor, device: str, speed: int) -> None:
    """Limit a block job to ``speed`` bytes a second (0: no limit)."""
    _block_job(monitor, device).set_speed(speed)


@command("block-job-cancel")
def block_job_cancel(monitor: Monitor, device: str, force: bool = False) -> None:
    """End a block job; one that is ready and can be left so ends well, unless ``force``."""
    job = _block_job(monitor, device)
    if job.paused and not force:
        raise UsageError(f"The block job for device '{device}' is currently paused")
    job.cancel(force)


@command("block-job-pause")
def block_job_pause(monitor: Monitor, device: str) -> None:
    """See job-pause."""
    _block_job(monitor, device).pause()


@command("block-job-resume")
def block_job_resume(monitor: Monitor, device: str) -> None:
    """See job-resume."""
    _block_job(monitor, device).resume()


@command("block-job-complete")
def block_job_complete(monitor: Monitor, device: str) -> None:
    """See job-complete."""
    _block_job(monitor, device).complete()


@command("block-job-finalize")
def block_job_finalize(monitor: Monitor, id: str) -> None:
    """See job-finalize."""
    _block_job(monitor, id).finalize()


@command("block-job-dismiss")
def block_job_dismiss(monitor: Monitor, id: str) -> None:
    """See job-dismiss."""
    _block_job(monitor, id).dismiss()


def _block_job(monitor: Monitor, id: str) -> Job:
    found = monitor.daemon.jobs.all.get(id)
    if found is None or not found.work.block:
        raise QmpError("DeviceNotActive", f"Block job '{id}' not found")
    return found
