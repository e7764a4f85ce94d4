"""What changes the map: reserve, move the data, commit, under an exclusive lease."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence

from ..bitmaps import spans_of
from ..contract import (
    DISCARD,
    FUA,
    OP_DATA,
    OP_DISCARD,
    OP_PACKED,
    OP_PUNCH,
    OP_ZERO,
    WRITE,
    Plan,
    Range,
    Step,
    Table,
)
from ..errors import NoSpace
from ..hints import TYPE_CHECKING
from ..units import align_down, align_up
from .buffers import page_buffer
from .kernel import gather
from .node import Buffer
from .spans import Overlay, merge_spans

if TYPE_CHECKING:
    from .engine import Engine

# How often "no space" is met by flushing, waiting for the quarantine and planning again.
_SPACE_TRIES = 4
# Copy-on-write goes through buffers of a few clusters (bytes, buffers kept).
_STAGE = 256 << 10
_MOST_STAGES = 8


def pieces(step: Step) -> list[Step]:
    """``step`` in parts of at most a stage: a unit may be far longer than a buffer should be."""
    if step.length <= _STAGE:
        return [step]
    return [
        step._replace(
            guest=step.guest + at, host=step.host + at, length=min(_STAGE, step.length - at)
        )
        for at in range(0, step.length, _STAGE)
    ]


class Allocator:
    """Batches of one engine that need a plan of the format."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._stages: list[memoryview] = []

    async def allocate(
        self, ranges: list[Range], kind: str, overlay: Overlay | None, flags: int = 0
    ) -> bool:
        """One batch that changes the map.  False: the format cannot store zeroes by its map."""
        if not ranges:
            return True
        engine = self.engine
        engine.check_failed()  # what can never be flushed must not pile up
        engine.writeback.check_room()
        engine.check_bounds(ranges)
        unit = engine.format.unit
        spans = merge_spans([(align_down(o, unit), align_up(o + n, unit)) for o, n in ranges])
        lease = await engine.leases.take(spans, exclusive=True)
        try:
            # The epoch is entered after the lease is granted, never while waiting for one: the
            # holder may wait for this very epoch to end.
            epoch = [engine.epochs.enter()]
            try:
                done = await self.plan_and_move(ranges, kind, overlay, epoch, flags)
            finally:
                if engine.bitmaps.active:
                    engine.bitmaps.mark(spans_of(ranges))
                if epoch:
                    engine.epochs.leave(epoch[0])
        finally:
            engine.leases.drop(lease)
        self.press()
        return done

    async def write_leased(self, offset: int, data: bytes) -> None:
        """Write for a caller that holds the lease already (a procedure)."""
        epoch = [self.engine.epochs.enter()]
        try:
            overlay = Overlay([offset], [data])
            await self.plan_and_move(overlay.ranges(), WRITE, overlay, epoch)
        finally:
            if epoch:
                self.engine.epochs.leave(epoch[0])

    async def plan_and_move(
        self,
        ranges: list[Range],
        kind: str,
        overlay: Overlay | None,
        epoch: list[int],
        flags: int = 0,
        packed: Mapping[int, bytes] | None = None,
    ) -> bool:
        """``packed``: the compressed units by their offset, for WRITE_PACKED."""
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
                if packed:
                    await self._put_packed(plan.steps, packed)
                else:
                    await self._move(plan, overlay, flags)
            except BaseException:
                engine.format.abort(plan)
                raise
            else:
                engine.format.commit(plan)
                if engine.flat is not None:
                    engine.flat.forget(ranges)
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
                elif step.op == OP_PUNCH:
                    await engine.epochs.zero_cheaply(step.slot, [step.host], [step.length])
                elif step.op == OP_DISCARD:
                    try:
                        await child.discard([step.host], [step.length])
                    except OSError as error:
                        if error.errno != errno.ENOTSUP:
                            raise
        if not data:
            return
        for slot in {step.slot for step in data}:
            if engine.slots[slot].wants_events:
                await engine.announce(slot, "cluster_alloc")
        assert overlay is not None
        whole: list[Step] = []
        sources: list[Buffer] = []
        partial: list[Step] = []
        for step in data:
            source = overlay.whole(step)
            if source is not None:
                whole.append(step)
                sources.append(source)
                continue
            for piece in pieces(step):
                source = overlay.whole(piece)
                if source is None:
                    partial.append(piece)
                else:
                    whole.append(piece)
                    sources.append(source)
        if whole:
            await self.put(whole, sources, "write_aio")
        first = 0
        while first < len(partial):
            last, size = first + 1, partial[first].length
            while last < len(partial) and size + partial[last].length <= _STAGE:
                size += partial[last].length
                last += 1
            await self._put_staged(partial[first:last], overlay)
            first = last

    async def _put_packed(self, steps: Sequence[Step], packed: Mapping[int, bytes]) -> None:
        """Write compressed units; those that follow each other go as one."""
        hosts: list[Step] = []
        sources: list[list[bytes]] = []
        for step in steps:
            assert step.op == OP_PACKED
            last = hosts[-1] if hosts else None
            if last and last.slot == step.slot and last.host + last.length == step.host:
                hosts[-1] = last._replace(length=last.length + step.length)
            else:
                hosts.append(step)
                sources.append([])
            sources[-1].append(packed[step.guest])
        await self.put(hosts, [b"".join(parts) for parts in sources], "write_compressed")

    async def _put_staged(self, steps: Sequence[Step], overlay: Overlay) -> None:
        """Write steps, a stage of them at most, that the request covers in part: the rest is read
        under the lease.

        The buffers are used again, because fresh memory costs more than the copy itself.
        """
        view = self._stages.pop() if self._stages else page_buffer(_STAGE)
        try:
            holes: list[tuple[int, memoryview]] = []
            sources: list[memoryview] = []
            at = 0
            for step in steps:
                target = view[at : at + step.length]
                holes += overlay.holes(step.guest, target)
                sources.append(target)
                at += step.length
            holes = self._inside(holes)
            if holes:
                for slot in {step.slot for step in steps}:
                    if self.engine.slots[slot].wants_events:
                        await self.engine.announce(slot, "cow_read")
                await self.engine.reader.inside(
                    [h[0] for h in holes], [len(h[1]) for h in holes], [h[1] for h in holes]
                )
            for step, target in zip(steps, sources, strict=True):
                overlay.lay(step.guest, target)
            # One write carries both the request and what was copied around it.
            tags = ("write_aio", "cow_write") if holes else ("write_aio",)
            await self.put(steps, sources, *tags)
        finally:
            if len(self._stages) < _MOST_STAGES:
                self._stages.append(view)

    def _inside(self, holes: list[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """What of ``holes`` is on the disk; behind its end a step is filled with zeroes."""
        size = self.engine.format.size
        out = []
        for guest, view in holes:
            inside = min(max(size - guest, 0), len(view))
            if inside < len(view):
                view[inside:] = bytes(len(view) - inside)
            if inside:
                out.append((guest, view[:inside]))
        return out

    async def put(self, steps: Sequence[Step], sources: Sequence[Buffer], *tags: str) -> None:
        """Write ``sources`` to the hosts of ``steps``, encoded, one column batch per slot."""
        engine = self.engine
        rooms: list[memoryview] = []
        if any(step.xform for step in steps):
            steps, sources, rooms = await engine.transformer.encoded(steps, sources)
        parts: dict[str, tuple[list[int], list[Buffer]]] = {}
        for step, source in zip(steps, sources, strict=True):
            columns = parts.get(step.slot)
            if columns is None:
                columns = parts[step.slot] = ([], [])
            columns[0].append(step.host)
            columns[1].append(source)
        for slot in parts:
            if engine.slots[slot].wants_events:
                for tag in tags:
                    await engine.announce(slot, tag)
        try:
            await gather(engine.driver, [engine.slots[s].write(*c) for s, c in parts.items()])
        finally:
            if rooms:
                engine.transformer.give_back(rooms)

    def press(self) -> None:
        """Dirty tables and quarantine have budgets: reaching one starts a write-back."""
        engine = self.engine
        if engine.failure is not None or engine.writeback.running():
            return
        if engine.view.dirty_weight > engine.tables.budget // 2:
            _ = engine.writeback.kick()
