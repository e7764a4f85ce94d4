"""Writing compressed units: packed in the pool, stored in the order in which they were asked."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from ..abilities import Codec
from ..contract import WRITE, WRITE_PACKED
from ..hints import TYPE_CHECKING
from .kernel import Future, wait_all
from .node import Buffer
from .spans import Overlay, merge_spans

if TYPE_CHECKING:
    from .engine import Engine

# What one job of the pool packs, about.
JOB = 1 << 20

Units = dict[int, memoryview]


class Packer:
    """The compressed writes of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._last: Future[None] | None = None
        """Set when the newest write has been stored."""

    async def write(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        """Store whole units; what does not become smaller is written as it is.

        Raises OSError: ENOTSUP where the format has no compressed data, EINVAL for what are not
        whole units, EIO for a unit that is stored already.
        """
        engine = self.engine
        codec: Codec | None = getattr(engine.format, "pack_codec", None)
        if codec is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        units = self._units(offsets, buffers)
        if not units:
            return
        ahead, turn = self._last, Future[None]()
        self._last = turn
        try:
            packed = await self._pack(codec, units)
            if ahead is not None:
                await ahead
            await self._store(units, packed)
        finally:
            turn.set()

    def _units(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> Units:
        """Views of the units by their offset; of those that come twice the later ones."""
        unit, size = self.engine.format.unit, self.engine.format.size
        self.engine.check_bounds((o, len(b)) for o, b in zip(offsets, buffers, strict=True))
        units: Units = {}
        for offset, buffer in zip(offsets, buffers, strict=True):
            length = len(buffer)
            if offset % unit or (length % unit and offset + length < size):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            view = memoryview(buffer).cast("B")
            for at in range(0, length, unit):
                units[offset + at] = view[at : at + unit]
        return units

    async def _pack(self, codec: Codec, units: Units) -> dict[int, bytes]:
        """The packed units that became smaller."""
        unit = self.engine.format.unit
        views = list(units.values())
        each = max(JOB // unit, 1)
        jobs = [
            self.engine.driver.call(_pack_units, codec, views[i : i + each], unit)
            for i in range(0, len(views), each)
        ]
        await wait_all(jobs)
        out = [packed for job in jobs for packed in await job]
        return {at: data for at, data in zip(units, out, strict=True) if len(data) < unit}

    async def _store(self, units: Units, packed: dict[int, bytes]) -> None:
        engine = self.engine
        engine.check_failed()
        engine.writeback.check_room()
        unit = engine.format.unit
        spans = merge_spans([(at, at + unit) for at in units])
        plain = [(at, view) for at, view in units.items() if at not in packed]
        lease = await engine.leases.take(spans, exclusive=True)
        try:
            epoch = [engine.epochs.enter()]
            try:
                ranges = [(at, len(data)) for at, data in packed.items()]
                if ranges and not await engine.allocator.plan_and_move(
                    ranges, WRITE_PACKED, None, epoch, packed=packed
                ):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                if plain:
                    overlay = Overlay([at for at, _ in plain], [view for _, view in plain])
                    await engine.allocator.plan_and_move(overlay.ranges(), WRITE, overlay, epoch)
            finally:
                if engine.bitmaps.active:
                    engine.bitmaps.mark(spans)
                if epoch:
                    engine.epochs.leave(epoch[0])
        finally:
            engine.leases.drop(lease)
        engine.allocator.press()


def _pack_units(codec: Codec, views: Sequence[memoryview], unit: int) -> list[bytes]:
    """Runs in the pool.  A short unit is filled up with zeroes."""
    return [
        codec.pack(view if len(view) == unit else bytes(view).ljust(unit, b"\0")) for view in views
    ]
