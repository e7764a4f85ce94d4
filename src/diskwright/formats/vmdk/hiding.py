"""What grows over a parent must not show it: the new end of a disk becomes zero."""

from __future__ import annotations

from functools import partial

from ...contract import (
    ZERO_UNMAP,
    GuestWrite,
    Length,
    Plan,
    Procedure,
    Progress,
    Table,
)
from ...hints import TYPE_CHECKING
from ...units import align_up
from ..editing import ask, before, flush, unpin

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
        want = (first, stop - first)
        plan = yield from ask(image, partial(image.plan, [want], ZERO_UNMAP), pins)
        if plan is None:
            for start in range(first, stop, _ZEROES):
                yield GuestWrite(start, bytes(min(_ZEROES, stop - start)))
                yield Progress(start - old, end - old)
        else:
            yield from _carry_out(image, plan)
        unpin(pins)
        first = stop
        yield Progress(min(first, end) - old, end - old)
    yield from flush(image)


def _carry_out(image: Vmdk, plan: Plan) -> Procedure:
    """Commit a plan without data: what it wants zeroed in place is."""
    if plan.before is not None:
        yield from before(image, plan.before)
    for step in plan.steps:
        for start in range(step.guest, step.guest + step.length, _ZEROES):
            yield GuestWrite(start, bytes(min(_ZEROES, step.guest + step.length - start)))
    image.commit(plan)
    yield from flush(image)
