"""Commands about nodes: adding, removing, opening again, resizing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import DiskError, NotSupported, UsageError
from ..graph import names
from ..graph.closing import close_disk, discard_disk
from ..graph.node import Node
from ..graph.opening import Opening
from ..graph.options import Mode
from ..graph.perms import RESIZE, Use
from .blockdev import OPTIONS
from .commands import command
from .daemon import Daemon
from .session import Monitor


@command("blockdev-add", boxed=OPTIONS)
async def blockdev_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Open a node, with all nodes below that are described in it or that its image names."""
    await add(monitor.daemon, options)


async def add(daemon: Daemon, options: Mapping[str, Any]) -> Node:
    """Open the node that ``options`` describe and keep it.  Raises OSError and DiskError."""
    if not options.get("node-name"):
        raise UsageError("'node-name' must be specified for the root node")
    graph = daemon.graph
    opening = Opening(graph, daemon.gate, backing=True, check=False)
    mode = Mode(writable=True, exact=True)
    node = await opening.disk(names.parse(options)[0], False, None, mode, ())
    try:
        await opening.finish()
        daemon.owned.add(node)
        daemon.refresh(node)
    except BaseException:
        daemon.owned.discard(node)
        await discard_disk(node)
        raise
    return node


@command("blockdev-del")
async def blockdev_del(monitor: Monitor, node_name: str) -> None:
    """Close a node that blockdev-add opened, and what is below and used by nobody else."""
    daemon = monitor.daemon
    node = daemon.graph.nodes.get(node_name)
    if node is None:
        raise UsageError(f"Failed to find node with node-name='{node_name}'")
    if daemon.job_on(node) is not None:
        raise UsageError(f"Block device {node_name} is in use")
    if daemon.used(node):
        raise UsageError(f"Node {node_name} is in use")
    if node not in daemon.owned:
        raise UsageError(f"Node {node_name} is not owned by the monitor")
    _check_backing(node)
    if node.parents:
        raise UsageError(f"Block device {node_name} is in use")
    daemon.owned.discard(node)
    await close_disk(node)


def _check_backing(node: Node) -> None:
    for edge in node.parents:
        if edge.slot == "backing":
            raise UsageError(
                f"Node '{node.name}' is busy: node is used as backing hd of '{edge.parent.name}'"
            )


async def release(daemon: Daemon, node: Node) -> None:
    """Close a node that nobody holds any more."""
    if node not in daemon.owned and not daemon.used(node) and not node.parents:
        await close_disk(node)


@command("block_resize")
async def block_resize(
    monitor: Monitor, device: str = "", node_name: str = "", *, size: int
) -> None:
    """Set a node's size in bytes.  New space reads as zeroes; what is behind the end is lost."""
    daemon = monitor.daemon
    node: Any = daemon.find(device, node_name)
    if size < 0:
        raise UsageError("Parameter 'size' expects a >0 size")
    if node.read_only:
        raise UsageError("Image is read-only")
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    _check_backing(node)
    daemon.check_free(node)
    if getattr(node, "truncate", None) is None:
        raise NotSupported("Image format driver does not support resize")
    daemon.use(node, "block_resize", Use(frozenset({RESIZE})))
    try:
        await node.truncate(size)
    finally:
        daemon.use(node, "block_resize", None)


async def remove_all(daemon: Daemon) -> None:
    """Close all nodes, those above before those below.  Raises the first error."""
    first: BaseException | None = None
    while daemon.owned:
        node = next(node for node in daemon.owned if not node.parents or _loop(daemon))
        daemon.owned.discard(node)
        try:
            await close_disk(node)
        except (OSError, DiskError) as error:
            first = first or error
    if first is not None:
        raise first


def _loop(daemon: Daemon) -> bool:
    """No node of the monitor's is without parents: one that is kept open from elsewhere."""
    return all(node.parents for node in daemon.owned)
