"""Reading: columns straight to the child where the format says so, extents otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CorruptImage
from ..extents import DATA, HOLE, INLINE, OPAQUE, PACKED, ZERO, Data, Packed
from ..hints import TYPE_CHECKING
from ..units import align_down, align_up
from .kernel import Future, wait_all
from .node import Buffer

if TYPE_CHECKING:
    from ..contract import Table
    from .engine import Engine

Views = list[memoryview]


class Gather:
    """The child reads of one batch, collected as columns per slot."""

    __slots__ = ("decode", "packed", "parts")

    def __init__(self) -> None:
        self.parts: dict[str, tuple[list[int], list[int], Views]] = {}
        self.decode: list[tuple[Data, int, memoryview]] = []
        self.packed: list[tuple[Packed, memoryview]] = []

    def add(self, slot: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` of ``slot``."""
        columns = self.parts.get(slot)
        if columns is None:
            columns = self.parts[slot] = ([], [], [])
        columns[0].append(offset)
        columns[1].append(len(view))
        columns[2].append(view)


class Reader:
    """Reads of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read a batch; see :meth:`Node.read`."""
        engine = self.engine
        while engine.gate is not None:
            await engine.gate
        epoch = engine.epochs.enter()
        try:
            return await self.inside(offsets, lengths, into)
        finally:
            engine.epochs.leave(epoch)

    async def inside(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read in the caller's epoch (and past a closed gate)."""
        if self.engine.flat is not None:
            try:
                return await self.engine.flat.read(offsets, lengths, into)
            except CorruptImage:
                pass  # perhaps of a neighbour: a window is larger than what was asked for
        return await self.layered(offsets, lengths, into)

    async def layered(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read what this layer holds, and ask its backing file for the rest."""
        engine = self.engine
        if engine.map_one is not None:
            if len(offsets) < 4:
                hosts: Sequence[int] = [
                    engine.map_one(o, n, False) for o, n in zip(offsets, lengths, strict=True)
                ]
            else:
                hosts = engine.map_batch(offsets, lengths, False)
            if hosts and min(hosts) >= 0:
                child = engine.slots["file"]
                if child.wants_events:
                    await engine.announce("file", "read_aio")
                return await child.read(hosts, lengths, into)
        return await self._general(offsets, lengths, into)

    async def _general(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer]:
        self.engine.check_bounds(zip(offsets, lengths, strict=True))
        mask = self.engine.format.cipher_unit - 1
        out: list[Buffer] = []
        views: Views = []
        starts: list[int] = []
        around: list[tuple[memoryview, memoryview]] = []
        for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            if into is not None and not (offset | length) & mask:
                views.append(into[i])
                starts.append(offset)
                continue
            start = align_down(offset, mask + 1)
            buffer = memoryview(bytearray(align_up(offset + length, mask + 1) - start))
            views.append(buffer)
            starts.append(start)
            part = buffer[offset - start : offset - start + length]
            out.append(part)
            if into is not None:
                around.append((into[i], part))
        await self.fill(starts, views, zeroed=into is None)
        for target, source in around:
            target[:] = source
        return out if into is None else into

    async def fill(self, starts: Sequence[int], views: Views, zeroed: bool) -> None:
        """Fill each view with the guest bytes from its start (aligned to the cipher's unit)."""
        engine = self.engine
        todo = [(start, view) for start, view in zip(starts, views, strict=True) if len(view)]
        pins: list[Table] = []
        running: list[Future[None]] = []
        try:
            while todo:
                gathered = Gather()
                left: list[tuple[int, memoryview]] = []
                misses = []
                for start, view in todo:
                    extents, miss = engine.map([(start, len(view))])
                    for extent in extents:
                        length = extent.length
                        self._take(gathered, extent, start, view[:length], zeroed)
                        start += length
                        view = view[length:]
                    if len(view):
                        left.append((start, view))
                        if miss is not None:
                            misses.append(miss)
                todo = left
                for slot, columns in gathered.parts.items():
                    running.append(engine.driver.start(self._read(slot, *columns), io=True))
                if gathered.decode:
                    fill = engine.transformer.fill(gathered.decode)
                    running.append(engine.driver.start(fill, io=True))
                if gathered.packed:
                    fill = engine.unpacker.fill(gathered.packed)
                    running.append(engine.driver.start(fill, io=True))
                for miss in misses:
                    await engine.need(miss, pins)
        finally:
            engine.unpin(pins)
            await wait_all(running)

    def _take(
        self, gathered: Gather, extent: object, start: int, view: memoryview, zeroed: bool
    ) -> None:
        kind = extent.kind  # type: ignore[attr-defined]
        if kind == DATA:
            assert isinstance(extent, Data)
            if extent.xform:
                gathered.decode.append((extent, start, view))
            else:
                gathered.add(extent.slot, extent.host, view)
        elif kind == HOLE:
            backing = self.engine.slots.get("backing")
            covered = 0 if backing is None else min(max(backing.size - start, 0), len(view))
            if covered:
                gathered.add("backing", start, view[:covered])
            if covered < len(view) and not zeroed:
                clear(view[covered:])
        elif kind == ZERO:
            if not zeroed:
                clear(view)
        elif kind == INLINE:
            view[:] = extent.data  # type: ignore[attr-defined]
        elif kind == OPAQUE:
            gathered.add(extent.slot, extent.host, view)  # type: ignore[attr-defined]
        elif kind == PACKED:
            assert isinstance(extent, Packed)
            gathered.packed.append((extent, view))

    async def _read(self, slot: str, offsets: list[int], lengths: list[int], views: Views) -> None:
        child = self.engine.slots[slot]
        if child.wants_events or slot == "backing":
            await self._announce(slot)
        await child.read(offsets, lengths, views)

    async def _announce(self, slot: str) -> None:
        # A read of the backing file is announced to the overlay's own file, as qcow2's users
        # of fault injection expect.
        file = self.engine.slots.get("file")
        if file is not None and file.wants_events:
            await self.engine.announce(
                "file", "read_backing_aio" if slot == "backing" else "read_aio"
            )


def clear(view: memoryview) -> None:
    """Fill with zeroes."""
    view[:] = bytes(len(view))
