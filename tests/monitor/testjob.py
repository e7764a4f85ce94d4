"""A block job that does what a test tells it: `x-job`, a command and an action of transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diskwright.errors import UsageError
from diskwright.jobs.job import Job, OnError
from diskwright.jobs.work import Work
from diskwright.monitor.commands import COMMANDS
from diskwright.monitor.transactions import ACTION, ACTIONS, Transaction, action

CHUNK = 1 << 20


class TestWork(Work):
    """Processes ``chunks``; with ``ready`` it is mirror's like.  ``gate`` False: it does not go on.

    ``error``: the errno that the chunk ``at`` fails with, as often as ``times``.
    """

    __test__ = False
    kind = "mirror"
    block = True
    leaves = True

    def __init__(
        self,
        chunks: int,
        ready: bool = False,
        error: int = 0,
        at: int = 0,
        times: int = 1,
        on_error: OnError = "report",
        bad_end: bool = False,
    ) -> None:
        self.chunks, self.becomes_ready = chunks, ready
        self.error, self.at, self.times, self.on_error = error, at, times, on_error
        self.bad_end = bad_end
        self.log: list[str] = []

    async def run(self, job: Job) -> None:
        job.total = self.chunks * CHUNK
        chunk = 0
        while chunk < self.chunks:
            if self.error and chunk == self.at and self.times:
                self.times -= 1
                error = OSError(self.error, "x")
                match job.failed(error, "write", self.on_error):
                    case "report":
                        raise OSError(self.error, "Input/output error")
                    case _:
                        await job.rest()
                        continue
            await job.spend(CHUNK)
            chunk += 1
        if self.becomes_ready:
            job.become_ready()
            while not (job.completing or job.leaving):
                await job.rest(None)
            await job.rest()
        self.log.append("ran")

    async def prepare(self, job: Job) -> None:
        self.log.append("prepare")
        if self.bad_end:
            raise UsageError("not so")

    async def commit(self, job: Job) -> None:
        self.log.append("commit")

    async def abort(self, job: Job) -> None:
        self.log.append("abort")


@contextmanager
def declared() -> Iterator[dict[str, TestWork]]:
    """The command and action are there; the works of the jobs by their ids."""
    works: dict[str, TestWork] = {}

    @action("x-job", grouped=True)
    async def x_job(
        transaction: Transaction,
        job_id: str,
        chunks: int = 1,
        ready: bool = False,
        speed: int = 0,
        error: int = 0,
        at: int = 0,
        times: int = 1,
        on_error: str = "report",
        bad_end: bool = False,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """Begin a job."""
        work = TestWork(chunks, ready, error, at, times, on_error, bad_end)  # type: ignore[arg-type]
        transaction.begin(
            job_id, work, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss
        )
        works[job_id] = work

    ACTION._built = None  # it remembers which actions there are
    try:
        yield works
    finally:
        del COMMANDS["x-job"], ACTIONS["x-job"]
        ACTION._built = None
