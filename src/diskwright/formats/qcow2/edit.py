"""What procedures need to change the map: asking for tables, and flushing in order.

They run alone, with nothing dirty, and leave nothing dirty behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...contract import Barrier, NeedMeta, Procedure, Punch, Read, Table, Write
from .reserve import BEFORE

if TYPE_CHECKING:
    from .format import Qcow2


def ask(image: Qcow2, question: Callable[[], Any], pins: list[Table]) -> Procedure:
    """Repeat ``question`` until no table is missing; tables that were read stay pinned."""
    while True:
        answer = question()
        if not isinstance(answer, NeedMeta):
            return answer
        raws = yield Read(answer.slot, answer.ranges, answer.tag)
        for (offset, _), raw in zip(answer.ranges, raws, strict=True):
            table = image.tables.get(answer.slot, offset)
            if table is None:
                image.load(answer.slot, offset, raw)
                table = image.tables.get(answer.slot, offset)
            assert table is not None
            table.pins += 1
            pins.append(table)


def unpin(pins: list[Table]) -> None:
    """Let the tables of `ask` go."""
    for table in pins:
        table.pins -= 1
    pins.clear()


def announce(image: Qcow2) -> Procedure:
    """Make the `before` group durable, where there is one."""
    image.check_write()
    if not image.announced:
        for group in image.before().groups:
            yield Write(group)
        yield Barrier()
        image.settle(BEFORE)


def flush(image: Qcow2) -> Procedure:
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
