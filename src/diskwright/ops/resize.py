"""Changing the size of a disk."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..graph.graph import primary
from ..graph.node import Node
from ..graph.opener import close_disk
from ..graph.registry import kind
from ..hints import Any
from .images import ImageSpec

PREALLOCATIONS = ("off", "metadata", "falloc", "full")


class WouldShrink(DiskError):
    """A smaller size was asked for without saying that data may be lost."""


async def resize(
    driver: BaseDriver,
    spec: ImageSpec,
    size: int,
    *,
    relative: int = 0,
    preallocation: str = "off",
    shrink: bool = False,
    on_open: Callable[[Node], None] | None = None,
) -> int:
    """Set the virtual size to ``size`` bytes (``relative`` 1 or -1: by so many more or fewer).

    Returns the new size; new space reads as zeroes.  Raises WouldShrink without ``shrink``,
    UsageError, NotSupported, and what writing raises.
    """
    node: Any = await spec.open(driver, writable=True, resize=True)
    try:
        if on_open is not None:
            on_open(node)
        old: int = node.size
        new = old + relative * size if relative else size
        if not 0 < new < 1 << 63:
            raise UsageError("New image size must be positive")
        if new <= old and preallocation != "off":
            raise UsageError("Preallocation can only be used for growing images")
        if new < old and not shrink:
            raise WouldShrink("Use the --shrink option to perform a shrink operation.")
        below = node
        while kind(below.driver_name) == "filter":
            below = primary(below)
        if getattr(getattr(below, "format", None), "resize", None) is None:
            raise NotSupported("Image format driver does not support resize")
        await node.truncate(new, preallocation)
        final: int = node.size
    except BaseException:
        await _quietly(node)
        raise
    await close_disk(node)
    return final


async def _quietly(node: Node) -> None:
    from ..graph.closing import discard_disk

    await discard_disk(node)
