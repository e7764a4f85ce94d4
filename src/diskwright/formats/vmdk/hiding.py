"""What grows over a parent must not show it: the new end of a disk becomes zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...contract import (
    ZERO_UNMAP,
    Barrier,
    GuestWrite,
    Length,
    NeedMeta,
    Plan,
    Procedure,
    Progress,
    Punch,
    Range,
    Read,
    Table,
    Write,
)
from ...units import align_up

if TYPE_CHECKING:
    from .format import Vmdk

_ZEROES = 1 << 20
_TURN = 1 << 30


def hide_parent(image: Vmdk, old: int) -> Procedure:
    """What lies behind the old end must not show the parent, which may be longer."""
    end = min(image.size, (yield Length("backing")))
    if old >= end:
        return
    unit = max(part.unit for part in image.parts)
    first = min(align_up(old, unit), end)
    for start in range(old, first, _ZEROES):
        yield GuestWrite(start, bytes(min(_ZEROES, first - start)))
    while first < end:
        stop = min(first + max(_TURN, unit), align_up(end, unit), image.size)
        pins: list[Table] = []
        plan = yield from _ask(image, (first, stop - first), pins)
        if plan is None:
            for start in range(first, stop, _ZEROES):
                yield GuestWrite(start, bytes(min(_ZEROES, stop - start)))
                yield Progress(start - old, end - old)
        else:
            yield from _carry_out(image, plan)
        _unpin(pins)
        first = stop
        yield Progress(min(first, end) - old, end - old)
    yield from _flush(image)


def _flush(image: Vmdk) -> Procedure:
    """Write back until nothing is dirty and all that was freed is punched."""
    while True:
        groups = image.freeze()
        if groups.lead:
            yield Write(groups.lead)
        yield Barrier()
        for group in groups.groups:
            yield Write(group)
            yield Barrier()
        freed = image.settle(groups.token)
        if freed:
            zeroed = yield Punch(freed)
            image.release(freed, zeroed)
        if not image.tables.dirty() and not freed:
            return


def _ask(image: Vmdk, zeroes: Range, pins: list[Table]) -> Procedure:
    """The plan for ``zeroes``, None where they can be stored only as data."""
    while True:
        answer = image.plan([zeroes], ZERO_UNMAP)
        if not isinstance(answer, NeedMeta):
            return answer
        raws = yield Read(answer.slot, answer.ranges, answer.tag)
        for (offset, _), raw in zip(answer.ranges, raws, strict=True):
            if image.tables.get(answer.slot, offset) is None:
                image.load(answer.slot, offset, raw)
            table = image.tables.get(answer.slot, offset)
            assert table is not None
            table.pins += 1
            pins.append(table)


def _unpin(pins: list[Table]) -> None:
    for table in pins:
        table.pins -= 1
    pins.clear()


def _carry_out(image: Vmdk, plan: Plan) -> Procedure:
    """Commit a plan without data: what it wants zeroed in place is."""
    if plan.before is not None:
        for group in plan.before.groups:
            yield Write(group)
        yield Barrier()
        image.settle(plan.before.token)
    for step in plan.steps:
        for start in range(step.guest, step.guest + step.length, _ZEROES):
            yield GuestWrite(start, bytes(min(_ZEROES, step.guest + step.length - start)))
    image.commit(plan)
    yield from _flush(image)
