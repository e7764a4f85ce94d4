"""What is where in a disk, through its whole chain."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..graph.display import display_name
from ..graph.graph import primary
from ..graph.node import Node
from ..graph.status import Status, all_status, joined
from ..hints import Any
from ..records import NamedTuple


class Extent(NamedTuple):
    """``length`` bytes of a disk from ``offset``.

    ``depth`` is the layer of the chain that says so: 0 for the image itself, 1 for its backing
    file, and so on.  ``present``: that layer holds it (as data or as zeroes).  ``data``: bytes are
    stored for it.  ``zero``: it reads as zeroes.  ``host_offset`` is where the bytes are in the
    file ``host``; None where they stand nowhere as they are (compressed, encrypted, no data).
    """

    offset: int
    length: int
    depth: int
    present: bool
    data: bool
    zero: bool
    compressed: bool
    host_offset: int | None
    host: str | None

    @classmethod
    def of(cls, part: Status, host: str | None = None) -> Extent:
        """``part`` of a disk, whose bytes are in the file ``host``."""
        at = part.offset if part.offset >= 0 else None
        return cls(
            part.start, part.length, part.depth, part.present, part.data, part.zero,
            part.compressed, at, host,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``qemu-img map --output=json``, in its order."""
        out: dict[str, Any] = {
            "start": self.offset,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.host_offset is not None:
            out["offset"] = self.host_offset
        return out


async def map_disk(node: Node, offset: int = 0, length: int | None = None) -> AsyncIterator[Status]:
    """The parts of a range (bytes), in order, neighbours merged.

    A range with nothing in it gives one part of length 0, as qemu-img's does.
    """
    found = False
    async for part in _claimed(node, offset, length):
        found = True
        yield part
    if not found:
        async for part in all_status(node, offset, length):
            found = True
            yield part
    if not found:
        yield Status(offset, 0, 0, False, False, False)


async def _claimed(node: Node, offset: int, length: int | None) -> AsyncIterator[Status]:
    """What a server says in the context that the caller chose (NBD's ``x-dirty-bitmap``)."""
    leaf = node.real
    while leaf.driver_name == "raw" and (below := primary(leaf)) and below.size == node.size:
        leaf = below
    claims = getattr(leaf, "claims", None)
    end = node.size if length is None else min(node.size, offset + length)
    while claims is not None and offset < end:
        told = await claims(offset, end - offset)
        if not told:
            return
        parts = []
        for count, data, zero in told:
            held = data or zero
            at = offset if held else -1
            parts.append(Status(offset, count, 0, held, zero, data, offset=at, node=leaf))
            offset += count
        for part in joined(parts):
            yield part


async def extents(node: Node, offset: int = 0, length: int | None = None) -> list[Extent]:
    """The same as a program is told it; a range with nothing in it is none."""
    names: dict[Node, str] = {}
    out = []
    async for part in map_disk(node, offset, length):
        if not part.length:
            break
        host = None
        if part.offset >= 0 and part.node is not None:
            host = names.get(part.node) or names.setdefault(part.node, display_name(part.node))
        out.append(Extent.of(part, host))
    return out
