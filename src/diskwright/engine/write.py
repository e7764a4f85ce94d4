"""Writing: in place under shared leases, or reserve - move - commit under exclusive ones."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contract import (
    DISCARD,
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    OP_DATA,
    OP_DISCARD,
    OP_ZERO,
    WRITE,
    WRITE_ZERO,
    ZERO_UNMAP,
    Plan,
    Range,
    Step,
    Table,
)
from ..errors import NoSpace
from ..extents import HOLE, ZERO, Data
from ..units import align_down, align_up
from .kernel import gather
from .leases import Span
from .node import Buffer
from .spans import Overlay, merge_spans

if TYPE_CHECKING:
    from .engine import Engine

# How often "no space" is met by flushing, waiting for the quarantine and planning again.
_SPACE_TRIES = 4
# Copy-on-write goes through buffers of a few clusters (bytes, buffers kept).
_STAGE = 256 << 10
_MOST_STAGES = 8


class Writer:
    """Writes, zeroes and discards of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stages: list[bytearray] = []

    # -- requests
    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        """Write a batch; see :meth:`Node.write`."""
        engine = self.engine
        if not await self._in_place(offsets, buffers):
            overlay = Overlay(offsets, buffers)
            await self._allocate(overlay.ranges(), WRITE, overlay)
        if flags & FUA:
            await engine.writeback.flush()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        """Make ranges read as zeroes: whole units by the map, ragged ends as data."""
        kind = ZERO_UNMAP if flags & MAY_UNMAP else WRITE_ZERO
        for offset, length in zip(offsets, lengths, strict=True):
            if length:
                await self._zero_one(offset, length, kind, flags)
        if flags & FUA:
            await self.engine.writeback.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        """Drop whole units; ragged ends keep their bytes (a last partial unit counts as whole)."""
        unit, size = self.engine.format.unit, self.engine.format.size
        spans = []
        for offset, length in zip(offsets, lengths, strict=True):
            start = align_up(offset, unit)
            end = offset + length if offset + length >= size else align_down(offset + length, unit)
            if start < end:
                spans.append((start, end))
        if spans:
            await self._allocate([(s, e - s) for s, e in merge_spans(spans)], DISCARD, None)

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
        await self._put(steps, sources, "write_aio")
        return True

    # -- reserve, move, commit
    async def _zero_one(self, offset: int, length: int, kind: str, flags: int) -> None:
        """Zero one range.  A ragged end whose unit holds nothing else but zeroes takes the whole
        unit; any other is written as data."""
        engine = self.engine
        unit, size = engine.format.unit, engine.format.size
        end = offset + length
        inner = (align_up(offset, unit), end if end >= size else align_down(end, unit))
        ragged: list[Span] = []
        if inner[0] > inner[1]:
            ragged.append((offset, end))
        else:  # the ends are judged each by itself, also where no whole unit is between them
            ragged += [s for s in ((offset, inner[0]), (inner[1], end)) if s[0] < s[1]]
            if inner[0] < inner[1]:
                await self._zero_units([(inner[0], inner[1] - inner[0])], kind, flags)
        for start, stop in ragged:
            await self._zero_ragged(start, stop, kind, flags)

    async def _zero_units(self, ranges: list[Range], kind: str, flags: int) -> None:
        if await self._allocate(ranges, kind, None, flags):
            return
        if flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "zeroes can only be written as data here")
        for offset, length in ranges:
            await self._write_zeroes(offset, length)

    async def _write_zeroes(self, offset: int, length: int) -> None:
        block = bytes(min(length, 1 << 20))
        while length:
            part = memoryview(block)[: min(length, len(block))]
            await self.write([offset], [part])
            offset += len(part)
            length -= len(part)

    async def _zero_ragged(self, start: int, stop: int, kind: str, flags: int) -> None:
        engine = self.engine
        unit, size = engine.format.unit, engine.format.size
        first, last = align_down(start, unit), min(align_up(stop, unit), size)
        lease = await engine.leases.take([(first, align_up(stop, unit))], exclusive=True)
        try:
            epoch = [engine.epochs.enter()]
            try:
                zero = await self.reads_zero(first, start) and await self.reads_zero(stop, last)
                if zero and await self._plan_and_move(
                    [(first, last - first)], kind, None, epoch, flags
                ):
                    return
                if flags & NO_FALLBACK:
                    raise OSError(errno.ENOTSUP, "zeroes can only be written as data here")
                overlay = Overlay([start], [bytes(stop - start)])
                await self._plan_and_move(overlay.ranges(), WRITE, overlay, epoch)
            finally:
                if epoch:
                    engine.epochs.leave(epoch[0])
        finally:
            engine.leases.drop(lease)
        self._press()

    async def reads_zero(self, start: int, stop: int) -> bool:
        """True when the maps alone, here and below, say that the range reads as zeroes."""
        if start >= stop:
            return True
        backing = self.engine.slots.get("backing")
        for extent in await self.engine.map_range(start, stop - start):
            if extent.kind == HOLE:
                if backing is not None and start < backing.size:
                    end = min(start + extent.length, backing.size)
                    if not await backing.reads_zero(start, end - start):
                        return False
            elif extent.kind != ZERO:
                return False
            start += extent.length
        return True

    async def _allocate(
        self, ranges: list[Range], kind: str, overlay: Overlay | None, flags: int = 0
    ) -> bool:
        """One batch that changes the map.  False: the format cannot store zeroes by its map."""
        if not ranges:
            return True
        engine = self.engine
        engine.check_failed()  # what can never be flushed must not pile up
        engine.check_bounds(ranges)
        unit = engine.format.unit
        spans = merge_spans([(align_down(o, unit), align_up(o + n, unit)) for o, n in ranges])
        lease = await engine.leases.take(spans, exclusive=True)
        try:
            # The epoch is entered after the lease is granted, never while waiting for one: the
            # holder may wait for this very epoch to end.
            epoch = [engine.epochs.enter()]
            try:
                done = await self._plan_and_move(ranges, kind, overlay, epoch, flags)
            finally:
                if epoch:
                    engine.epochs.leave(epoch[0])
        finally:
            engine.leases.drop(lease)
        self._press()
        return done

    async def write_leased(self, offset: int, data: bytes) -> None:
        """Write for a caller that holds the lease already (a procedure)."""
        epoch = [self.engine.epochs.enter()]
        try:
            overlay = Overlay([offset], [data])
            await self._plan_and_move(overlay.ranges(), WRITE, overlay, epoch)
        finally:
            if epoch:
                self.engine.epochs.leave(epoch[0])

    async def _plan_and_move(
        self,
        ranges: list[Range],
        kind: str,
        overlay: Overlay | None,
        epoch: list[int],
        flags: int = 0,
    ) -> bool:
        engine = self.engine
        pins: list[Table] = []
        try:
            plan = await self._plan(ranges, kind, pins, epoch)
            if plan is None:
                return kind == DISCARD
            for table in plan.pins:
                table.pins += 1
            try:
                if plan.before is not None:
                    before = plan.before
                    await engine.shared.run("before", lambda: engine.writeback.before(before))
                await self._move(plan, overlay, flags)
            except BaseException:
                engine.format.abort(plan)
                raise
            else:
                engine.format.commit(plan)
            finally:
                for table in plan.pins:
                    table.pins -= 1
        finally:
            engine.unpin(pins)
        return True

    async def _plan(
        self, ranges: list[Range], kind: str, pins: list[Table], epoch: list[int]
    ) -> Plan | None:
        """Plan; on "no space" make room: unpin, leave the epoch (keeping the lease), flush, wait
        for the quarantine, enter and plan again."""
        engine = self.engine
        for attempt in range(_SPACE_TRIES):
            try:
                return await engine.ask(lambda: engine.format.plan(ranges, kind), pins)
            except NoSpace:
                if attempt == _SPACE_TRIES - 1 or engine.failure is not None:
                    raise
                engine.unpin(pins)
                engine.epochs.leave(epoch.pop())
                try:
                    await engine.writeback.flush()
                    while not engine.epochs.idle():
                        engine.check_failed()
                        await engine.epochs.changed.wait()
                finally:
                    epoch.append(engine.epochs.enter())
        raise NoSpace

    async def _move(self, plan: Plan, overlay: Overlay | None, flags: int) -> None:
        """Carry out the steps: zero and discard host ranges, write data (filled up by a read)."""
        engine = self.engine
        data = [step for step in plan.steps if step.op == OP_DATA]
        if len(data) < len(plan.steps):
            for step in plan.steps:
                child = engine.slots[step.slot]
                if step.op == OP_ZERO:
                    await child.zero([step.host], [step.length], flags & ~FUA)
                elif step.op == OP_DISCARD:
                    try:
                        await child.discard([step.host], [step.length])
                    except OSError as error:
                        if error.errno != errno.ENOTSUP:
                            raise
        if not data:
            return
        assert overlay is not None
        whole: list[Step] = []
        sources: list[Buffer] = []
        partial: list[Step] = []
        for step in data:
            source = overlay.whole(step)
            if source is None:
                partial.append(step)
            else:
                whole.append(step)
                sources.append(source)
        if whole:
            await self._put(whole, sources, "write_aio")
        first = 0
        while first < len(partial):
            last, size = first + 1, partial[first].length
            while last < len(partial) and size + partial[last].length <= _STAGE:
                size += partial[last].length
                last += 1
            await self._put_staged(partial[first:last], overlay, size)
            first = last

    async def _put_staged(self, steps: Sequence[Step], overlay: Overlay, size: int) -> None:
        """Write steps that the request covers in part: the rest is read under the lease.

        The buffers are used again, because fresh memory costs more than the copy itself.
        """
        stage = (
            self._stages.pop() if self._stages and size <= _STAGE else bytearray(max(size, _STAGE))
        )
        try:
            view = memoryview(stage)
            holes: list[tuple[int, memoryview]] = []
            sources: list[Buffer] = []
            at = 0
            for step in steps:
                target = view[at : at + step.length]
                overlay.compose(step.guest, target, holes)
                sources.append(target)
                at += step.length
            if holes:
                for slot in {step.slot for step in steps}:
                    if self.engine.slots[slot].wants_events:
                        await self.engine.announce(slot, "cow_read")
                await self.engine.reader.inside(
                    [h[0] for h in holes], [len(h[1]) for h in holes], [h[1] for h in holes]
                )
            # One write carries both the request and what was copied around it.
            tags = ("write_aio", "cow_write") if holes else ("write_aio",)
            await self._put(steps, sources, *tags)
        finally:
            if len(stage) == _STAGE and len(self._stages) < _MOST_STAGES:
                self._stages.append(stage)

    async def _put(self, steps: Sequence[Step], sources: Sequence[Buffer], *tags: str) -> None:
        """Write ``sources`` to the hosts of ``steps``, encoded, one column batch per slot."""
        engine = self.engine
        parts: dict[str, tuple[list[int], list[Buffer]]] = {}
        for step, source in zip(steps, sources, strict=True):
            columns = parts.get(step.slot)
            if columns is None:
                columns = parts[step.slot] = ([], [])
            for transform in step.xform:
                source = transform.encode(step.guest, step.host, source)
            columns[0].append(step.host)
            columns[1].append(source)
        for slot in parts:
            if engine.slots[slot].wants_events:
                for tag in tags:
                    await engine.announce(slot, tag)
        if len(parts) == 1:
            ((slot, columns),) = parts.items()
            await engine.slots[slot].write(*columns)
        else:
            await gather(engine.driver, [engine.slots[s].write(*c) for s, c in parts.items()])

    def _press(self) -> None:
        """Dirty tables and quarantine have budgets: reaching one starts a write-back."""
        engine = self.engine
        if engine.failure is not None or engine.writeback.running():
            return
        if engine.view.dirty_weight > engine.tables.budget // 2:
            _ = engine.writeback.kick()
