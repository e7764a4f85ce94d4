"""Another parent for a VHDX image, or none (MS-VHDX 2.6.2.1, 2.6.2.6)."""

from __future__ import annotations

import errno
import struct
from array import array

from ...contract import MetaWrite, Procedure, Progress, Read, Write
from ...errors import CorruptImage, NoSpace, NotSupported, UsageError
from ...hints import TYPE_CHECKING
from ...units import align_up
from ..editing import unpin
from .core import ENTRIES, FULL, NOT_PRESENT, OFFSET, PARTIAL, SB_PRESENT, STATE
from .edit import flush, log_writes, slice_of, walk
from .locator import Locator, encode, locate
from .metadata import (
    FILE_PARAMETERS,
    FLAGS,
    HAS_PARENT,
    IS_USER,
    LEAVE_ALLOCATED,
    MOST_ITEM,
    PARENT_LOCATOR,
    TABLE_BYTES,
    Item,
    encode_table,
    find,
)
from .resizing import make_room
from .structures import MIB, NO_GUID, SLOT, guid_text

if TYPE_CHECKING:
    from ...contract import Table
    from .format import Vhdx

_SLICE = 1 << 20
# What an item is rounded up to in its region.
_ROOM = 8


def change_backing(
    image: Vhdx, name: str | None, fmt: str | None, identity: str | None = None
) -> Procedure:
    """Make ``name`` (as it is to be stored, see `locator.locate`) the parent, whose DataWriteGuid
    is ``identity``; without one the recorded one stays.

    None makes the image one without a parent: what is in it stays, what is not reads as zeroes.
    The caller has copied what is to read otherwise; a sector that is not present in a block that
    is must be one of zeroes by now, which is what it becomes.

    Everything that the header of the disk says changes in one entry of the log.  Raises OSError
    (EINVAL for a name that cannot be stored, ENOSPC when the metadata region has no room for it),
    NotSupported for a parent of another format or of a fixed image.
    """
    image.check_write()
    if name is None:
        if not image.differencing:
            return
        yield from image.announce()
        yield from _fill_partial(image)
        yield from _drop_bitmaps(image, live=True)
        yield from _write(image, None)
        return
    if fmt not in (None, "vhdx"):
        raise NotSupported("The parent of a VHDX image must be a VHDX image")
    if image.fixed:
        raise NotSupported("A fixed VHDX image cannot have a parent")
    old = image.locator
    known = [identity] if identity else [] if old is None else list(old.linkages)
    try:
        locator = locate(
            name, known or [guid_text(NO_GUID)], image.options.get("file-name"), old
        )
        data = encode(locator)
    except UsageError as error:
        raise OSError(errno.EINVAL, "Invalid argument") from error
    _placed(image, data)  # whether it fits is known before anything changes
    # What the disk reads is the caller's affair: of an overlay over this image nothing changes.
    yield from image.announce(data=False)
    if not image.differencing:
        # The table of an image with a parent has an entry for the bitmap of its last chunk.
        yield from _drop_bitmaps(image, live=False)
        ratio = 1 << image.ratio_bits
        yield from make_room(image, -(-image.blocks // ratio) * (ratio + 1))
    yield from _write(image, locator)


# -- the metadata
def _placed(image: Vhdx, data: bytes | None) -> tuple[list[Item], list[tuple[int, bytes]]]:
    """The items of the table with this parent locator (None: without), and the bytes to write for
    them into the region (offsets from its start).  Raises NoSpace."""
    kept = [i for i in image.items if i.kind != PARENT_LOCATOR or i.flags & IS_USER]
    parameters = find(image.items, FILE_PARAMETERS)
    assert parameters is not None
    flags = LEAVE_ALLOCATED * image.fixed | HAS_PARENT * (data is not None)
    writes = [(parameters.offset, struct.pack("<II", image.block_size, flags))]
    if data is not None:
        if len(data) > MOST_ITEM or 32 * (len(kept) + 2) > TABLE_BYTES:
            raise NoSpace
        at = _gap(kept, len(data), image.metadata.length)
        kept.append(Item(PARENT_LOCATOR, at, len(data), FLAGS[PARENT_LOCATOR]))
        writes.append((at, data))
    old = encode_table(image.items)
    new = encode_table(kept)
    end = 32 * (1 + max(len(kept), len(image.items)))
    assert old[end:] == new[end:]
    writes.append((0, new[:end]))
    return kept, writes


def _gap(items: list[Item], length: int, end: int) -> int:
    """The first place in the region with room for ``length`` bytes.  Raises NoSpace."""
    at = TABLE_BYTES
    for item in sorted(items, key=lambda item: item.offset):
        if item.length and item.offset - at >= length:
            break
        if item.length:
            at = max(at, align_up(item.offset + item.length, _ROOM))
    if at + length > end:
        raise NoSpace
    return at


def _write(image: Vhdx, locator: Locator | None) -> Procedure:
    """One entry of the log: table, flags and locator."""
    yield from flush(image)
    items, writes = _placed(image, None if locator is None else encode(locator))
    base = image.metadata.offset
    yield from log_writes(image, [(base + at, data) for at, data in writes])
    image.items, image.locator = items, locator
    image.use(image.parameters._replace(has_parent=locator is not None))
    image.has_backing = locator is not None


# -- no parent any more
def _fill_partial(image: Vhdx) -> Procedure:
    """Make every partially present block a whole one, its missing sectors zeroes."""
    ratio = (1 << image.ratio_bits) + 1

    def body(base: int, values: array[int]) -> Procedure:
        for index, value in enumerate(values, base):
            if value & STATE != PARTIAL or not (index + 1) % ratio:
                continue
            host = image.host_of(value, index, image.block_size)
            yield from _zero_absent(image, index - index // ratio, host)
            pins: list[Table] = []
            table = yield from slice_of(image, index, pins)
            image.set_entry(table, index, value & OFFSET | FULL)
            unpin(pins)

    yield from walk(image, 0, image.entries_for(image.blocks), body)


def _drop_bitmaps(image: Vhdx, live: bool) -> Procedure:
    """Empty the entries of all sector bitmap blocks; ``live``: give their space back."""
    ratio = (1 << image.ratio_bits) + 1

    def body(base: int, values: array[int]) -> Procedure:
        for index in range(base + ratio - 1 - base % ratio, base + len(values), ratio):
            entry = values[index - base]
            if not entry:
                continue
            if live and entry & STATE == SB_PRESENT:
                image.free_later(image.host_of(entry, index, MIB), MIB)
            pins: list[Table] = []
            table = yield from slice_of(image, index, pins)
            image.set_entry(table, index, NOT_PRESENT)
            unpin(pins)

    yield from walk(image, 0, image.entries_for(image.blocks), body)


def _zero_absent(image: Vhdx, block: int, host: int) -> Procedure:
    """Zeroes in the sectors of a block that its bitmap says are not there."""
    start, chunk = image.bitmap_part(block)
    pins: list[Table] = []
    index = image.bitmap_index(chunk)
    table = yield from slice_of(image, index, pins)
    entry = table.data[index % ENTRIES]
    unpin(pins)
    if entry & STATE != SB_PRESENT:
        raise CorruptImage(
            "a sector bitmap is missing", field="BAT entry", offset=image.entry_field(index)
        )
    bitmap = image.host_of(entry, index, MIB)
    (raw,) = yield Read(SLOT, [(bitmap + start, image.bitmap_bytes)])
    sectors = image.block_size >> image.sector_bits
    absent = ~int.from_bytes(raw, "little") & (1 << sectors) - 1
    text = f"{absent:0{sectors}b}"[::-1]
    at = text.find("1")
    while at >= 0:
        end = text.find("0", at)
        end = sectors if end < 0 else end
        for offset in range(at << image.sector_bits, end << image.sector_bits, _SLICE):
            length = min(_SLICE, (end << image.sector_bits) - offset)
            yield Write([MetaWrite(SLOT, host + offset, bytes(length))])
        yield Progress(end, sectors)
        at = text.find("1", end)
