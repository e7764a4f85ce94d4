"""``blockdev-create``: a job that makes a file, or an image in nodes that are there."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Annotated, Any

from ..declare import Driver
from ..errors import DiskError, UsageError
from ..graph import names, registry
from ..graph.closing import close_disk, discard_disk
from ..graph.create import DATA_SLOT, create_file, create_over
from ..graph.creating import remove
from ..graph.display import base_of
from ..graph.named import identity_of
from ..graph.node import Node
from ..graph.opener import open_disk
from ..graph.opening import Opening
from ..graph.options import Mode
from ..graph.perms import root_use
from ..jobs.job import Job
from ..jobs.steps import grow, run_steps
from ..jobs.work import Work
from ..units import SECTOR
from .commands import command
from .createoptions import CREATE_OPTIONS, given
from .daemon import Daemon
from .session import Monitor


@command("blockdev-create")
def blockdev_create(
    monitor: Monitor, job_id: str, options: Annotated[dict[str, Any], CREATE_OPTIONS]
) -> None:
    """Make a file, or an image of ``size`` bytes in the node ``file``, whose content is lost.
    ``data-file``, ``header`` and ``extents`` are the nodes of the image's other files.

    It is a job: JOB_STATUS_CHANGE tells of its end, query-jobs how it ended, and job-dismiss
    forgets it.  One that fails or is cancelled leaves no file where none was, and a node empty.
    """
    work = Create(monitor.daemon, options)
    Job(monitor.daemon.jobs, job_id, work, auto_dismiss=False).start()


class Create(Work):
    """Makes what ``options`` describe."""

    kind = "create"

    def __init__(self, daemon: Daemon, options: dict[str, Any]) -> None:
        self.daemon = daemon
        self.options = dict(options)
        self.nodes: list[Node] = []
        self._made: list[Node] = []
        """Nodes in which there is an image now."""
        self._new: str | None = None
        """A file that was not there before."""

    async def run(self, job: Job) -> None:
        """Do it."""
        job.total += 1
        try:
            found = registry.driver(self.options.pop("driver"))
            size = self.options.pop("size")
            if size < 0 or size >= 1 << 63:
                raise UsageError("Image size is out of range")
            if found.kind == "protocol":
                await self._file(job, found, size)
            elif size % SECTOR:
                raise UsageError(f"Image size must be a multiple of {SECTOR} bytes")
            elif found.name == "luks":
                await self._luks(job, found, size)
            else:
                await self._image(job, found, size)
        finally:
            job.done += 1

    async def commit(self, job: Job) -> None:
        """It stays."""
        await self._release()

    async def abort(self, job: Job) -> None:
        """Nothing of it stays."""
        for node in self._made:
            with suppress(OSError, DiskError):
                await node.truncate(0)
        if self._new is not None:
            remove(self._new)
        await self._release()

    # -- what is made
    async def _file(self, job: Job, found: Driver, size: int) -> None:
        where = {"driver": "file", "filename": names.check_path(self.options.pop("filename"))}
        preallocation = self.options.pop("preallocation", "off")
        try:
            node, self._new = await create_file(
                self.daemon.graph, where, given(found, self.options)
            )
        except OSError as error:
            path, why = where["filename"], error.strerror or error
            raise UsageError(f"Could not create '{path}': {why}") from error
        try:
            await grow(job, node, size, preallocation)
            await node.flush()
        except BaseException:
            await discard_disk(node)
            raise
        await close_disk(node)

    async def _luks(self, job: Job, found: Driver, size: int) -> None:
        file, header = self.options.pop("file", None), self.options.pop("header", None)
        if header is None:
            if file is None:
                raise UsageError("Either the parameter 'header' or 'file' must be specified")
            await self._over(job, found, await self._take(file), {"size": size})
            return
        preallocation = self.options.pop("preallocation", "off")
        if file is None and preallocation != "off":
            raise UsageError(
                "Parameter 'preallocation' requires 'file' to be specified for formatting LUKS disk"
            )
        node = await self._take(header)
        if file is not None:
            disk = await self._take(file)
            await disk.truncate(0)
            await grow(job, disk, size, preallocation)
        await self._over(job, found, node, {"size": size, "detached-header": True})

    async def _image(self, job: Job, found: Driver, size: int) -> None:
        file = await self._take(self.options.pop("file"))
        data = self.options.pop("data-file", None)
        if self.options.get("backing-fmt") and not self.options.get("backing-file"):
            raise UsageError("Backing format cannot be used without backing file")
        extents = [await self._take(one) for one in self.options.pop("extents", ())]
        more: dict[str, Any] = {"size": size}
        others = {f"extent.{number}": node for number, node in enumerate(extents)}
        if found.name == "vmdk":
            more["extents"] = [_name_from(file, node) for node in extents]
            if self.options.get("backing-file"):
                more["backing_identity"] = await self._parent(file, self.options["backing-file"])
        if data is not None:
            others[DATA_SLOT] = await self._take(data)
            more["data_file"] = base_of(others[DATA_SLOT])
        await self._over(job, found, file, more, others)
        self._made += extents

    async def _over(
        self,
        job: Job,
        found: Driver,
        file: Node,
        more: dict[str, Any],
        others: dict[str, Node] | None = None,
    ) -> None:
        await create_over(
            file,
            found,
            {**given(found, self.options), **more},
            others,
            secrets=self.daemon.secrets,
            run=lambda node, procedure: run_steps(job, node, procedure, anew=True),
        )
        self._made.append(file)

    async def _parent(self, file: Node, name: str) -> Any:
        """What a VMDK image says about the content of its backing file."""
        path = names.resolve(base_of(file), name)
        daemon = self.daemon
        backing = await open_disk(daemon.driver, path, backing=False, gate=daemon.gate)
        try:
            if backing.driver_name != "vmdk":
                raise UsageError(
                    f"Invalid backing file format: {backing.driver_name}. Must be vmdk"
                )
            return identity_of(backing)
        finally:
            await close_disk(backing)

    # -- nodes
    async def _take(self, reference: Any) -> Node:
        """The node that is meant; one that is only described is opened for that."""
        daemon = self.daemon
        if isinstance(reference, str):
            node = daemon.find(reference, reference)
            if node.read_only:
                raise UsageError(f"Block node '{node.name}' is read-only")
        else:
            opening = Opening(daemon.graph, daemon.gate, backing=False, check=False)
            node = await opening.child(reference, Mode(writable=True, exact=True), ())
            await opening.finish()
        if node in self.nodes:
            raise UsageError(f"Node '{node.name}' cannot be two files of an image")
        daemon.check_free(node)
        self.nodes.append(node)
        daemon.use(node, self._user, root_use(True, resize=True))
        return node

    @property
    def _user(self) -> str:
        return f"create {id(self)}"

    async def _release(self) -> None:
        for node in self.nodes:
            self.daemon.use(node, self._user, None)
            if node not in self.daemon.owned and not node.parents:
                await close_disk(node)


def _name_from(image: Node, extent: Node) -> str:
    """What ``image`` is to call its extent: the bare name of a file that is beside it."""
    name = base_of(extent)
    folder, bare = os.path.split(os.path.abspath(name))
    return bare if folder == os.path.dirname(os.path.abspath(base_of(image))) else name
