"""What procedures need to change an image: asking for tables, and changes by way of the log.

They run alone, with nothing dirty, and leave nothing dirty behind.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from ...contract import (
    Barrier,
    Length,
    NeedMeta,
    Procedure,
    Progress,
    Quiesce,
    Read,
    Table,
    Truncate,
)
from ...errors import UsageError
from ...hints import TYPE_CHECKING
from ...ondisk import little_endian_array
from ...units import align_up
from .. import editing
from . import log
from .core import BAT_LOAD, ENTRIES, PART
from .log import SECTOR, Change
from .structures import SLOT

if TYPE_CHECKING:
    from .format import Vhdx

_READ = 1 << 20
# Slices of the BAT between two flushes; an entry of the log has room for so many.
_TURN = 64


def slice_of(image: Vhdx, index: int, pins: list[Table]) -> Procedure:
    """The slice of the BAT that holds entry ``index``, pinned."""
    number = index // ENTRIES

    def load() -> Table | NeedMeta:
        missing = NeedMeta(SLOT, [(image.slice_offset(number), PART)], BAT_LOAD)
        return image.slice_table(number) or missing

    table: Table = yield from editing.ask(image, load, pins)
    table.pins += 1
    pins.append(table)
    return table


def walk(
    image: Vhdx, first: int, entries: int, body: Callable[[int, array[int]], Procedure]
) -> Procedure:
    """Run ``body(index of the first entry, values)`` for every slice of the BAT that holds
    something, from the one with entry ``first`` up to ``entries``, as the file has it.

    Empty parts cost little more than reading them.  What is dirty is flushed in between, so no
    table stays valid beyond the body that asked for it.
    """
    turn = 0
    for base in range(first - first % ENTRIES, entries, _READ // 8):
        length = min(_READ, (align_up(entries, ENTRIES) - base) * 8)
        (raw,) = yield Read(SLOT, [(image.bat.offset + base * 8, length)])
        if raw.count(0) != len(raw):
            for at in range(0, length, PART):
                if raw.count(0, at, at + PART) == PART:
                    continue
                yield from body(base + at // 8, little_endian_array(64, raw[at : at + PART]))
                turn += 1
                if turn % _TURN == 0:
                    yield from flush(image)
        yield Progress(base - first, entries)
    yield from flush(image)


def flush(image: Vhdx) -> Procedure:
    """Write back, under the GUIDs of this session, until nothing is dirty."""
    if image.tables.dirty():
        yield from image.announce()
    yield from editing.flush(image)


def log_writes(image: Vhdx, writes: Sequence[tuple[int, bytes]]) -> Procedure:
    """Write bytes at places outside of the BAT as one change: all of them, or none after a crash.

    Raises UsageError when that is more than an entry of the log can hold.
    """
    sectors: dict[int, bytearray] = {}
    for offset, data in writes:
        first = offset - offset % SECTOR
        wanted = [at for at in range(first, offset + len(data), SECTOR) if at not in sectors]
        raws = yield Read(SLOT, [(at, SECTOR) for at in wanted])
        sectors.update((at, bytearray(raw)) for at, raw in zip(wanted, raws, strict=True))
        for at in range(first, offset + len(data), SECTOR):
            a, b = max(at, offset), min(at + SECTOR, offset + len(data))
            sectors[at][a - at : b - at] = data[a - offset : b - offset]
    changes = [Change(at, SECTOR, bytes(raw)) for at, raw in sorted(sectors.items())]
    if log.sectors_for(0, len(changes)) > image.header.log_length // SECTOR // 3:
        raise UsageError("The change is too long for the image's log")
    yield Barrier()
    length = yield Length(SLOT)
    yield from image.logged(changes, length)
    yield Quiesce()


def shorten(image: Vhdx, end: int) -> Procedure:
    """Cut the file off.  A log must not say that it was longer."""
    yield from image.empty_log()
    yield Truncate(SLOT, end)
    yield Barrier()
    image.forget_space()
    image.set_length(end)
