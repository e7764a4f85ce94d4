"""What the ranges of a disk are, told through the whole graph: formats, backing files, protocols.

The answers are those of ``qemu-img map`` (measured with 10.0): which layer holds a range, whether
it reads as zeroes, and where its bytes are in that layer's file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..extents import DATA, HOLE, OPAQUE, PACKED, Data, Extent, Opaque, Zero
from ..records import NamedTuple
from .graph import Graph, leaf_of, primary
from .mapped import MappedNode
from .node import Node
from .registry import kind

WINDOW_UNITS = 16384
"""Allocation units that are asked of a format at once: bounds the work of one call."""

MAX_WINDOW = 1 << 40

_MANY = 1024
"""Extents of a leaf that are told at once, about."""
_STEP = 64 << 20


class Status(NamedTuple):
    """``length`` bytes from ``start`` of the disk.

    ``depth``: which layer of the backing chain says so (0 is the disk itself; where no layer
    holds the range, the deepest that is long enough).  ``present``: that layer holds it (also as
    zeroes).  ``zero``: it reads as zeroes.  ``data``: bytes are stored for it.  ``offset``: where
    they are in ``node``'s bytes; -1 where there is no such place.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool = False
    offset: int = -1
    node: Node | None = None

    def follows(self, last: Status, length: int) -> bool:
        """True when this continues the ``length`` bytes that ``last`` tells of: same in all
        respects, and next to them."""
        return (
            last.start + length == self.start
            and self[2:7] == last[2:7]
            and self.node is last.node
            and (self.offset == last.offset + length if self.offset >= 0 else last.offset < 0)
        )

    def part(self, start: int, end: int) -> Status:
        """What of this lies in ``start`` ... ``end``."""
        if start <= self.start and self.start + self.length <= end:
            return self
        first, last = max(self.start, start), min(self.start + self.length, end)
        offset = self.offset + (first - self.start) if self.offset >= 0 else -1
        return self._replace(start=first, length=last - first, offset=offset)


def joined(parts: list[Status]) -> list[Status]:
    """``parts`` with neighbours that continue each other made one."""
    out: list[Status] = []
    last: Status | None = None
    length = 0  # of `last` and what follows it
    for part in parts:
        if last is not None and part.follows(last, length):
            length += part.length
            continue
        if last is not None:
            out.append(last if last.length == length else last._replace(length=length))
        last, length = part, part.length
    if last is not None:
        out.append(last if last.length == length else last._replace(length=length))
    return out


async def block_status(
    node: Node, offset: int, length: int, *, base: Node | None = None, least_hole: int = 0
) -> list[Status]:
    """The status of a range from ``offset`` (bytes), at least its beginning.

    The answer covers a prefix of the range (more than nothing): ask again behind it.  Layers from
    ``base`` downwards are left out; what only they hold is neither present, zero nor data.
    Neighbours are merged.  Holes of a file between its data may be told as data when they are
    not twice as long as ``least_hole``: who reads anyway sooner reads them than knows of each.
    """
    node = node.real
    length = min(length, node.size - offset)
    if length <= 0:
        return []
    found: list[Status] = []
    layer: Node | None = node
    depth = 0
    # Ranges of this layer that are still to be told, in order.
    asked = [(offset, min(length, _window(node)))]
    stop = asked[0][0] + asked[0][1]
    while asked and layer is not None:
        below = layer.child("backing")
        last = below is None or below is base
        # The lower layer's units may be smaller: its bound cuts the answer short.
        stop = min(stop, asked[0][0] + _window(layer))
        left: list[tuple[int, int]] = []
        for start, count in asked:
            count = min(count, stop - start)
            if count <= 0:
                break
            end = start
            for part in await _layer(layer, start, count, depth, least_hole):
                end += part.length
                told = part.present or part.data or part.zero or part.node is not None
                if told or below is base is not None:
                    found.append(part)
                    continue
                inside = 0 if below is None else max(0, min(part.length, below.size - part.start))
                if inside:
                    left.append((part.start, inside))
                if inside < part.length:
                    tail = part.part(part.start + inside, part.start + part.length)
                    found.append(tail._replace(zero=True))
            if end < start + count:
                stop = end
        asked, layer = left, None if last else below
        depth += 1
    found = [part.part(offset, stop) for part in found if part.start < stop]
    found.sort(key=lambda part: part.start)
    return joined(found)


async def all_status(
    node: Node, offset: int = 0, length: int | None = None, *, base: Node | None = None
) -> AsyncIterator[Status]:
    """The whole range, merged over the bounds of single answers."""
    end = node.size if length is None else min(node.size, offset + length)
    last: Status | None = None
    while offset < end:
        for part in await block_status(node, offset, end - offset, base=base):
            if last is not None and part.follows(last, last.length):
                last = last._replace(length=last.length + part.length)
            else:
                if last is not None:
                    yield last
                last = part
            offset = part.start + part.length
    if last is not None:
        yield last


async def allocated_above(
    node: Node, base: Node | None, offset: int, length: int
) -> list[tuple[int, int, bool]]:
    """``(start, length, allocated)`` for a prefix of a range: whether any layer from ``node`` down
    to, not including, ``base`` holds it (as data or as zeroes).  Neighbours are merged."""
    out: list[tuple[int, int, bool]] = []
    for part in await block_status(node, offset, length, base=base):
        if out and out[-1][2] == part.present:
            out[-1] = (out[-1][0], out[-1][1] + part.length, part.present)
        else:
            out.append((part.start, part.length, part.present))
    return out


async def is_allocated_above(
    node: Node, base: Node | None, offset: int, length: int
) -> tuple[bool, int]:
    """Whether a layer above ``base`` holds the byte at ``offset``, and for how many bytes that
    answer holds."""
    found = await allocated_above(node, base, offset, length)
    return (found[0][2], found[0][1]) if found else (False, 0)


def _window(node: Node) -> int:
    """How much of ``node`` is asked at once."""
    while node.driver_name == "raw" or kind(node.driver_name) == "filter":
        below = primary(node)
        if below is None:
            return MAX_WINDOW
        node = below
    unit: int = getattr(getattr(node, "format", None), "unit", 0)
    return min(unit * WINDOW_UNITS, MAX_WINDOW) if unit > 1 else MAX_WINDOW


async def _layer(node: Node, start: int, length: int, depth: int, least_hole: int) -> list[Status]:
    """What one layer says, without its backing file; a range that it does not hold is neither
    present, zero nor data."""
    shift = 0
    while True:
        if kind(node.driver_name) == "filter":
            await node.extents(start + shift, length)  # it may refuse to say
        elif node.driver_name == "raw" and node.children:
            (first,) = (await node.extents(start + shift, 1))[:1]
            if not isinstance(first, Data | Opaque):
                break
            shift += first.host - (start + shift)
        else:
            break
        below = primary(node)
        if below is None:
            break
        node = below
        if node.child("backing") is not None:
            # The layers below a translation are not layers of the disk: they are its bytes.
            inner = await block_status(node, start + shift, length, least_hole=least_hole)
            return [part._replace(start=part.start - shift, depth=depth) for part in inner]
    position = start
    out: list[Status] = []
    leaf = not node.children
    sparse = not leaf and await sparse_below(node)
    plain = getattr(getattr(node, "format", None), "sparse_slots", ())
    if leaf:
        extents = await _some(node, start + shift, length, least_hole)
    else:
        extents = await node.extents(start + shift, length)
    end = start
    for extent in extents:
        length = extent.length
        end += length
        if isinstance(extent, Data | Opaque):
            deeper = sparse or (extent.kind == DATA and extent.slot in plain)
            for part in await _told(node, extent, deeper, least_hole):
                offset = position + shift if leaf and part.data and part.offset < 0 else part.offset
                out.append(part._replace(start=position, depth=depth, offset=offset))
                position += part.length
            if position < end:
                break
            continue
        kind_of = extent.kind
        if kind_of == PACKED:
            out.append(Status(position, length, depth, True, False, True, True))
        elif kind_of == HOLE:
            out.append(Status(position, length, depth, False, False, False))
        elif isinstance(extent, Zero):
            held = leaf or extent.explicit
            offset = position + shift if leaf and extent.host < 0 else extent.host
            out.append(
                Status(position, length, depth, held, True, False, offset=offset, node=node)
            )
        else:
            out.append(Status(position, length, depth, True, False, True))
        position += length
    return out


async def _some(leaf: Node, start: int, length: int, least_hole: int) -> list[Extent]:
    """The extents of a prefix of a range of a leaf: not very many, for each has its price, and who
    copies can begin with the first."""
    found: list[Extent] = []
    rough = getattr(leaf, "rough_extents", None) if least_hole else None
    end, step = start + length, _STEP
    while start < end and len(found) < _MANY:
        step = min(step, end - start)
        if rough is None:
            found += await leaf.extents(start, step)
        else:
            found += await rough(start, step, least_hole)
        start += step
        step *= 4
    return found


async def _told(
    node: Node, extent: Data | Opaque, deeper: bool, least_hole: int
) -> list[Status]:
    """One extent of a node, or its beginning, as statuses (``start`` and ``depth`` are the caller's
    to fill in)."""
    length = extent.length
    child = node.child(extent.slot)
    if extent.kind == OPAQUE and child is None:  # nobody knows
        return [Status(0, length, 0, False, False, False, node=node)]
    if extent.kind == OPAQUE and child is not None:
        inner = await block_status(child, extent.host, length, least_hole=least_hole)
        return [part._replace(depth=0) for part in inner]
    plain = extent.kind == DATA and not (isinstance(extent, Data) and extent.xform)
    whole = Status(0, length, 0, True, False, True, offset=extent.host if plain else -1,
                   node=child or node)  # fmt: skip
    if not deeper or not plain or child is None:
        return [whole]
    out = []
    done = 0
    while done < length:
        at = extent.host + done
        inner = await block_status(child, at, length - done, least_hole=least_hole)
        if not inner:  # beyond the end of the file: never written, so zeroes
            out.append(whole._replace(length=length - done, offset=extent.host + done, zero=True))
            break
        for part in inner:
            out.append(whole._replace(length=part.length, offset=part.offset, zero=part.zero))
            done += part.length
        if len(out) >= _MANY:
            break
    return out


async def sparse_below(node: Node) -> bool:
    """True when a format's file is so sparse that its data may well be holes of the file.

    qemu-img tells holes of the file under allocated clusters only for an image whose clusters in
    use exceed what the host has allocated by a tenth and by two clusters (measured), which is how
    preallocated metadata look.  For others, asking the file for each range is not worth it, but for
    slots that a format names in its ``sparse_slots`` (flat extents, large blocks) it always is.
    """
    graph: Graph | None = node.graph
    if graph is not None and node in graph.sparse:
        return graph.sparse[node]
    format = getattr(node, "format", None)
    counting = getattr(format, "referenced_clusters", None)
    leaf = leaf_of(node)
    measure = getattr(leaf, "disk_size", None)
    held: int | None = measure() if measure is not None else None
    if held is None or counting is None or not isinstance(node, MappedNode):
        return False
    unit: int = node.format.unit
    real = held // unit
    least = real + max(real // 10, 2)
    found = -(-leaf.size // unit) >= least
    if found:
        count: int = await node.run_procedure(counting(), whole_image=False)
        found = count >= least
    if graph is not None:
        graph.sparse[node] = found
    return found
