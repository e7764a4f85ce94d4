"""``x-blockdev-amend``: a job that changes the key slots of an encrypted image in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from ..errors import UsageError
from ..graph import names
from ..graph.node import Node
from ..graph.perms import root_use
from ..jobs.job import Job
from ..jobs.steps import run_steps
from ..jobs.work import Work
from ..ops.amend import typed
from .commands import command
from .daemon import Daemon
from .session import Monitor
from .types import INT, STR, Enum, Member, Struct, Union

_SLOTS = Struct(
    (
        Member("state", Enum("active", "inactive")),
        Member("new-secret", STR, True),
        Member("old-secret", STR, True),
        Member("keyslot", INT, True),
        Member("iter-time", INT, True),
    )
)


def _options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    crypto = Union(lambda: ("format", (Member("format", Enum("luks")),), {"luks": _SLOTS}))
    variants = {"luks": _SLOTS, "qcow2": Struct((Member("encrypt", crypto, True),))}
    return "driver", (Member("driver", Enum(*variants)),), variants


AMEND_OPTIONS = Union(_options)


@command("x-blockdev-amend", features=("unstable",))
def x_blockdev_amend(
    monitor: Monitor,
    job_id: str,
    node_name: str,
    options: Annotated[dict[str, Any], AMEND_OPTIONS],
    force: bool = False,
) -> None:
    """Add (``active``) or erase (``inactive``) key slots of an encrypted image that is in use.
    ``keyslot`` is one of 0 to 7, ``iter-time`` how long trying a passphrase takes, in milliseconds
    (default 2000); ``force`` also where the data become unreadable for good.

    It is a job, as blockdev-create is.  It can be paused and cancelled until it begins to write.
    """
    daemon = monitor.daemon
    node = daemon.find("", node_name)
    if node.driver_name != options["driver"]:
        raise UsageError("x-blockdev-amend doesn't support changing the block driver")
    daemon.check_free(node)
    Job(daemon.jobs, job_id, Amend(daemon, node, options, force), auto_dismiss=False).start()


class Amend(Work):
    """Changes the ``options`` of ``node``."""

    kind = "amend"

    def __init__(
        self, daemon: Daemon, node: Node, options: Mapping[str, Any], force: bool
    ) -> None:
        self.daemon = daemon
        self.node: Any = node
        self.nodes = (node,)
        flat = names.flatten(options)
        self.options = {k: v for k, v in flat.items() if k not in ("driver", "encrypt.format")}
        self.force = force

    async def run(self, job: Job) -> None:
        """Do it."""
        node, user = self.node, f"job {job.id}"
        job.total = 1
        try:
            if node.read_only:
                raise UsageError(f"Block node '{node.name}' is read-only")
            self.daemon.use(node, user, root_use(True, resize=True))
            try:
                given = typed(node.driver_name, self.options)
                await run_steps(job, node, node.format.amend(given, self.force))
                node.changed()
            finally:
                self.daemon.use(node, user, None)
        finally:
            job.done = 1
