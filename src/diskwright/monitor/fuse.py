"""Exports of the type ``fuse``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..export.fuse import DiskFile
from ..export.fuse_mount import Mount, place
from ..graph.node import Node
from ..ops.info import actual_size

if TYPE_CHECKING:
    from .daemon import Daemon


async def mount_of(daemon: Daemon, disk: Node, options: Mapping[str, Any]) -> Mount:
    """The mount that ``options`` describe, not begun yet.  Raises UsageError."""
    name = options["mountpoint"]
    # In a thread: the path may lead through what this daemon itself serves.
    where = await daemon.driver.call(place, name)
    for other in daemon.exports.values():
        if other.mount is not None and other.mount.mountpoint == where:
            raise UsageError(f"There already is a FUSE export on '{name}'")
    file = DiskFile(
        disk,
        writable=options.get("writable", False),
        growable=options.get("growable", False),
        allocated=lambda disk: actual_size(disk.real),
    )
    others = options.get("allow-other", "auto")
    return Mount(daemon.driver, file, where, others, direct=True)
