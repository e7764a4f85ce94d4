"""The open procedure of VHDX images."""

from __future__ import annotations

from ...contract import Barrier, Length, MetaWrite, Open, Procedure, Read, Write
from ...errors import CorruptImage, DiskError, MalformedImage, UnsupportedFeature
from ...hints import TYPE_CHECKING
from ...ondisk import little_endian_array
from . import metadata as md
from . import structures as st
from .core import BITMAP_BLOCK, FULL, OFFSET, PARTIAL, STATE
from .locator import MOST_BYTES, parse
from .replay import replay_in_memory, replay_into_file
from .structures import MIB, NO_GUID, SLOT, Header, Region

if TYPE_CHECKING:
    from .format import Vhdx

_KNOWN = {st.BAT_REGION: "BAT", st.METADATA_REGION: "metadata"}
# Sequence numbers that are left for the headers.
_MOST_SEQUENCE = (1 << 64) - (1 << 32)
# In a longer BAT nobody looks for space between blocks.
_MOST_SURVEYED = 1 << 18


def open_image(image: Vhdx) -> Procedure:
    """Read and check the headers, replay the log, read the region tables and the metadata; open
    the parent.

    A log that is in use is replayed into the file, or into memory where the image is read-only.
    Options: ``backing`` None switches the parent off, any other value says that the caller fills
    the slot; ``check`` lets images be opened whose BAT points behind the end of the file, and
    those whose parent locator is damaged.  Returns ``image``.
    """
    length = yield Length(SLOT)
    name, first, second = yield Read(
        SLOT, [(0, 8), *[(offset, st.HEADER_BYTES) for offset in st.HEADERS]]
    )
    if name != st.IDENTIFIER:
        raise MalformedImage("Not a VHDX file", field="file identifier", offset=0)
    image.header = header = st.current_header(first, second)
    st.check_header(header)
    if image.writable:
        if header.sequence >= _MOST_SEQUENCE:
            raise UnsupportedFeature("writing with header sequence numbers that are used up")
        if not header.log_length:
            raise UnsupportedFeature("writing to an image without a log")
    in_use = header.log_guid != NO_GUID
    if (in_use or image.writable) and header.log_offset + header.log_length > length:
        raise MalformedImage(
            f"The log at {header.log_offset:#x} ends behind the end of the file",
            field="LogOffset",
            offset=header.offset + 72,
        )
    if in_use:
        length = yield from _replay(image, length)
    stale = yield from _read_regions(image)
    image.reserve_structures()
    yield from _read_metadata(image, length)
    image.set_length(length)
    if image.overlay is not None:
        image.opaque = image.overlay.outside(image.reserved)
    if image.writable:
        yield from _survey(image)
        if stale is not None and not image.options.get("check"):
            yield from _renew_regions(image, stale)
    yield from _open_parent(image)
    return image


# -- the log
def _replay(image: Vhdx, length: int) -> Procedure:
    """Replay the log; the length of the file then."""
    if not image.writable:
        image.overlay = yield from replay_in_memory(image.header, length)
        return max(length, image.overlay.last)
    # The file gets a new identity before anything else in it changes (2.2.2).
    yield from _put(image, image.next_headers(file_guid=image.new_guid()))
    yield from replay_into_file(image.header, length)
    yield from _put(image, image.next_headers(log_guid=NO_GUID))
    return (yield Length(SLOT))


def _put(image: Vhdx, headers: tuple[Header, Header]) -> Procedure:
    for h in headers:
        yield Write([MetaWrite(SLOT, h.offset, h.encode())])
        yield Barrier()
    image.header = headers[1]


def _read(image: Vhdx, ranges: list[tuple[int, int]]) -> Procedure:
    """Bytes of the file, with what a log in memory holds over them."""
    parts = yield Read(SLOT, ranges)
    overlay = image.overlay
    if overlay is None:
        return parts
    return [overlay.lay(at, part) for (at, _), part in zip(ranges, parts, strict=True)]


# -- regions and metadata
def _read_regions(image: Vhdx) -> Procedure:
    """The region table, or its copy where the first is not valid.  Returns the write that makes
    both the same; None when they are."""
    places = [(offset, st.REGION_TABLE_BYTES) for offset in st.REGION_TABLES]
    first, second = yield from _read(image, places)
    stale = None if first == second else MetaWrite(SLOT, st.REGION_TABLES[1], first)
    try:
        regions = st.parse_regions(first, st.REGION_TABLES[0])
    except MalformedImage as error:
        try:
            regions = st.parse_regions(second, st.REGION_TABLES[1])
        except MalformedImage:
            raise error from None
        stale = MetaWrite(SLOT, st.REGION_TABLES[0], second)
    for region in regions:
        if region.required and region.kind not in _KNOWN:
            raise UnsupportedFeature(f"required region {st.guid_text(region.kind)}")
    image.regions = regions
    image.bat = _region(regions, st.BAT_REGION)
    image.metadata = _region(regions, st.METADATA_REGION)
    h = image.header
    parts = [(r.offset, r.length, f"region {st.guid_text(r.kind)}") for r in regions]
    if h.log_length:
        parts.append((h.log_offset, h.log_length, "the log"))
    st.check_apart(parts, st.REGION_TABLES[0])
    return stale


def _renew_regions(image: Vhdx, stale: MetaWrite) -> Procedure:
    """Make the region tables the same, as a crash between the writes of both may not have left
    them: readers may go by either, and what this session writes must be in the table of both."""
    yield from _put(image, image.next_headers(file_guid=image.new_guid()))
    yield Write([stale])
    yield Barrier()


def _region(regions: list[Region], kind: bytes) -> Region:
    for region in regions:
        if region.kind == kind:
            return region
    raise MalformedImage(f"There is no {_KNOWN[kind]} region", field="region table")


def _read_metadata(image: Vhdx, length: int) -> Procedure:
    region = image.metadata
    if region.length < md.TABLE_BYTES or region.offset + md.TABLE_BYTES > length:
        raise MalformedImage(
            "The metadata region ends behind the end of the file",
            field="region table",
            offset=region.offset,
        )
    (table,) = yield from _read(image, [(region.offset, md.TABLE_BYTES)])
    image.items = items = md.parse_table(table, region.length, region.offset)
    parts = yield from _read(
        image, [(region.offset + item.offset, item.length) for item in md.needed(items)]
    )
    p = md.parse_items(parts)
    image.use(p)
    needed = 8 * image.entries_for(image.blocks)
    if needed > image.bat.length or image.bat.offset + needed > length:
        raise MalformedImage(
            f"A disk of {p.size:#x} bytes needs {needed:#x} bytes of BAT; the region has "
            f"{image.bat.length:#x}, the file ends at {length:#x}",
            field="BAT region",
            offset=image.bat.offset,
        )
    if p.has_parent:
        yield from _read_locator(image)


def _read_locator(image: Vhdx) -> Procedure:
    item = md.find(image.items, md.PARENT_LOCATOR)
    try:
        if item is None:
            raise MalformedImage("An image with a parent has no parent locator", field="metadata")
        at = image.metadata.offset + item.offset
        (raw,) = yield from _read(image, [(at, min(item.length, MOST_BYTES))])
        image.locator = parse(raw)
        _ = image.locator.names, image.locator.linkages  # a value that is no text is found here
    except DiskError:
        if not image.options.get("check"):
            raise
        image.locator = None


# -- what is in use
def _survey(image: Vhdx) -> Procedure:
    """Walk through the BAT, where blocks are to be written: new ones must not lie over blocks that
    end behind the file, and may lie where nothing is.

    The last block of the file may be cut off.  Raises CorruptImage for one that begins behind it,
    since space is taken there.
    """
    checking = bool(image.options.get("check"))
    total = image.entries_for(image.blocks)
    used: list[tuple[int, int]] | None = None
    if not checking and (total <= _MOST_SURVEYED or not image.end_reads_zero):
        used = list(image.reserved)
    for start in range(0, 8 * total, MIB):
        (raw,) = yield Read(SLOT, [(image.bat.offset + start, min(MIB, 8 * total - start))])
        entries = little_endian_array(64, raw)
        highest = max(entries)
        if used is None and highest + max(image.block_size, BITMAP_BLOCK) <= image.fresh:
            continue
        if highest < MIB:
            continue
        for i, entry in enumerate(entries, start // 8):
            host = entry & OFFSET
            if not host:
                continue
            bitmap = (i + 1) % ((1 << image.ratio_bits) + 1) == 0
            end = host + (BITMAP_BLOCK if bitmap else image.block_size)
            if used is not None and host < image.length:
                used.append((host, end))  # also what a block without content keeps for itself
            if entry & STATE not in (FULL, PARTIAL):
                continue
            if host < image.length:
                image.fresh = max(image.fresh, end)
            elif not checking:
                raise CorruptImage(
                    f"BAT entry {i} points at {host:#x}, which is behind the end of the file",
                    field="BAT entry",
                    offset=image.entry_field(i),
                )
    if used is not None:
        image.find_gaps(used)


def _open_parent(image: Vhdx) -> Procedure:
    if "backing" in image.options:
        image.has_backing = image.options["backing"] is not None
    elif image.backing_file is not None:
        image.has_backing = True
        yield Open("backing", image.backing_file, image.backing_format)
