"""Snapshots of the formats that have some, for the races: taking, giving up, looking."""

from __future__ import annotations

from typing import Any

from diskwright.abilities import SnapshotInfo
from diskwright.contract import Procedure
from diskwright.errors import NotSupported
from diskwright.formats.qcow2.format import Qcow2
from diskwright.formats.qcow2.snapshots.procedures import read_l1
from diskwright.graph.mapped import MappedNode
from diskwright.testing.toy import Toy


def take(format: Any) -> Procedure:
    """Take one; returns what it is called, None where there is no room."""
    if isinstance(format, Toy):
        return format.snapshot()
    return _take(format)


def _take(format: Qcow2) -> Procedure:
    try:
        made = yield from format.create_snapshot(SnapshotInfo("", "race"))
    except NotSupported:
        return None  # narrow reference counts
    return made.id


def give_up(format: Any, called: Any) -> Procedure:
    """Delete one."""
    if isinstance(format, Toy):
        return format.delete_snapshot(called)
    return format.delete_snapshot(called, None)


def there(format: Any, called: Any) -> bool:
    """Whether the image still has it."""
    if isinstance(format, Toy):
        return bool(format.snapshots[called])
    return any(info.id == called for info in format.snapshots)


async def content(node: MappedNode, called: Any, size: int) -> bytes:
    """The first ``size`` bytes of one."""
    format: Any = node.format
    now = format.l1
    if isinstance(format, Toy):
        (raw,) = await node.engine.slots["file"].read([format.snapshots[called]], [256])
        format.l1 = type(now)("Q", bytes(raw))
        (data,) = await node.read([0], [size])
        format.l1 = now
        return bytes(data)
    (entry,) = [found for found in format.snapshot_table if found.id == called.encode()]
    format.replace_l1(await node.run_procedure(read_l1(format, entry), whole_image=False))
    (data,) = await node.read([0], [size])
    format.replace_l1(now)
    return bytes(data)
