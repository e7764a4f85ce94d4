"""Writing: in place under shared leases where the map stays as it is, by a plan otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from ..contract import COMPRESSED, FUA, OP_DATA, WRITE, Step
from ..extents import Data
from ..hints import TYPE_CHECKING
from .node import Buffer
from .spans import Overlay

if TYPE_CHECKING:
    from .engine import Engine


class Writer:
    """Writes of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        """Write a batch; see :meth:`Node.write`."""
        engine = self.engine
        if flags & COMPRESSED:
            await engine.packer.write(offsets, buffers)
        elif not await self._in_place(offsets, buffers):
            overlay = Overlay(offsets, buffers)
            await self.engine.allocator.allocate(overlay.ranges(), WRITE, overlay)
        if flags & FUA:
            await engine.flush()

    # -- in place
    async def _in_place(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> bool:
        """Overwrite where nothing of the map changes; False (and nothing done) if something must.

        The upgrade to an exclusive lease releases this one, maps again and queues again.
        """
        engine = self.engine
        lengths = [len(b) for b in buffers]
        spans = [(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
        lease = engine.leases.try_take(spans, exclusive=False)
        if lease is None:
            lease = await engine.leases.take(spans, exclusive=False)
        try:
            epoch = engine.epochs.enter()
            try:
                if engine.map_one is not None:
                    if len(spans) < 4:
                        hosts: Sequence[int] = [
                            engine.map_one(o, n, True)
                            for o, n in zip(offsets, lengths, strict=True)
                        ]
                    else:
                        hosts = engine.map_batch(offsets, lengths, True)
                    if hosts and min(hosts) >= 0:
                        child = engine.slots["file"]
                        if child.wants_events:
                            await engine.announce("file", "write_aio")
                        await child.write(hosts, buffers)
                        return True
                return await self._in_place_general(offsets, buffers)
            finally:
                if engine.bitmaps.active:
                    engine.bitmaps.mark(spans)
                engine.epochs.leave(epoch)
        finally:
            engine.leases.drop(lease)

    async def _in_place_general(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> bool:
        engine = self.engine
        unit = engine.format.cipher_unit
        steps: list[Step] = []
        sources: list[Buffer] = []
        for offset, buffer in zip(offsets, buffers, strict=True):
            if offset % unit or len(buffer) % unit:
                return False
            view = memoryview(buffer).cast("B")
            position = offset
            for extent in await engine.map_range(offset, len(buffer)):
                if not (isinstance(extent, Data) and extent.writable):
                    return False
                n = extent.length
                steps.append(Step(OP_DATA, position, n, extent.slot, extent.host, extent.xform))
                sources.append(view[position - offset : position - offset + n])
                position += n
        await self.engine.allocator.put(steps, sources, "write_aio")
        return True
