"""The open procedure of VMDK images."""

from __future__ import annotations

import struct

from ...contract import Length, Open, Procedure, Read
from ...errors import CorruptImage, ImageError, MalformedImage, UnsupportedFeature
from ...hints import TYPE_CHECKING
from ...units import SECTOR, align_up
from .cid import Place
from .descriptor import (
    MAX_EMBEDDED,
    MAX_FILE,
    NO_CONTENT,
    NOACCESS,
    RW,
    SPARSE_TYPES,
    Descriptor,
    ExtentLine,
    is_descriptor,
    parse,
)
from .flat import Empty, Flat
from .sparse.header import COWD, KDMV, Esx, Hosted, read_header

if TYPE_CHECKING:
    from .format import Vmdk
    from .parts import Part

SLOT = "file"
SESPARSE = struct.pack("<Q", 0xCAFEBABE)
"""The first bytes of an extent of type SESPARSE."""
MAX_TABLES = 512 << 20
"""Bytes of directories that all extents together may keep in memory."""
_HEAD = 4096
ALONE = "it is an extent of an image, which is opened by its descriptor"


def open_image(image: Vmdk) -> Procedure:
    """Read the descriptor, open the extents and the parent that it names.

    Options: ``backing`` None switches the parent off, any other value says that the caller fills
    the slot; ``check`` also opens an image whose flat extents are too short.  An extent of a
    larger image can be opened by itself, to be read.  Returns ``image``.
    """
    length = yield Length(SLOT)
    (head,) = yield Read(SLOT, [(0, _HEAD)])
    if head[:4] == KDMV:
        yield from _embedded(image, length)
    elif head[:4] == COWD or head[:8] == SESPARSE:
        yield from _alone(image, head)
    elif length <= MAX_FILE and is_descriptor(head):
        yield from _described(image, length)
    else:
        raise MalformedImage("not a VMDK image: neither an extent nor a descriptor")
    yield from _open_parent(image)
    return image


# -- one file
def _embedded(image: Vmdk, length: int) -> Procedure:
    header = yield from read_header(SLOT)
    assert isinstance(header, Hosted)
    text = yield from _embedded_text(image, header, length)
    image.descriptor = text
    sectors, name = header.capacity, None
    if text is None:
        image.refuse_write = ALONE
    else:
        line = _only_line(text)
        if line is not None:
            name = line.name
            # A capacity may be rounded up to the grain.
            if header.capacity - header.grain < line.sectors < header.capacity:
                sectors = line.sectors
    part = yield from open_sparse_part(image, SLOT, 0, sectors * SECTOR, header)
    image.use_parts([part], [name], [RW])


def _embedded_text(image: Vmdk, header: Hosted, length: int) -> Procedure:
    """The descriptor in a sparse extent; None where none is."""
    offset, room = header.descriptor_offset * SECTOR, header.descriptor_size * SECTOR
    if not offset or not room:
        return None
    if offset >= length:
        raise MalformedImage(
            "the descriptor is beyond the end of the file", field="descriptorOffset", offset=28
        )
    (raw,) = yield Read(SLOT, [(offset, min(room, MAX_EMBEDDED))])
    if not raw.strip(b"\0"):
        return None
    if room > MAX_EMBEDDED and b"\0" not in raw:
        raise UnsupportedFeature(f"a descriptor of more than {MAX_EMBEDDED} bytes in an extent")
    image.place = Place(offset, min(room, MAX_EMBEDDED), raw)
    return parse(raw)


def _only_line(text: Descriptor) -> ExtentLine | None:
    """The extent line of an embedded descriptor, which is about the file that it is in."""
    lines = [line for line in text.extents if line.sectors]
    if len(lines) > 1:
        raise UnsupportedFeature("a descriptor of several extents inside one of them")
    if lines and lines[0].type != "SPARSE":
        raise MalformedImage(
            f"line {lines[0].line} of the descriptor: an extent of type {lines[0].type} cannot "
            "hold the descriptor"
        )
    return lines[0] if lines else None


def _alone(image: Vmdk, head: bytes) -> Procedure:
    if head[:8] == SESPARSE:
        from .sesparse.part import open_sesparse

        part = yield from open_sesparse(image, SLOT, 0, None)
    else:
        header = yield from read_header(SLOT)
        part = yield from open_sparse_part(image, SLOT, 0, header.capacity * SECTOR, header)
    image.refuse_write = ALONE
    image.use_parts([part], [None], [RW])


# -- a descriptor and its extents
def _described(image: Vmdk, length: int) -> Procedure:
    (raw,) = yield Read(SLOT, [(0, length)])
    image.descriptor = text = parse(raw)
    if not text.extents:
        raise MalformedImage("the descriptor names no extents")
    image.place = Place(0, None, raw)
    slots: dict[str, tuple[str, bool]] = {}
    changed = {line.name for line in text.extents if line.access == RW and line.sectors}
    parts: list[Part] = []
    lines: list[ExtentLine] = []
    start = weight = 0
    for number, line in enumerate(text.extents):
        if not line.sectors:
            continue
        part: Part
        if line.name is None or line.access == NOACCESS:
            part = Empty(image, f"extent.{number}", start, line.sectors * SECTOR, line.type)
        else:
            try:
                slot = yield from _file_of(line, number, slots, line.name in changed)
                part = yield from open_extent(image, slot, start, line, number)
            except ImageError as error:
                error.file = error.file or line.name
                raise
        parts.append(part)
        lines.append(line)
        weight += part.weight
        if weight > MAX_TABLES:
            raise UnsupportedFeature(f"VMDK extents with {weight >> 20} MiB of directories")
        start += line.sectors * SECTOR
    image.use_parts(parts, [line.name for line in lines], [line.access for line in lines])


def _file_of(
    line: ExtentLine, number: int, slots: dict[str, tuple[str, bool]], writable: bool
) -> Procedure:
    """Open the file of an extent; several flat ones may be in the same.  Returns the slot."""
    assert line.name is not None
    sparse = line.type in SPARSE_TYPES
    known = slots.get(line.name)
    if known is not None:
        if sparse or known[1]:
            raise MalformedImage(
                f"line {line.line} of the descriptor: a second extent in a sparse file"
            )
        return known[0]
    slot = f"extent.{number}"
    slots[line.name] = slot, sparse
    yield Open(slot, line.name, writable=writable)
    return slot


def open_extent(image: Vmdk, slot: str, start: int, line: ExtentLine, number: int) -> Procedure:
    """The `Part` for an extent line: ``length`` bytes of the disk from ``start``, in ``slot``.

    Raises CorruptImage for a file that is too short, and whatever the header of a sparse one does.
    """
    length = line.sectors * SECTOR
    if line.type not in SPARSE_TYPES:
        host = (line.offset or 0) * SECTOR
        there = yield Length(slot)
        # The last sector of a raw file may be cut short.
        if host + length > align_up(there, SECTOR) and not image.options.get("check"):
            raise CorruptImage(
                f"extent {number} ends at {host + length}, the file has only {there} bytes"
            )
        return Flat(image, slot, start, length, host, line.type, number)
    if line.offset:
        raise MalformedImage(
            f"line {line.line} of the descriptor: a sparse extent does not begin inside its file"
        )
    (head,) = yield Read(slot, [(0, SECTOR)])
    if head[:8] == SESPARSE:
        from .sesparse.part import open_sesparse

        return (yield from open_sesparse(image, slot, start, length))
    if head[:4] not in (KDMV, COWD):
        raise MalformedImage("not a sparse VMDK extent", offset=0)
    header = yield from read_header(slot)
    if header.capacity < line.sectors:
        raise MalformedImage(
            f"the extent has {header.capacity} sectors; the descriptor, line {line.line}, says "
            f"{line.sectors}"
        )
    return (yield from open_sparse_part(image, slot, start, length, header, line.access))


def open_sparse_part(
    image: Vmdk,
    slot: str,
    start: int,
    length: int,
    header: Hosted | Esx,
    access: str = RW,
) -> Procedure:
    """Open the sparse extent in ``slot`` whose checked header is ``header``; returns its part."""
    if isinstance(header, Hosted) and header.compressed:
        from .stream.part import open_stream

        part = yield from open_stream(image, slot, start)
        part.length = length
        return part
    from .sparse.part import open_sparse

    writable = image.writable and access == RW and not image.options.get("check")
    return (yield from open_sparse(image, slot, start, length, header, writable))


def _open_parent(image: Vmdk) -> Procedure:
    name = image.backing_file
    if "backing" in image.options:
        image.has_backing = image.options["backing"] is not None
    elif name:
        image.has_backing = True
        yield Open("backing", name, "vmdk")
    elif image.descriptor is not None and image.descriptor.parent_cid != NO_CONTENT:
        raise MalformedImage(
            "the image has a parent that it does not name", field="parentFileNameHint"
        )
