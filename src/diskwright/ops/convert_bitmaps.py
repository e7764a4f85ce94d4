"""The dirty bitmaps of a disk that is converted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import DiskError, UsageError, words
from ..graph import registry
from ..graph.node import Node
from . import bitmap as ops


def check_source(nodes: Sequence[Node], skip: bool) -> None:
    """Raise UsageError where the bitmaps of a source cannot be copied; ``skip``: those that are
    inconsistent may be left out."""
    if len(nodes) != 1:
        raise UsageError("Copying bitmaps only possible with single source")
    (node,) = nodes
    if not _keeps(node):
        raise UsageError("Source lacks bitmap support")
    for found in ops.listed(node):
        if found.persistent and found.inconsistent and not skip:
            raise UsageError(
                f"Cannot copy inconsistent bitmap '{found.name}'\n"
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            )


def check_target(format: str, node: Node | None = None) -> None:
    """Raise UsageError for a format, or an image of it, that keeps no bitmaps."""
    if "bitmaps" not in registry.driver(format).capabilities or (node and not _keeps(node)):
        raise UsageError(f"Format driver '{format}' does not support bitmaps")


def _keeps(node: Node) -> bool:
    format = getattr(node, "format", None)
    return bool(getattr(format, "can_keep_bitmaps", False))


async def copy_bitmaps(
    source: Node, target: Node, on_skipped: Callable[[str], None] | None = None
) -> None:
    """Give ``target`` the persistent bitmaps of ``source``, when the data have been copied (which
    then makes nothing dirty).  ``on_skipped`` is told the inconsistent ones.  Raises DiskError."""
    for found in ops.listed(source):
        name = found.name
        if not found.persistent:
            continue
        if found.inconsistent:
            if on_skipped is not None:
                on_skipped(name)
            continue
        try:
            await ops.add(target, name, found.granularity, enabled=found.enabled)
        except DiskError as error:
            raise DiskError(f"Failed to create bitmap {name}: {words(error)}") from error
        try:
            await ops.merge(target, name, [await ops.load(source, name)])
        except DiskError as error:
            raise DiskError(f"Failed to populate bitmap {name}: {words(error)}") from error
