"""What procedures of any format need to change its map: asking for tables, and writing in order.

They run alone, with nothing dirty, and leave nothing dirty behind; what the engine does for a batch
is done here step by step.
"""

from __future__ import annotations

from collections.abc import Callable

from ..contract import Barrier, Format, Groups, NeedMeta, Procedure, Punch, Read, Table, Write
from ..errors import CorruptImage
from ..hints import Any


def ask(image: Format, question: Callable[[], Any], pins: list[Table]) -> Procedure:
    """Repeat ``question`` until no table is missing; tables that were read stay pinned.

    A CorruptImage that the format answers is met as by a request (``met_by``), for which the image
    is marked.  What a procedure itself finds wrong with a snapshot keeps nobody from the disk.
    """
    while True:
        try:
            answer = question()
        except CorruptImage as error:
            error.met_by = error.met_by or image
            raise
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


def before(image: Format, groups: Groups) -> Procedure:
    """Make the `before` groups of a plan durable, each before the next."""
    for group in groups.groups:
        yield Write(group)
        yield Barrier()
    image.settle(groups.token)


def flush(image: Format) -> Procedure:
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
