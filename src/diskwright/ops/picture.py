"""How the space of a disk is used, layer by layer, in as many columns as a picture has room for.

The map of the disk and that of each layer are gone through once, and what is kept are sums: a disk
of any size and fragmentation needs the memory of its columns.
"""

from __future__ import annotations

from typing import Any

from ..graph.display import display_name
from ..graph.graph import chain
from ..graph.node import Node
from ..graph.status import Status, all_status
from ..records import NamedTuple
from ..units import SECTOR

STATES = ("data", "compressed", "zero", "unallocated", "beyond")
"""``zero``: stored as zeroes; ``unallocated``: the layer below is asked; ``beyond``: behind the end
of this layer."""
DATA, COMPRESSED, ZERO, UNALLOCATED, BEYOND = range(len(STATES))


class Strip(NamedTuple):
    """One layer, the file ``name`` of ``size`` bytes.  Of each column ``columns`` has the bytes in
    each of the ``STATES``, ``served`` those that this layer gives when the disk is read."""

    name: str
    format: str
    size: int
    columns: tuple[tuple[int, ...], ...]
    served: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes in each of the ``STATES``."""
        return tuple(map(sum, zip(*self.columns, strict=True))) or (0,) * len(STATES)


class Picture(NamedTuple):
    """The ``length`` bytes of a disk from ``start``: its ``layers``, the topmost first."""

    name: str
    start: int
    length: int
    layers: tuple[Strip, ...]

    @property
    def columns(self) -> int:
        """How many there are."""
        return len(self.layers[0].columns)

    def to_dict(self) -> dict[str, Any]:
        """All of it; the columns as lists of bytes in the order of ``states``."""
        return {
            "filename": self.name,
            "start": self.start,
            "length": self.length,
            "states": list(STATES),
            "layers": [
                {
                    "filename": layer.name,
                    "format": layer.format,
                    "virtual-size": layer.size,
                    "columns": [list(column) for column in layer.columns],
                    "served": list(layer.served),
                }
                for layer in self.layers
            ],
        }

    def svg(self) -> str:
        """A drawing of it, complete in itself."""
        from .svg import draw

        return draw(self)

    def _repr_svg_(self) -> str:
        """What a notebook shows."""
        return self.svg()


async def picture(
    node: Node, columns: int = 512, start: int = 0, length: int | None = None
) -> Picture:
    """A picture of a range (bytes; None: to the end) of an open disk, in at most ``columns``."""
    start = min(start, node.size)
    end = node.size if length is None else min(node.size, start + length)
    count = max(1, min(columns, -(-(end - start) // SECTOR)))
    layers = list(chain(node))
    served = [_Columns(start, end, count, 1) for _ in layers]
    if len(layers) > 1:
        async for part in all_status(layers[0], start, end - start):
            if part.present:
                served[part.depth].add(part.start, part.length, 0)
    strips = []
    for layer, given in zip(layers, served, strict=True):
        sums = _Columns(start, end, count, len(STATES))
        inside = min(max(layer.size, start), end)
        below = layer.child("backing")
        async for part in all_status(layer, start, inside - start, base=below):
            sums.add(part.start, part.length, _state(part))
            if part.present and len(layers) == 1:
                given.add(part.start, part.length, 0)
        sums.add(inside, end - inside, BEYOND)
        name, shares = display_name(layer), tuple(zip(*sums.sums, strict=True))
        strips.append(
            Strip(name, layer.driver_name, layer.size, shares, tuple(given.sums[0]))
        )
    return Picture(display_name(node), start, end - start, tuple(strips))


def _state(part: Status) -> int:
    if part.compressed:
        return COMPRESSED
    if part.data and not part.zero:
        return DATA
    return ZERO if part.present else UNALLOCATED


class _Columns:
    """Bytes of ``kinds`` kinds in each of ``count`` parts of a range."""

    def __init__(self, start: int, end: int, count: int, kinds: int) -> None:
        self.start, self.length, self.count = start, end - start, count
        self.sums = [[0] * count for _ in range(kinds)]

    def add(self, start: int, length: int, kind: int) -> None:
        sums, count, whole = self.sums[kind], self.count, self.length
        at, end = start - self.start, start - self.start + length
        while at < end:
            # The column whose last byte is not before this one.
            column = ((at + 1) * count - 1) // whole
            stop = min(end, whole * (column + 1) // count)
            sums[column] += stop - at
            at = stop


__all__ = ["STATES", "Picture", "Strip", "picture"]
