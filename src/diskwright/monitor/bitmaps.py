"""Commands about dirty bitmaps."""

from __future__ import annotations

from typing import Annotated, Any

from ..bitmaps import DirtyBitmap
from ..engine import bitmaps as at
from ..engine.engine import Engine
from ..errors import UsageError
from ..graph.node import Node
from ..ops import bitmap as ops
from ..records import NamedTuple
from .transactions import Transaction, action
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


BITMAP = Alternate(
    "BlockDirtyBitmapOrStr", Struct((Member("node", STR), Member("name", STR))), STR
)
Sources = Annotated[list[Any], Array(BITMAP)]


@action("block-dirty-bitmap-add")
async def block_dirty_bitmap_add(
    transaction: Transaction,
    node: str,
    name: str,
    granularity: Annotated[int, SIZE] | None = None,
    persistent: bool = False,
    disabled: bool = False,
) -> None:
    """Add a bitmap to a node; it follows writes unless ``disabled``.  ``granularity`` in bytes, by
    default a cluster between 4 KiB and 64 KiB.  A ``persistent`` one is stored in the image."""
    if granularity is not None and not 0 <= granularity < _LARGEST:
        raise UsageError("Parameter 'granularity' expects uint32_t")
    found = transaction.daemon.find(node, node)
    await ops.add(found, name, granularity, persistent=persistent, enabled=not disabled)
    engine = ops.engine_of(found)
    transaction.undo(lambda: at.forget(engine, engine.bitmaps.get(name)))


@action("block-dirty-bitmap-remove")
async def block_dirty_bitmap_remove(transaction: Transaction, node: str, name: str) -> None:
    """Remove a bitmap; a persistent one from the image, too."""
    engine, bitmap = _bitmap(transaction, node, name)
    if bitmap.busy:
        bitmap.check()
    bitmap.busy = True

    def spare() -> None:
        bitmap.busy = False

    transaction.undo(spare)
    transaction.finish(lambda: at.forget(engine, bitmap))


@action("block-dirty-bitmap-clear")
async def block_dirty_bitmap_clear(transaction: Transaction, node: str, name: str) -> None:
    """Let nothing be dirty in a bitmap."""
    engine, bitmap = _bitmap(transaction, node, name)
    transaction.undo(bitmap.saved())
    await at.clear(engine, name)


@action("block-dirty-bitmap-enable")
async def block_dirty_bitmap_enable(transaction: Transaction, node: str, name: str) -> None:
    """Let a bitmap follow writes."""
    await _switch(transaction, node, name, True)


@action("block-dirty-bitmap-disable")
async def block_dirty_bitmap_disable(transaction: Transaction, node: str, name: str) -> None:
    """Let a bitmap stay as it is."""
    await _switch(transaction, node, name, False)


async def _switch(transaction: Transaction, node: str, name: str, enabled: bool) -> None:
    engine, bitmap = _bitmap(transaction, node, name)
    before = bitmap.enabled
    await at.switch(engine, name, enabled)
    if before != enabled:
        transaction.undo(lambda: at.switch(engine, name, before))


@action("block-dirty-bitmap-merge")
async def block_dirty_bitmap_merge(
    transaction: Transaction, node: str, target: str, bitmaps: Sources
) -> None:
    """Add to ``target`` what is dirty in others, of the same node or of another.  When one of them
    cannot be added, none is."""
    daemon = transaction.daemon
    _, bitmap = _bitmap(transaction, node, target)
    sources = []
    for one in bitmaps:
        there, name = (one["node"], one["name"]) if isinstance(one, dict) else (node, one)
        sources.append(await ops.load(daemon.node(there), name))
    transaction.undo(bitmap.saved())
    await ops.merge(daemon.node(node), target, sources)


def _bitmap(transaction: Transaction, node: str, name: str) -> tuple[Engine, DirtyBitmap]:
    engine = ops.engine_of(transaction.daemon.node(node))
    return engine, engine.bitmaps.get(name)


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
