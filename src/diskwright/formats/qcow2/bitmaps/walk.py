"""The clusters that persistent dirty bitmaps refer to, for a check."""

from __future__ import annotations

from ....contract import Procedure, Progress, Read
from ....errors import MalformedImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from .. import header as hd
from ..machine.core import SLOT
from .directory import ALL_ONES, ENTRY_OFFSET, parse_directory, parse_place, shown

if TYPE_CHECKING:
    from ..check.references import Walker

# Bytes of a bitmap table that are read at once.
_SLICE = 64 << 10


# What nobody can tell the clusters of any more: none is freed then.
_UNCOVERED = "persistent dirty bitmaps"


def count_bitmaps(walker: Walker) -> Procedure:
    """Count what the bitmap directory, the tables and their entries refer to.

    Nothing where the autoclear bit is not set: another program has written since, the bitmaps mean
    nothing, and what they hold is leaked.
    """
    h = walker.header
    if not h.autoclear & hd.BITMAPS:
        return
    try:
        place = parse_place(h)
        if place is None:
            return
        if not walker.add_region(place.offset, place.size):
            walker.result.uncovered.append(_UNCOVERED)
            return
        (raw,) = yield Read(SLOT, [(place.offset, place.size)])
        entries = parse_directory(raw, place, h)
    except MalformedImage as error:
        walker.result.corruption(f"bitmap directory: {error}")
        walker.result.uncovered.append(_UNCOVERED)
        return
    for done, entry in enumerate(entries):
        if walker.add_region(entry.table_offset, entry.table_size * 8):
            yield from _count_table(walker, entry.table_offset, entry.table_size, entry.name)
        yield Progress(done, len(entries))


def _count_table(walker: Walker, offset: int, count: int, name: bytes) -> Procedure:
    mask = walker.size - 1
    for start in range(0, count * 8, _SLICE):
        (raw,) = yield Read(SLOT, [(offset + start, min(_SLICE, count * 8 - start))])
        for index, entry in enumerate(big_endian_array(64, raw), start // 8):
            if not entry or entry == ALL_ONES:
                continue
            host = entry & ENTRY_OFFSET
            if entry & ~ENTRY_OFFSET or host & mask:
                walker.result.corruption(
                    f"bitmap '{shown(name)}' table entry {index} is invalid: {entry:x}"
                )
            else:
                walker.add_region(host, walker.size)
        yield Progress(start, count * 8)
