"""What is where in a disk, through its whole chain."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..graph.node import Node
from ..graph.status import Status, all_status
from ..units import SECTOR


async def map_disk(node: Node, offset: int = 0, length: int | None = None) -> AsyncIterator[Status]:
    """The parts of a range (bytes), in order, neighbours merged.

    A range with nothing in it gives one part of length 0, as qemu-img's does.
    """
    last: Status | None = None
    async for part in all_status(node, offset, length):
        # A file that ends within a sector: the sector is what its beginning is.
        if last is not None and part.length < SECTOR and part.start % SECTOR and part.zero:
            part = last._replace(length=last.length + part.length)
        elif last is not None:
            yield last
        last = part
    if last is not None:
        yield last
    else:
        yield Status(offset, 0, 0, False, False, False)
