"""Jobs that succeed together or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.kernel import Task

if TYPE_CHECKING:
    from .job import Job


class Group:
    """Some jobs, those that were made last first; a job alone is a group of one."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._failed = False
        self._closing: Task[None] | None = None

    @property
    def closing(self) -> bool:
        """How they end is settled."""
        return self._closing is not None

    def add(self, job: Job) -> None:
        """Take in a job that has not begun."""
        self.jobs.insert(0, job)

    def came(self) -> None:
        """The work of one of them is done."""
        if self._all_ended():
            if self._failed:
                self._close()
                return
            for job in self.jobs:
                job.pending()
            if all(job.auto_finalize for job in self.jobs):
                self._close()

    def fail(self) -> None:
        """One of them has failed or was cancelled, so the others are."""
        if not self._failed:
            self._failed = True
            for job in self.jobs:
                if not job.ended:
                    job.stop()
        if self._all_ended():
            self._close()

    def finalize(self) -> None:
        """Let all of them, whose work is done, come to their end."""
        self._close()

    def _all_ended(self) -> bool:
        return all(job.ended for job in self.jobs)

    def _close(self) -> None:
        if self._closing is None:
            driver = self.jobs[0].jobs.driver
            self._closing = driver.spawn(self._conclude(), name="jobs' end")

    async def _conclude(self) -> None:
        if not self._failed:
            for job in self.jobs:
                try:
                    await job.work.prepare(job)
                except Exception as error:
                    job.fail(error)
                    self._failed = True
                    break
        for job in self.jobs:
            if self._failed:
                job.aborting()
            await job.conclude()
