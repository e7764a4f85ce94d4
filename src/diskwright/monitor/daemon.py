"""What a storage daemon holds: nodes, exports, jobs, objects, and the monitors that ask for it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import __version__
from ..engine.futures import Condition
from ..engine.kernel import BaseDriver, Future
from ..errors import UsageError
from ..graph.backend import Backend, Drain
from ..graph.gate import Gate
from ..graph.graph import Graph, walk
from ..graph.node import Node
from ..graph.perms import ALL, Use, conflict
from ..graph.stats import Stats
from ..jobs.job import Job, Jobs
from ..secrets import Secrets
from . import types
from .commands import EVENTS
from .jobs import tell

if TYPE_CHECKING:
    from ..export.nbd_server import Server
    from .exports import BlockExport
    from .session import Monitor

QEMU = {"micro": 2, "minor": 0, "major": 10}
"""The version of QEMU whose commands these are."""


class Daemon:
    """One daemon.  ``gate`` decides what images may name."""

    def __init__(self, driver: BaseDriver, gate: Gate | None = None) -> None:
        self.driver = driver
        self.gate = gate or Gate()
        self.version = {"qemu": QEMU, "package": f"diskwright {__version__}"}
        self.graph = Graph(driver)
        self.secrets = Secrets()
        self.graph.secrets = self.secrets
        self.objects: dict[str, str] = {}
        """The types of all objects, by their ids."""
        self.owned: set[Node] = set()
        """The nodes that commands added, and that a command removes."""
        self.server: Server | None = None
        self.server_path = ""
        """The unix socket on which it listens."""
        self.exports: dict[str, BlockExport] = {}
        self.past: WeakKeyDictionary[Node, Stats] = WeakKeyDictionary()
        """What users that have gone have asked of nodes."""
        self.jobs = Jobs(driver, partial(tell, self))
        self.monitors: set[Monitor] = set()
        self.stopping: Future[None] = Future()
        self._users: dict[Node, dict[str, Use]] = {}
        self._busy = False
        self._free = Condition()

    # -- commands
    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Commands of all monitors are carried out one after the other."""
        while self._busy:
            await self._free.wait()
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self._free.notify()

    def emit(self, name: str, data: Any) -> None:
        """Tell all monitors of an event."""
        assert name in EVENTS
        now = time.time_ns() // 1000
        for monitor in list(self.monitors):
            monitor.tell(name, types.plain(data), now)

    def stop(self) -> None:
        """End :meth:`until_stopped`."""
        if not self.stopping.done:
            self.stopping.set()

    async def until_stopped(self) -> None:
        """Wait for :meth:`stop`, then close everything: clients have their answers, all that was
        written is durable.  Raises the first error of the closing."""
        await self.stopping
        from .exports import close_all
        from .nodes import remove_all

        async with self.alone():
            await self.jobs.cancel_all()
            try:
                await close_all(self)
            finally:
                await remove_all(self)

    # -- nodes
    def find(self, device: str = "", node_name: str = "") -> Node:
        """The node that a command means: there are no devices, so ``device`` is a node's name too.

        Raises UsageError.
        """
        found = self.graph.nodes.get(device) or self.graph.nodes.get(node_name)
        if found is None:
            raise UsageError(f"Cannot find device='{device}' nor node-name='{node_name}'")
        return found

    def node(self, name: str) -> Node:
        """The node called ``name``.  Raises UsageError."""
        found = self.graph.nodes.get(name)
        if found is None:
            raise UsageError(f"Node '{name}' not found")
        return found

    def used(self, node: Node) -> bool:
        """Somebody beside other nodes uses it: an export, a job."""
        return bool(self._users.get(node))

    def job_on(self, node: Node) -> Job | None:
        """The job that needs ``node`` as it is."""
        return next((job for job in self.jobs if node in job.work.nodes and not job.ended), None)

    def check_free(self, node: Node) -> None:
        """Raise UsageError while a job needs ``node`` as it is."""
        job = self.job_on(node)
        if job is not None:
            raise UsageError(
                f"Node '{node.name}' is busy: block device is in use by block job: {job.work.kind}"
            )

    def backends(self) -> list[Backend]:
        """What those outside hold in place of nodes."""
        return [export.disk for export in self.exports.values()]

    def draining(self, nodes: Collection[Node]) -> Drain:
        """What keeps requests away from ``nodes``, those of jobs as well."""
        away = {*nodes}.isdisjoint
        disks = [disk for disk in self.backends() if not away(walk(disk.node))]
        jobs = [job for job in self.jobs if job.work.block and not away(walk(*job.work.nodes))]
        return Drain([*disks, *jobs])

    def draining_all(self) -> Drain:
        """What keeps requests away from all nodes."""
        return Drain([*self.backends(), *(job for job in self.jobs if job.work.block)])

    def retire(self, disk: Backend) -> None:
        """Its user has gone: let the node remember what was asked of it."""
        self.past.setdefault(disk.node, Stats()).add(disk.stats)

    def asked(self, node: Node) -> Stats:
        """What users outside have asked of ``node``, those that have gone as well."""
        total = Stats()
        for disk in self.backends():
            if disk.node is node:
                total.add(disk.stats)
        if node in self.past:
            total.add(self.past[node])
        return total

    def use(self, node: Node, who: str, use: Use | None) -> None:
        """Say what ``who`` needs of ``node`` and lets others do (None: it has ended).

        Raises UsageError or ImageInUse, and changes nothing then.
        """
        users = self._users.setdefault(node, {})
        before = users.get(who)
        for other in users.values():
            if use is None:
                break
            missing = (use.perms - other.shared) or (other.perms - use.shared)
            if missing:
                device = f"an unnamed block device (uses node '{node.name}' as 'root' child)"
                raise UsageError(conflict(node, missing, device, device))
        self._set(users, who, use)
        try:
            self.refresh(node)
        except BaseException:
            self._set(users, who, before)
            self.refresh(node)
            raise

    def use_of(self, node: Node, who: str) -> Use:
        """What :meth:`use` was told of ``who``."""
        return self._users.get(node, {}).get(who, Use(frozenset()))

    def asked_of(self, node: Node) -> frozenset[str]:
        """The permissions that users outside need of ``node``."""
        return frozenset().union(*(use.perms for use in self._users.get(node, {}).values()))

    def needs(self, node: Node) -> frozenset[str]:
        """The same, and those that its parents need."""
        return self.asked_of(node).union(*(edge.perms for edge in node.parents))

    def replace(self, old: Node, new: Node) -> None:
        """Let all who use ``old`` use ``new``: users outside, whose requests are drained, and nodes
        above but for ``new`` itself.  What they need of it is for :meth:`refresh`."""
        users = self._users.pop(old, {})
        self._users.setdefault(new, {}).update(users)
        for disk in self.backends():
            if disk.node is old:
                disk.move(new)
        for edge in list(old.parents):
            if edge.parent is not new:
                edge.parent.attach(edge.slot, new, edge.perms, edge.shared)

    def refresh(self, node: Node) -> None:
        """Have the graph hold what the users of ``node`` need together."""
        users = self._users.get(node, {}).values()
        perms = frozenset[str]().union(*(use.perms for use in users))
        if node in self.owned or self.used(node):
            self.graph.use(node, Use(perms, ALL.intersection(*(use.shared for use in users))))
        else:
            self.graph.roots.pop(node, None)
            self._users.pop(node, None)
        self.graph.refresh(node)

    @staticmethod
    def _set(users: dict[str, Use], who: str, use: Use | None) -> None:
        if use is None:
            users.pop(who, None)
        else:
            users[who] = use
