"""Commands about the snapshots inside images."""

from __future__ import annotations

from typing import Any

from ..errors import NoSuchSnapshot, NotSupported, UsageError
from ..graph.node import Node
from ..ops import snapshots as ops
from ..records import NamedTuple
from .commands import command
from .daemon import Daemon
from .session import Monitor
from .transactions import Transaction, action


class SnapshotInfo(NamedTuple):
    """An internal snapshot.  Sizes in bytes, times in seconds and nanoseconds."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


def told(found: dict[str, Any]) -> SnapshotInfo:
    """From the keys of ``qemu-img info``."""
    return SnapshotInfo(**{name.replace("-", "_"): value for name, value in found.items()})


@action("blockdev-snapshot-internal-sync")
async def blockdev_snapshot_internal_sync(
    transaction: Transaction, device: str, name: str
) -> None:
    """Take a snapshot inside an image: clients may go on writing."""
    node = _node(transaction.daemon, device)
    if not name:
        raise UsageError("Name is empty")
    if any(found.name == name for found in ops.listed(node)):
        raise UsageError(f"Snapshot with name '{name}' already exists on device '{device}'")
    made = await ops.create(node, name, icount=None)
    transaction.undo(lambda: ops.delete(node, ops.Selector(made.id, made.name)))


@command("blockdev-snapshot-delete-internal-sync")
async def blockdev_snapshot_delete_internal_sync(
    monitor: Monitor, device: str, id: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Give up a snapshot that is inside an image, by its id, its name, or both, and tell what it
    was."""
    node = _node(monitor.daemon, device)
    if not (id or name):
        raise UsageError("Name or id must be provided")
    wanted = ops.Selector(id, name)
    try:
        found = ops.find(node, wanted)
    except NoSuchSnapshot:
        raise UsageError(
            f"Snapshot with id '{id or 'null'}' and name '{name or 'null'}' does not exist on "
            f"device '{device}'"
        ) from None
    await ops.delete(node, ops.Selector(found.id, found.name))
    return told(found.to_dict())


def _node(daemon: Daemon, device: str) -> Node:
    node = daemon.find(device, device)
    if node.parents:
        raise UsageError("Need a root block node")
    if ops.ability(node) is None:
        raise NotSupported(
            f"Block format '{node.driver_name}' used by device '{device}' does not support "
            "internal snapshots"
        )
    if node.read_only:
        raise UsageError(f"Device '{device}' is read only")
    return node
