"""Changing the virtual size of a VHDX image."""

from __future__ import annotations

import struct
from array import array

from ...contract import (
    Barrier,
    GuestRead,
    GuestWrite,
    HostRange,
    Length,
    MetaWrite,
    Procedure,
    Progress,
    Punch,
    Quiesce,
    Read,
    Truncate,
    Write,
)
from ...errors import CorruptImage, NotSupported, UsageError
from ...hints import TYPE_CHECKING
from ...units import align_up
from ..editing import unpin
from .checking import Checker
from .core import ENTRIES, FULL, NOT_PRESENT, OFFSET, PARTIAL, SB_PRESENT, STATE, ZERO
from .edit import flush, log_writes, shorten, slice_of, walk
from .metadata import DISK_SIZE, MAX_SIZE, find
from .structures import MIB, REGION_TABLES, SLOT, Region, encode_regions

if TYPE_CHECKING:
    from ...contract import Table
    from .format import Vhdx

PREALLOCATIONS = ("off", "falloc", "full")
_SLICE = 1 << 20
# Slices of the BAT between two flushes; an entry of the log has room for so many.
_SLICES = 32


def resize(image: Vhdx, size: int, preallocation: str = "off", shrink: bool = False) -> Procedure:
    """Make the disk ``size`` bytes long (a multiple of its sectors, at most 64 TiB); what is new
    reads as zeroes.  A fixed image gets space for all of it.

    A crash leaves the old or the new size; of a shrinking image the end may be gone already.
    Raises UsageError for sizes and modes that do not go, NoSpace.
    """
    image.check_write()
    if size % image.sector_size:
        raise UsageError(f"The new size must be a multiple of {image.sector_size}")
    if size > MAX_SIZE:
        raise UsageError("Image size too large; max of 64TB")
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
    if size < image.size:
        if not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.")
        if preallocation != "off":
            raise UsageError("Preallocation can't be used for shrinking an image")
    if preallocation != "off" and image.differencing:
        raise NotSupported("Preallocation cannot be used together with a backing file")
    if size == image.size:
        return
    yield from image.announce()
    if size < image.size:
        yield from _shrink(image, size)
    else:
        yield from _grow(image, size, preallocation)


def _write_size(image: Vhdx, size: int) -> Procedure:
    """Switch to the new size, with everything before it on disk."""
    yield from flush(image)
    item = find(image.items, DISK_SIZE)
    assert item is not None
    place = image.metadata.offset + item.offset
    yield from log_writes(image, [(place, struct.pack("<Q", size))])
    image.use(image.parameters._replace(size=size))


# -- smaller
def _shrink(image: Vhdx, size: int) -> Procedure:
    """What is behind the new end goes first, so that no growth can show it again."""
    keep = -(-size >> image.block_bits)
    yield from _zero_tail(image, size)
    old = image.entries_for(image.blocks)
    yield from _drop(image, keep, old, True)
    yield from _write_size(image, size)
    yield from _cut(image)


def _zero_tail(image: Vhdx, start: int) -> Procedure:
    """What is stored from ``start`` to the end of its block is overwritten with zeroes."""
    inside = start & (image.block_size - 1)
    if not inside:
        return
    pins: list[Table] = []
    index = image.bat_index(start >> image.block_bits)
    table = yield from slice_of(image, index, pins)
    entry = table.data[index % ENTRIES]
    unpin(pins)
    if entry & STATE not in (FULL, PARTIAL):
        return
    host = image.host_of(entry, index, image.block_size)
    length = yield Length(SLOT)
    end = min(host + image.block_size, length)
    for at in range(host + inside, end, _SLICE):
        part = min(_SLICE, end - at)
        (raw,) = yield Read(SLOT, [(at, part)])
        if raw.count(0) != part:
            yield Write([MetaWrite(SLOT, at, bytes(part))])
        yield Progress(at - host, image.block_size)
    yield Barrier()


def _drop(image: Vhdx, keep: int, entries: int, live: bool) -> Procedure:
    """Empty the entries of all blocks from ``keep`` on, of ``entries`` in the BAT.  ``live``: what
    they refer to is theirs, and is given back."""
    ratio = (1 << image.ratio_bits) + 1
    first = keep + (keep >> image.ratio_bits)
    chunks = -(-keep >> image.ratio_bits) if image.differencing else 0

    def body(base: int, values: array[int]) -> Procedure:
        gone = [
            index
            for index, value in enumerate(values, base)
            if value and index >= first and ((index + 1) % ratio or index // ratio >= chunks)
        ]
        if not gone:
            return
        pins: list[Table] = []
        table = yield from slice_of(image, gone[0], pins)
        for index in gone:
            if live and index < entries:
                entry = table.data[index % ENTRIES]
                _free(image, entry, image.block_size if (index + 1) % ratio else MIB)
            image.set_entry(table, index, NOT_PRESENT)
        unpin(pins)

    yield from walk(image, first, entries, body)


def _free(image: Vhdx, entry: int, length: int) -> None:
    """Give a block's space back, if it has some that is its own for certain."""
    host = entry & OFFSET
    if entry & STATE not in (FULL, PARTIAL):
        return
    if host + length <= image.fresh and not image.overlaps(host, length):
        image.free_later(host, length)


def _cut(image: Vhdx) -> Procedure:
    """Cut off what is behind the last block that is in use."""
    survey = Checker(image)
    result = yield from survey.run()
    length = yield Length(SLOT)
    end = survey.claims.end * MIB
    if not result.corruptions and end < length:
        yield from shorten(image, end)


# -- larger
def _grow(image: Vhdx, size: int, preallocation: str) -> Procedure:
    old = image.size
    backing = size if image.differencing else 0
    if image.has_backing:
        backing = yield Length("backing")
    blocks = -(-size >> image.block_bits)
    entries = image.entries_for(blocks)
    if (yield Length(SLOT)) < image.fresh:
        # Some writers leave out of the last block what is behind the end of the disk.
        yield Truncate(SLOT, image.fresh)
        image.set_length(image.fresh)
    if old & (image.block_size - 1):
        yield from _hide_tail(image, old, backing)
        yield from _zero_tail(image, old)
    yield from make_room(image, entries)
    if image.fixed or preallocation != "off":
        yield from _preallocate(image, image.blocks, blocks, preallocation)
    else:
        yield from _hide_backing(image, image.blocks, -(-min(size, backing) >> image.block_bits))
    yield from _write_size(image, size)


def make_room(image: Vhdx, entries: int) -> Procedure:
    """A BAT with so many entries, empty behind those that are in use."""
    if entries * 8 > image.bat.length:
        yield from _move_bat(image, align_up(entries * 8, MIB))
    # What stands behind the end of the table may be anything.
    yield from _drop(image, image.blocks, entries, False)


def _hide_tail(image: Vhdx, old: int, backing: int) -> Procedure:
    """Sectors behind the old end, in its block, must not be read from a longer parent.

    They are marked as present, which nobody sees before the size is another; the block is there
    afterwards, and its sectors are zeroed by the caller.
    """
    if not image.differencing or backing <= old:
        return
    pins: list[Table] = []
    block = old >> image.block_bits
    index = image.bat_index(block)
    table = yield from slice_of(image, index, pins)
    state = table.data[index % ENTRIES] & STATE
    unpin(pins)
    if state == NOT_PRESENT:
        # Writing its last sector gives the block a place.
        at = old - image.sector_size
        data = yield GuestRead(at, image.sector_size)
        yield GuestWrite(at, data)
        yield from flush(image)
    elif state != PARTIAL:
        return
    table = yield from slice_of(image, index, pins)
    if table.data[index % ENTRIES] & STATE == PARTIAL:
        yield from _mark_present(image, block, old)
    unpin(pins)


def _mark_present(image: Vhdx, block: int, start: int) -> Procedure:
    """Set the bits of all sectors of ``block`` from guest offset ``start`` on."""
    first, chunk = image.bitmap_part(block)
    pins: list[Table] = []
    index = image.bitmap_index(chunk)
    table = yield from slice_of(image, index, pins)
    entry = table.data[index % ENTRIES]
    unpin(pins)
    if entry & STATE != SB_PRESENT:
        raise CorruptImage("a sector bitmap is missing", field="BAT entry", offset=index)
    bitmap = image.host_of(entry, index, MIB)
    sectors = image.block_size >> image.sector_bits
    bit = (start & (image.block_size - 1)) >> image.sector_bits
    (raw,) = yield Read(SLOT, [(bitmap + first, image.bitmap_bytes)])
    bits = int.from_bytes(raw, "little") | (1 << sectors) - (1 << bit)
    yield from log_writes(image, [(bitmap + first, bits.to_bytes(image.bitmap_bytes, "little"))])


def _move_bat(image: Vhdx, length: int) -> Procedure:
    """A longer BAT at the end of the file.  Both say the same until the region tables, one after
    the other, name the new one; a reader may go by either."""
    old = image.bat
    new = Region(old.kind, image.fresh, length, old.required)
    yield Truncate(SLOT, new.end)
    if not image.end_reads_zero:
        for at in range(new.offset, new.end, _SLICE):
            yield Write([MetaWrite(SLOT, at, bytes(_SLICE))])
    for at in range(0, old.length, _SLICE):
        (raw,) = yield Read(SLOT, [(old.offset + at, _SLICE)])
        if raw.count(0) != len(raw):
            yield Write([MetaWrite(SLOT, new.offset + at, raw)])
        yield Progress(at, old.length)
    yield Barrier()
    regions = [new if region is old or region == old else region for region in image.regions]
    data = encode_regions(regions)[: align_up(16 + 32 * len(regions), 512)]
    for place in REGION_TABLES:
        yield Write([MetaWrite(SLOT, place, data)])
        yield Barrier()
    image.regions, image.bat = regions, new
    image.reserve_structures()
    image.set_length(new.end)
    yield Quiesce()
    zeroed = yield Punch([HostRange(SLOT, old.offset, old.length)])
    image.release([HostRange(SLOT, old.offset, old.length)], zeroed)


def _hide_backing(image: Vhdx, start: int, end: int) -> Procedure:
    """Blocks [start, end), which are new and which a longer parent holds, read as zeroes."""
    yield from _set_entries(image, start, end, ZERO, 0)


def _preallocate(image: Vhdx, start: int, end: int, preallocation: str) -> Procedure:
    """Give blocks [start, end) space at the end of the file."""
    place = image.fresh
    yield Truncate(SLOT, place + (end - start) * image.block_size, preallocation)
    if not image.end_reads_zero:
        for at in range(place, place + (end - start) * image.block_size, _SLICE):
            yield Write([MetaWrite(SLOT, at, bytes(_SLICE))])
            yield Progress(at - place, (end - start) * image.block_size)
    yield Barrier()
    image.set_length(place + (end - start) * image.block_size)
    yield from _set_entries(image, start, end, place | FULL, image.block_size)


def _set_entries(image: Vhdx, start: int, end: int, first: int, step: int) -> Procedure:
    """Entries of blocks [start, end): ``first``, and ``step`` more for each one that follows."""
    pins: list[Table] = []
    table: Table | None = None
    slice_number = -1
    turn = 0
    for block in range(start, end):
        index = image.bat_index(block)
        if index // ENTRIES != slice_number:
            turn += 1
            if turn % _SLICES == 0:
                yield from flush(image)
                unpin(pins)
                yield Progress(block - start, end - start)
            slice_number = index // ENTRIES
            table = yield from slice_of(image, index, pins)
        assert table is not None
        image.set_entry(table, index, first + (block - start) * step)
    yield from flush(image)
    unpin(pins)
