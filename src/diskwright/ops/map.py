"""What is where in a disk, through its whole chain."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..graph.node import Node
from ..graph.status import Status, all_status


async def map_disk(node: Node, offset: int = 0, length: int | None = None) -> AsyncIterator[Status]:
    """The parts of a range (bytes), in order, neighbours merged.

    A range with nothing in it gives one part of length 0, as qemu-img's does.
    """
    found = False
    async for part in all_status(node, offset, length):
        found = True
        yield part
    if not found:
        yield Status(offset, 0, 0, False, False, False)
