"""Dirty bitmaps of whole disks: what the verb and the Python API do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..bitmaps import DirtyBitmap
from ..engine import bitmaps as at
from ..engine.engine import Engine
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported
from ..graph.closing import discard_disk
from ..graph.node import Node
from ..graph.opener import close_disk
from ..records import NamedTuple
from .images import ImageSpec, close_all


class BitmapInfo(NamedTuple):
    """One bitmap.  ``granularity`` and ``dirty`` in bytes; ``dirty`` is None where the bits were
    not read yet.  ``inconsistent``: it can only be removed."""

    name: str
    granularity: int
    enabled: bool
    persistent: bool
    inconsistent: bool
    busy: bool
    dirty: int | None

    def to_dict(self) -> dict[str, Any]:
        """The keys of QEMU's ``query-block``, in its order; the count only where it is known."""
        out: dict[str, Any] = {"name": self.name}
        if self.dirty is not None:
            out["count"] = self.dirty
        return out | {
            "granularity": self.granularity,
            "recording": self.enabled and not self.inconsistent,
            "busy": self.busy,
            "persistent": self.persistent,
            "inconsistent": self.inconsistent,
        }


class ActionFailed(DiskError):
    """``kind`` could not be done to the bitmap ``name``."""

    def __init__(self, kind: str, name: str, cause: BaseException) -> None:
        from ..errors import words

        self.kind, self.name, self.cause = kind, name, cause
        super().__init__(f"Operation {kind} on bitmap {name} failed: {words(cause)}")


class Action(NamedTuple):
    """``kind`` is add, remove, clear, enable, disable or merge (of the bitmap ``source``)."""

    kind: str
    source: str = ""


def engine_of(node: Node) -> Engine:
    """Raises NotSupported for a node that has no map of its own."""
    found: Engine | None = getattr(node, "engine", None)
    if found is None:
        raise NotSupported(f"'{node.driver_name}' has no dirty bitmaps")
    return found


def listed(node: Node) -> list[BitmapInfo]:
    """All bitmaps.  Raises CorruptImage or MalformedImage where they cannot be told."""
    engine = engine_of(node)
    error: DiskError | None = getattr(engine.format, "bitmap_error", None)
    if error is not None:
        raise error
    return [
        BitmapInfo(
            b.name,
            b.granularity,
            b.enabled,
            b.persistent,
            b.inconsistent,
            b.busy,
            b.count if b.loaded else None,
        )
        for b in engine.bitmaps
    ]


async def add(
    node: Node,
    name: str,
    granularity: int | None = None,
    *,
    persistent: bool = True,
    enabled: bool = True,
) -> None:
    """A new bitmap; without ``granularity`` of a cluster between 4 KiB and 64 KiB."""
    await at.add(
        engine_of(node),
        name,
        granularity,
        persistent=persistent,
        enabled=enabled,
        label=node.name,
    )


async def merge(node: Node, name: str, sources: Sequence[DirtyBitmap]) -> None:
    """Add what is dirty in ``sources`` (see :func:`load`)."""
    await at.merge(engine_of(node), name, sources)


async def load(node: Node, name: str) -> DirtyBitmap:
    """A bitmap with all of its bits."""
    return await at.load(engine_of(node), name)


async def dirty(
    node: Node, name: str, offset: int = 0, length: int | None = None
) -> list[tuple[int, int]]:
    """The dirty ranges of a part of the disk, as (offset, length) in bytes."""
    return list((await load(node, name)).runs(offset, length))


async def act(node: Node, name: str, action: Action, granularity: int | None, other: Node) -> None:
    """One action; ``other`` has the sources of a merge."""
    engine = engine_of(node)
    if action.kind == "add":
        await add(node, name, granularity)
    elif action.kind == "remove":
        await at.remove(engine, name)
    elif action.kind == "clear":
        await at.clear(engine, name)
    elif action.kind in ("enable", "disable"):
        await at.switch(engine, name, action.kind == "enable")
    else:
        engine.bitmaps.get(name)
        await merge(node, name, [await load(other, action.source)])


async def bitmap(
    driver: BaseDriver,
    spec: ImageSpec,
    name: str,
    actions: Sequence[Action],
    *,
    granularity: int | None = None,
    source: ImageSpec | None = None,
    on_open: Callable[[Node], None] | None = None,
) -> None:
    """Do ``actions`` in their order to the bitmap ``name`` of an image.

    ``granularity`` is for what is added, ``source`` another image that merges take from.  Stops at
    the first that fails (ActionFailed); what was done before stays done.
    """
    # No guest data are read or written, so nobody looks into the backing files: the source may
    # well be an overlay of the image.
    node: Any = await spec.open(driver, writable=True, backing=False)
    others: list[Node] = []
    try:
        if on_open is not None:
            on_open(node)
        if source is not None:
            others.append(await source.open(driver, backing=False))
        for action in actions:
            try:
                await act(node, name, action, granularity, others[0] if others else node)
            except (OSError, DiskError) as error:
                raise ActionFailed(action.kind, name, error) from error
    except BaseException:
        await discard_disk(node)
        raise
    finally:
        await close_all(others)
    await close_disk(node)
