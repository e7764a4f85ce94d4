"""Whether an image that was just made reads as zeroes, so that zeroes need not be written."""

from __future__ import annotations

from collections.abc import Mapping

from ..extents import Data
from ..graph.graph import leaf_of, primary
from ..graph.node import Node
from ..graph.status import all_status
from ..hints import Any
from ..units import SECTOR


async def fresh_is_zero(out: Node, options: Mapping[str, Any]) -> bool:
    """True when all of ``out``, made with the creation ``options``, reads as zeroes."""
    if await _ciphered(out):
        return False
    if leaf_of(out).driver_name in ("file", "memory"):
        return True
    # A device holds whatever it held before, where the image already refers to its bytes.
    if out.driver_name == "raw" or options.get("preallocation") not in (None, "off"):
        return False
    async for part in all_status(out):
        if not part.zero:
            return False
    return True


async def _ciphered(out: Node) -> bool:
    """Whether a cipher stands before bytes that were never written: zeroes of the file are none
    then.  It does for all of a disk, so its first sector tells."""
    node: Node | None = out
    while node is not None:
        for extent in await node.extents(0, min(node.size, SECTOR)):
            if isinstance(extent, Data) and extent.xform:
                return True
        node = primary(node)
    return False
