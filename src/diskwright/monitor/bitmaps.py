"""Commands about dirty bitmaps."""

from __future__ import annotations

from typing import Annotated, Any

from ..bitmaps import DirtyBitmap
from ..engine import bitmaps as at
from ..errors import UsageError
from ..graph.node import Node
from ..ops import bitmap as ops
from ..records import NamedTuple
from .commands import command
from .session import Monitor
from .types import SIZE, STR, Alternate, Array, Member, Struct

_LARGEST = 1 << 32


class BlockDirtyInfo(NamedTuple):
    """A dirty bitmap.  ``count`` (what is dirty) and ``granularity`` in bytes; ``recording``: it
    follows writes."""

    count_: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    name: str | None = None
    inconsistent: bool | None = None


_SOURCE = Alternate(
    "BlockDirtyBitmapOrStr", Struct((Member("node", STR), Member("name", STR))), STR
)
Sources = Annotated[list[Any], Array(_SOURCE)]


@command("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(
    monitor: Monitor,
    node: str,
    name: str,
    granularity: Annotated[int, SIZE] | None = None,
    persistent: bool = False,
    disabled: bool = False,
) -> None:
    """Add a bitmap to a node; it follows writes unless ``disabled``.  ``granularity`` in bytes, by
    default a cluster between 4 KiB and 64 KiB.  A ``persistent`` one is stored in the image."""
    found = monitor.daemon.find(node, node)
    if granularity is not None and not 0 <= granularity < _LARGEST:
        raise UsageError("Parameter 'granularity' expects uint32_t")
    await ops.add(found, name, granularity, persistent=persistent, enabled=not disabled)


@command("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(monitor: Monitor, node: str, name: str) -> None:
    """Remove a bitmap; a persistent one from the image, too."""
    await at.remove(ops.engine_of(monitor.daemon.find(node, node)), name)


@command("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(monitor: Monitor, node: str, name: str) -> None:
    """Let nothing be dirty in a bitmap."""
    await at.clear(ops.engine_of(monitor.daemon.find(node, node)), name)


@command("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(monitor: Monitor, node: str, name: str) -> None:
    """Let a bitmap follow writes."""
    await at.switch(ops.engine_of(monitor.daemon.find(node, node)), name, True)


@command("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(monitor: Monitor, node: str, name: str) -> None:
    """Let a bitmap stay as it is."""
    await at.switch(ops.engine_of(monitor.daemon.find(node, node)), name, False)


@command("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(
    monitor: Monitor, node: str, target: str, bitmaps: Sources
) -> None:
    """Add to ``target`` what is dirty in others, of the same node or of another.  When one of them
    cannot be added, none is."""
    daemon = monitor.daemon
    found = daemon.find(node, node)
    ops.engine_of(found).bitmaps.get(target)
    sources = []
    for one in bitmaps:
        if isinstance(one, dict):
            sources.append(await ops.load(daemon.find(one["node"], one["node"]), one["name"]))
        else:
            sources.append(await ops.load(found, one))
    await ops.merge(found, target, sources)


async def listed(node: Node) -> list[BlockDirtyInfo] | None:
    """What query-named-block-nodes tells; None of a node without any."""
    engine = getattr(node, "engine", None)
    if engine is None or not engine.bitmaps:
        return None
    found = []
    for bitmap in list(engine.bitmaps):
        if not bitmap.loaded and not bitmap.inconsistent:
            await at.load(engine, bitmap.name)
        found.append(_info(bitmap))
    return found


def _info(bitmap: DirtyBitmap) -> BlockDirtyInfo:
    return BlockDirtyInfo(
        count_=bitmap.count,
        granularity=bitmap.granularity,
        recording=bitmap.enabled,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        name=bitmap.name,
        inconsistent=bitmap.inconsistent or None,
    )
