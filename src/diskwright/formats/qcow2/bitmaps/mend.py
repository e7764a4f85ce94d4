"""Mending what the tables of persistent dirty bitmaps refer to.

A bitmap says what may have changed, so where a part of one is lost all of that part may have: its
entry then says that all bits are set.  When the directory or a table is lost itself, all bitmaps
are marked as not to be relied on, by the autoclear bit that their extension has.
"""

from __future__ import annotations

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Write
from ....errors import MalformedImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from .. import header as hd
from ..machine.core import SLOT
from ..repair.mending import write_entries
from .directory import ALL_ONES, ENTRY_OFFSET, parse_directory, parse_place, shown

if TYPE_CHECKING:
    from ..check.checking import Checker
    from ..format import Qcow2

_SLICE = 64 << 10


def mend_bitmaps(image: Qcow2, found: Checker) -> Procedure:
    """Mend the tables, with the counts of the walk ``found``; returns how much was mended."""
    h = image.header
    if h.extension(hd.EXT_BITMAPS) is None or not h.autoclear & hd.BITMAPS:
        return 0
    mended = 0
    try:
        place = parse_place(h)
        assert place is not None
        if not _alone(found, place.offset, place.size):
            raise MalformedImage("the directory is lost")
        (raw,) = yield Read(SLOT, [(place.offset, place.size)])
        entries = parse_directory(raw, place, h)
        for entry in entries:
            if not _alone(found, entry.table_offset, 8 * entry.table_size):
                raise MalformedImage(f"the table of '{shown(entry.name)}' is lost")
    except MalformedImage as error:
        found.result.say(f"Repairing bitmaps: none can be relied on any more, for {error}")
        h.autoclear &= ~hd.BITMAPS
        yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
        yield Barrier()
        return 1
    for entry in entries:
        mended += yield from _mend_table(found, entry.table_offset, entry.table_size, entry.name)
    return mended


def _alone(found: Checker, offset: int, length: int) -> bool:
    """The region is in the file, and nothing else refers to it."""
    first, last = offset >> found.bits, (offset + length - 1) >> found.bits
    return last < found.file_clusters and all(
        found.counts.get(cluster) == 1 for cluster in range(first, last + 1)
    )


def _mend_table(found: Checker, offset: int, count: int, name: bytes) -> Procedure:
    mended = 0
    mask = found.size - 1
    for start in range(0, count * 8, _SLICE):
        (raw,) = yield Read(SLOT, [(offset + start, min(_SLICE, count * 8 - start))])
        table = big_endian_array(64, raw)
        changed = []
        for index, entry in enumerate(table):
            if not entry or entry == ALL_ONES:
                continue
            host = entry & ENTRY_OFFSET
            sound = not entry & ~ENTRY_OFFSET and not host & mask
            if not sound or not _alone(found, host, found.size):
                found.result.say(
                    f"Repairing bitmap '{shown(name)}' table entry {start // 8 + index}: "
                    f"{entry:x} is {ALL_ONES} now"
                )
                table[index] = ALL_ONES
                changed.append(index)
        yield from write_entries(offset + start, table, changed, "none")
        mended += len(changed)
        yield Progress(start, count * 8)
    return mended
