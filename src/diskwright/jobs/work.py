"""What a job does, as a type of job declares it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..errors import DiskError
from ..graph.node import Node

if TYPE_CHECKING:
    from .job import Job

CANCELED = "Operation canceled"


class Stopped(DiskError):
    """The job was cancelled: its work ends here."""

    def __init__(self) -> None:
        super().__init__(CANCELED)


class Work:
    """What a job does.  A type of job is a class of this.

    :meth:`run` does it; then, when all jobs of the group have come so far, :meth:`prepare` may
    still fail, and one of :meth:`commit` and :meth:`abort`, which cannot, is the end.
    """

    kind: ClassVar[str]
    """``create``, ``mirror``, ...: the type of job."""
    block: ClassVar[bool] = False
    """It moves the data of a block device: it has a speed, and events of its own."""
    leaves: ClassVar[bool] = False
    """Once it is ready it may be left without being completed, and has not failed then."""

    nodes: Sequence[Node] = ()
    """What nobody else may change while it runs."""

    async def run(self, job: Job) -> None:
        """Do the work.  Raises Stopped where ``job`` is cancelled, OSError and DiskError."""
        raise NotImplementedError

    async def prepare(self, job: Job) -> None:
        """What is left that may fail."""

    async def commit(self, job: Job) -> None:
        """All went well."""

    async def abort(self, job: Job) -> None:
        """This job failed or was cancelled, or another one of its group."""
