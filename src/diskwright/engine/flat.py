"""Reading through a chain of images as if it were one: where the bytes of a window lie, found
layer by layer once and then kept."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..contract import Range
from ..extents import HOLE, ZERO, Data
from ..hints import TYPE_CHECKING
from ..ondisk import zeros
from ..units import align_down, align_up
from .kernel import Future, wait_all
from .node import Buffer, Node

if TYPE_CHECKING:
    from .engine import Engine

# Units of a window, and the windows that are kept: 4 KiB each, so at most 32 MiB for a chain.
_WINDOW_BITS = 9
_MOST_WINDOWS = 8192
_LEAST_UNIT_BITS, _MOST_UNIT_BITS = 9, 20
# An entry is a place: the number of a node in `nodes` above the offset there; or one of these.
_OFFSET_BITS = 56
_OFFSET = (1 << _OFFSET_BITS) - 1
_UNKNOWN, _ZERO, _RAGGED = range(3)
_MOST_NODES = 250


class Layer:
    """One image of a chain, as long as nobody writes to it."""

    read_scattered = None

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.backing = engine.slots.get("backing")

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer]:
        """Read what is not plain data (compressed, encrypted, ...) of this layer."""
        return await self.engine.reader.layered(offsets, lengths, into)


Place = Node | Layer
Piece = tuple[int, int, int, Place | None, int]
"""Guest offset, length, number of the range asked for, what holds the bytes (None: zeroes), and the
offset there."""


def layer_of(node: Node | None, top: bool = False) -> Layer | None:
    """``node`` as a layer that may be looked through; None for those that must be asked: who can
    write changes its map (the ``top`` one tells), who listens is to hear of every read."""
    engine: Engine | None = getattr(node, "engine", None)
    if node is None or engine is None or node.changing or not (node.read_only or top):
        return None
    if node.options.get("force-share") or any(c.wants_events for c in engine.slots.values()):
        return None
    return Layer(engine)


class Flat:
    """The windows of one node and of all below it that are only read.

    The node's own map may change by plans, each of which tells what it changed (:meth:`forget`).
    When anything else changes (a procedure runs, a layer is opened for writing or gets another
    backing file) the node drops the whole object.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.engine = layers[0].engine
        units = [layer.engine.format.unit for layer in layers]
        bits = min(unit.bit_length() - 1 if unit & unit - 1 == 0 else 0 for unit in units)
        self.bits = max(_LEAST_UNIT_BITS, min(bits, _MOST_UNIT_BITS))
        self.windows: dict[int, array[int]] = {}
        self.nodes: list[Place] = []
        self._numbers: dict[Place, int] = {}
        self._building: dict[int, Future[None]] = {}
        self._forgotten: list[Range] = []
        """What has changed while windows were being made."""

    def forget(self, ranges: Sequence[Range]) -> None:
        """The top layer's map has changed there, in whole units of its own."""
        if self._building:
            self._forgotten += ranges
        self._erase(ranges)

    def _erase(self, ranges: Sequence[Range]) -> None:
        bits, unit = self.bits, self.engine.format.unit
        for offset, length in ranges:
            first = align_down(offset, unit) >> bits
            last = (align_up(offset + length, unit) - 1) >> bits
            touched = range(first >> _WINDOW_BITS, (last >> _WINDOW_BITS) + 1)
            # A discard may be of a whole disk of many TiB, of which few windows are known.
            few = touched if len(touched) < len(self.windows) else list(self.windows)
            for index in few:
                window = self.windows.get(index)
                if window is not None and index in touched:
                    base = index << _WINDOW_BITS
                    start, stop = max(first - base, 0), min(last + 1 - base, len(window))
                    window[start:stop] = zeros(64, stop - start)

    # -- reading
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer]:
        """Read a batch in the caller's epoch; see :meth:`Node.read`."""
        bits, windows, nodes = self.bits, self.windows, self.nodes
        window_bits = bits + _WINDOW_BITS
        in_window = (1 << _WINDOW_BITS) - 1
        unit = 1 << bits
        mask = unit - 1
        hosts: list[int] = []
        numbers: list[int] = []
        for offset, length in zip(offsets, lengths, strict=True):
            window = windows.get(offset >> window_bits)
            if window is None or (offset & mask) + length > unit:
                break
            entry = window[offset >> bits & in_window]
            if entry <= _RAGGED:
                break
            hosts.append((entry & _OFFSET) + (offset & mask))
            numbers.append(entry >> _OFFSET_BITS)
        else:
            if len(set(numbers)) == 1:
                return await nodes[numbers[0]].read(hosts, lengths, into)
            return await self._fetch([nodes[n] for n in numbers], hosts, lengths, into)
        return await self._general(offsets, lengths, into)

    async def _fetch(
        self,
        places: Sequence[Place],
        hosts: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer]:
        """Read each part from its node; nodes of one kind may do all of them at a time."""
        if not places:
            return []
        if places[0].read_scattered is not None:
            found = await places[0].read_scattered(places, hosts, lengths, into)
            if found is not None:
                return found
        views = into if into is not None else [memoryview(bytearray(n)) for n in lengths]
        columns: dict[Place, list[int]] = {}
        for index, place in enumerate(places):
            columns.setdefault(place, []).append(index)
        running = [
            self.engine.driver.start(
                place.read(
                    [hosts[i] for i in chosen],
                    [lengths[i] for i in chosen],
                    [views[i] for i in chosen],
                ),
                io=True,
            )
            for place, chosen in columns.items()
        ]
        await wait_all(running)
        return views

    async def _general(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer]:
        """Windows that are not there yet, requests of several units, zeroes, ragged units."""
        ranges = list(zip(offsets, lengths, strict=True))
        self.engine.check_bounds(ranges)
        views = into if into is not None else [memoryview(bytearray(n)) for n in lengths]
        places: list[Place] = []
        hosts: list[int] = []
        parts: list[memoryview] = []
        ragged: list[tuple[int, memoryview]] = []
        for (start, length), view in zip(ranges, views, strict=True):
            done = 0
            while done < length:
                offset = start + done
                index = offset >> self.bits >> _WINDOW_BITS
                window = self.windows.get(index)
                unit = offset >> self.bits & (1 << _WINDOW_BITS) - 1
                while window is None or window[unit] == _UNKNOWN:
                    await self._need(index, unit)
                    window = self.windows.get(index)
                count, entry = self._run(window, offset, length - done)
                piece = view[done : done + count]
                done += count
                if entry == _RAGGED:
                    ragged.append((offset, piece))
                elif entry == _ZERO:
                    if into is not None:
                        piece[:] = bytes(count)
                else:
                    places.append(self.nodes[entry >> _OFFSET_BITS])
                    hosts.append((entry & _OFFSET) + (offset & (1 << self.bits) - 1))
                    parts.append(piece)
        await self._fetch(places, hosts, [len(part) for part in parts], parts)
        if ragged:
            await self._exactly(ragged)
        return views

    def _run(self, window: array[int], offset: int, most: int) -> tuple[int, int]:
        """How many bytes from ``offset``, at most ``most``, continue each other in its window, and
        the entry of the first."""
        unit = 1 << self.bits
        index = offset >> self.bits & (1 << _WINDOW_BITS) - 1
        first = entry = window[index]
        step = unit if first > _RAGGED else 0
        count = unit - (offset & (unit - 1))
        while count < most and index + 1 < len(window) and window[index + 1] == entry + step:
            index += 1
            entry += step
            count += unit
        return min(count, most), first

    # -- finding out
    async def _need(self, index: int, unit: int) -> None:
        """Make a window, or what is not known of it from ``unit`` on, once for all that ask."""
        running = self._building.get(index)
        if running is None:
            running = self.engine.driver.spawn(self._build(index, unit), name="flat")
            self._building[index] = running
        await running

    async def _build(self, index: int, unit: int) -> None:
        first, last = 0, 1 << _WINDOW_BITS
        window = self.windows.get(index)
        if window is not None:
            first = last = unit
            while last < len(window) and window[last] == _UNKNOWN:
                last += 1
        try:
            found = await self._resolve((index << _WINDOW_BITS) + first, last - first)
            window = self.windows.get(index)
            if window is None:
                while len(self.windows) >= _MOST_WINDOWS:
                    del self.windows[next(iter(self.windows))]
                window = self.windows[index] = zeros(64, 1 << _WINDOW_BITS)
            window[first:last] = found
            self._erase(self._forgotten)
        finally:
            del self._building[index]
            if not self._building:
                self._forgotten = []

    async def _resolve(self, first: int, count: int) -> array[int]:
        """The entries of ``count`` units from the unit ``first`` of the disk."""
        window = zeros(64, count)
        start = first << self.bits
        end = min(start + (count << self.bits), self.engine.format.size)
        for offset, length, _, place, host in await self._walk([(start, end - start, 0)]):
            self._fill(window, offset - start, length, end - start, place, host)
        return window

    async def _exactly(self, ragged: list[tuple[int, memoryview]]) -> None:
        """Fill views from their offsets, whatever lies in a unit."""
        places: list[Place] = []
        hosts: list[int] = []
        parts: list[memoryview] = []
        wanted = [(start, len(view), i) for i, (start, view) in enumerate(ragged)]
        for offset, length, number, place, host in await self._walk(wanted):
            start, view = ragged[number]
            piece = view[offset - start : offset - start + length]
            if place is None:
                piece[:] = bytes(length)
            else:
                places.append(place)
                hosts.append(host)
                parts.append(piece)
        await self._fetch(places, hosts, [len(part) for part in parts], parts)

    async def _walk(self, todo: list[tuple[int, int, int]]) -> list[Piece]:
        """Where the bytes of ranges (offset, length, number of the range) are: each layer is asked
        for what those above have not."""
        found: list[Piece] = []
        for layer in self.layers:
            holes: list[tuple[int, int, int]] = []
            below = 0 if layer.backing is None else layer.backing.size
            extents = iter(await layer.engine.map_ranges([(o, n) for o, n, _ in todo]))
            for start, count, number in todo:
                offset = start
                while offset < start + count:
                    extent = next(extents)
                    length = extent.length
                    if extent.kind == HOLE and (covered := min(max(below - offset, 0), length)):
                        holes.append((offset, covered, number))
                        offset += covered
                        length -= covered
                    if not length:
                        continue
                    if extent.kind in (HOLE, ZERO):
                        found.append((offset, length, number, None, 0))
                    elif isinstance(extent, Data) and not extent.xform:
                        child = layer.engine.slots[extent.slot]
                        found.append((offset, length, number, child, extent.host))
                    else:
                        found.append((offset, length, number, layer, offset))
                    offset += length
            todo = holes
            if not todo:
                break
        last = self.layers[-1].backing
        # What is below the layers is asked itself, whatever it is.
        found += [(offset, length, number, last, offset) for offset, length, number in todo]
        return found

    def _fill(
        self, window: array[int], at: int, length: int, end: int, place: Place | None, host: int
    ) -> None:
        """[at, at + length) of a window are at ``host`` of ``place``, or zeroes without one.  Units
        that are not covered as a whole are ragged, but for the last one of the disk."""
        bits = self.bits
        unit = 1 << bits
        stop = at + length
        first, last = -(-at >> bits), (stop if stop < end else stop + unit - 1) >> bits
        for edge in {at >> bits, stop - 1 >> bits}:
            if not first <= edge < last:
                window[edge] = _RAGGED
        if first >= last:
            return
        begin = host + (first << bits) - at
        number = 0 if place is None else self._number(place)
        if place is None:
            entries: array[int] = array("Q", [_ZERO]) * (last - first)
        elif number < 0 or begin + ((last - first) << bits) > _OFFSET:
            entries = array("Q", [_RAGGED]) * (last - first)
        else:
            base = number << _OFFSET_BITS | begin
            entries = array("Q", range(base, base + ((last - first) << bits), unit))
        window[first:last] = entries

    def _number(self, node: Place) -> int:
        """The node's number; -1 when there are too many.  0 would make an entry of a small offset
        look like one of the special ones."""
        number = self._numbers.get(node, 0)
        if not number:
            if len(self.nodes) >= _MOST_NODES:
                return -1
            if not self.nodes:
                self.nodes.append(node)
            number = self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return number


def flat_of(node: Node) -> Flat | None:
    """The windows for ``node``; None where there is no chain to look through."""
    layers: list[Layer] = []
    layer = layer_of(node, top=True)
    while layer is not None:
        layers.append(layer)
        layer = layer_of(layer.backing)
    if not layers or layers[0].backing is None:
        return None
    return Flat(layers)


