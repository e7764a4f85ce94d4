"""Changing the size of a VMDK image, and dropping all of its data."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...contract import (
    Barrier,
    Create,
    Length,
    Procedure,
    Quiesce,
    Truncate,
    Write,
)
from ...errors import DiskError, NotSupported, UsageError
from ...hints import TYPE_CHECKING, Any
from ...units import SECTOR, align_up
from .backing import rewrite
from .creation import PREALLOCATIONS, SPLIT
from .descriptor import DEVICE_TYPES, FLAT_TYPES, RW, Descriptor, ExtentLine, parse
from .flat import Empty, Flat
from .format import BEFORE
from .hiding import hide_parent
from .opening import open_extent
from .sparse.header import read_header
from .sparse.layout import new_cowd, new_hosted
from .sparse.part import SparsePart, open_sparse
from .sparse.resize import check_changeable, cut, empty, grow, shrink

if TYPE_CHECKING:
    from .format import Vmdk
    from .parts import Part

_SPLIT_TYPES = ("twogbmaxextentsparse", "twogbmaxextentflat", "2gbmaxextentsparse",
                "2gbmaxextentflat")  # fmt: skip
_NUMBERED = re.compile(r"([^/\\]*-[sf])([0-9]+)(\.[^.]*)?")
_MOST_PASSED = 4096


def resize(image: Vmdk, size: int, preallocation: str, do_shrink: bool) -> Procedure:
    """Change the virtual size to ``size`` bytes (a multiple of 512); new space reads as zeroes.

    A crash leaves the old or the new size; of a shrinking image the end may be gone already.
    Raises UsageError for sizes and modes that do not go, NotSupported for extents whose size
    cannot be changed.
    """
    image.check_write()
    if size % SECTOR or size < SECTOR:
        raise UsageError("The new size must be a multiple of 512")
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
    if image.descriptor is None or image.place is None or not image.parts:
        raise NotSupported("An image without extents cannot be resized")
    text = parse(image.descriptor.encode())
    if size < image.size:
        if not do_shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.")
        if preallocation != "off":
            raise UsageError("Preallocation can't be used for shrinking an image")
        yield from _shrink(image, text, size)
    elif size > image.size:
        yield from _grow(image, text, size, preallocation)


# -- growing
def _grow(image: Vmdk, text: Descriptor, size: int, preallocation: str) -> Procedure:
    last = image.parts[-1]
    old, lines = image.size, text.extents
    wanted = _grown_lines(text, last, (size - old) // SECTOR)
    length = wanted[len(lines) - 1].sectors * SECTOR if wanted else last.length + size - old
    _check_part(image, last, image.access[-1], length)
    if preallocation != "off" and not isinstance(last, Flat):
        raise NotSupported("Only flat extents can be preallocated")
    if isinstance(last, Flat):
        yield from _check_end_of_file(last)
    # New files first: as long as nothing refers to them, they go again when something fails.
    for number in range(len(lines), len(wanted)):
        name = _next_name(wanted[number - 1].name or "")
        line = wanted[number]._replace(name=name)
        slot = f"extent.{number}"
        wanted[number] = yield from _new_extent(image, last, slot, line, preallocation)
    _resized_text(image, wanted, size)  # while nothing has changed
    yield from announce(image)
    text = _resized_text(image, wanted, size)
    if length > last.length:
        if isinstance(last, SparsePart):
            yield from grow(last, length // SECTOR)
        elif hasattr(last, "resize"):
            yield from last.resize(length // SECTOR)
        else:
            assert isinstance(last, Flat)
            yield Truncate(last.slot, last.host + length, preallocation)
    yield Barrier()
    yield from _switch(image, text, len(image.parts) - 1, length)
    assert image.size == size
    if image.has_backing:
        yield from hide_parent(image, old)


def _resized_text(image: Vmdk, extents: Sequence[ExtentLine], size: int) -> Descriptor:
    """The present descriptor with these extents (none: it names none), of a disk of ``size`` bytes.
    Raises NoSpace when it does not fit where it is."""
    assert image.descriptor is not None and image.place is not None
    text = parse(image.descriptor.encode())
    if extents:
        text.set_extents(extents)
    text.set_geometry(image.size // SECTOR, size // SECTOR)
    image.place.padded(text.encode())
    return text


def _grown_lines(text: Descriptor, last: Part, more: int) -> list[ExtentLine]:
    """The extent lines of a disk that has ``more`` sectors, further ones still without a name of
    their own; none where the text has none."""
    lines = text.extents
    if not lines:
        return []
    if lines[-1].sectors == 0:
        raise NotSupported("The last extent is empty")
    most = 1 << 62
    if text.create_type.lower() in _SPLIT_TYPES:
        most = lines[0].sectors if len(lines) > 1 else max(SPLIT // SECTOR, lines[0].sectors)
    have = last.length // SECTOR
    first = min(more, max(most - have, 0))
    wanted = [*lines[:-1], lines[-1]._replace(sectors=have + first)]
    more -= first
    while more:
        length = min(more, most)
        wanted.append(wanted[-1]._replace(sectors=length, line=0))
        more -= length
        if len(wanted) > 4096:
            raise UsageError("The image would have more than 4096 extents")
    if len(wanted) > len(lines):
        _next_name(lines[-1].name or "")
        if lines[-1].device or lines[-1].offset:
            raise NotSupported("The last extent cannot be continued in another file")
    return wanted


def _next_name(name: str) -> str:
    """``x-s009.vmdk`` is followed by ``x-s010.vmdk``.  Raises NotSupported for other names."""
    found = _NUMBERED.fullmatch(name)
    if found is None:
        raise NotSupported(f"The extent behind '{name}' has no name that follows from it")
    digits = found[2]
    return f"{found[1]}{int(digits) + 1:0{len(digits)}}{found[3] or ''}"


def _new_extent(
    image: Vmdk, last: Part, slot: str, line: ExtentLine, preallocation: str
) -> Procedure:
    """Make the file of a further extent, which is like ``last``; returns its line.  A file that
    is there belongs to somebody else, or to this image when it was larger: it is passed over."""
    for _ in range(_MOST_PASSED):
        try:
            yield Create(slot, line.name or "")
            break
        except FileExistsError:
            line = line._replace(name=_next_name(line.name or ""))
    else:
        raise NotSupported(f"There are files in the place of all extents before '{line.name}'")
    if isinstance(last, Flat):
        yield Truncate(slot, line.sectors * SECTOR, preallocation)
    elif line.type == "VMFSSPARSE":
        yield from new_cowd(slot, line.sectors, last.unit // SECTOR)
    else:
        assert isinstance(last, SparsePart)
        yield from new_hosted(slot, line.sectors, None, last.layout.zeroed)
    yield Barrier()
    return line


# -- shrinking
def _shrink(image: Vmdk, text: Descriptor, size: int) -> Procedure:
    index = next(i for i, part in enumerate(image.parts) if part.start + part.length >= size)
    part, gone = image.parts[index], image.parts[index + 1 :]
    length = size - part.start
    if length < part.length:
        _check_part(image, part, image.access[index], length)
    lines = [line for line in text.extents if line.sectors]
    kept = [*lines[:index], lines[index]._replace(sectors=length // SECTOR)] if lines else []
    yield from announce(image)
    text = _resized_text(image, kept, size)
    dropped: Any = []
    if isinstance(part, SparsePart) and length < part.length:
        dropped = yield from cut(part, length // SECTOR)
    yield from rewrite_text(image, text)
    if isinstance(part, SparsePart) and length < part.length:
        yield from shrink(part, length // SECTOR, dropped)
    elif hasattr(part, "resize") and length < part.length:
        yield from part.resize(length // SECTOR)
    yield from _cut_files(image, part, length, gone)
    yield from _switch(image, text, index, length)


def _cut_files(image: Vmdk, part: Part, length: int, gone: Sequence[Part]) -> Procedure:
    """Give back what the files of flat extents, and of those that are gone, still hold."""
    used = {other.slot for other in image.parts if other not in gone and other is not part}
    if isinstance(part, Flat) and part.slot not in used and part.type in FLAT_TYPES:
        yield from _quietly(part.slot, part.host + length)
    for other in gone:
        device = isinstance(other, Empty) or (
            isinstance(other, Flat) and (other.type in DEVICE_TYPES or other.host > 0)
        )
        if other.slot not in (*used, part.slot) and not device:
            yield from _quietly(other.slot, 0)


def _quietly(slot: str, size: int) -> Procedure:
    # The disk ends before it already: a file that cannot be cut keeps its length.
    try:
        if size < (yield Length(slot)):
            yield Truncate(slot, size)
    except (OSError, DiskError):
        pass


# -- both
def _check_part(image: Vmdk, part: Part, access: str, length: int) -> None:
    """Raise NotSupported where an extent cannot become one of ``length`` bytes."""
    if access != RW:
        raise NotSupported(f"An extent that is {access} cannot be resized")
    if isinstance(part, SparsePart):
        check_changeable(part)
    elif hasattr(part, "check_resize"):
        part.check_resize(length // SECTOR)
    elif not isinstance(part, Flat) or part.type in DEVICE_TYPES:
        kind = part.info().get("format", "")
        raise NotSupported(f"Extents of this type ({kind or 'compressed'}) cannot be resized")


def _check_end_of_file(part: Flat) -> Procedure:
    length = yield Length(part.slot)
    if align_up(length, SECTOR) > part.host + part.length:
        raise NotSupported("The last extent does not end with its file, and cannot grow in it")


def rewrite_text(image: Vmdk, text: Descriptor) -> Procedure:
    """Store the descriptor, which is ``text`` now."""
    assert image.place is not None
    yield from rewrite(image.place, text)
    image.descriptor = text


def _switch(image: Vmdk, text: Descriptor, index: int, length: int) -> Procedure:
    """Store the descriptor and use what it says: part ``index`` has ``length`` bytes now, what was
    behind it is gone, what the descriptor names further is added."""
    yield from rewrite_text(image, text)
    yield Quiesce()
    parts = list(image.parts[:index])
    part = image.parts[index]
    if isinstance(part, SparsePart):
        part = yield from reopened(image, part, length)
    else:
        part.length = length
    parts.append(part)
    names, access = list(image.names[: index + 1]), list(image.access[: index + 1])
    start = part.start + length
    lines = [(number, line) for number, line in enumerate(text.extents) if line.sectors]
    for number, line in lines[index + 1 :]:
        parts.append((yield from open_extent(image, f"extent.{number}", start, line, number)))
        names.append(line.name)
        access.append(line.access)
        start += line.sectors * SECTOR
    image.use_parts(parts, names, access)
    # New extents have not been said to be in use.
    image.ready = False


def reopened(image: Vmdk, part: SparsePart, length: int) -> Procedure:
    """A sparse extent, read again after its structure was changed."""
    header = yield from read_header(part.slot)
    return (yield from open_sparse(image, part.slot, part.start, length, header, False))


def announce(image: Vmdk) -> Procedure:
    """Make the `before` groups durable, where there are any."""
    image.check_write()
    if not image.ready:
        for group in image.before().groups:
            yield Write(group)
        yield Barrier()
        image.settle(BEFORE)


# -- emptying
def make_empty(image: Vmdk) -> Procedure:
    """Drop all guest data.  Raises NotSupported before anything is written when an extent is
    neither sparse nor one that holds nothing."""
    image.check_write()
    for part, access in zip(image.parts, image.access, strict=True):
        if access != RW and not isinstance(part, Empty):
            raise NotSupported(f"An extent that is {access} cannot be emptied")
        if isinstance(part, SparsePart):
            check_changeable(part)
        elif not isinstance(part, Empty) and not hasattr(part, "empty"):
            raise NotSupported("Only sparse extents can be emptied")
    return _make_empty(image)


def _make_empty(image: Vmdk) -> Procedure:
    yield from announce(image)
    parts = []
    for part in image.parts:
        if isinstance(part, SparsePart):
            yield from empty(part)
            yield Quiesce()
            part = yield from reopened(image, part, part.length)
        elif hasattr(part, "empty"):
            yield from part.empty()
        parts.append(part)
    image.use_parts(parts, image.names, image.access)
    yield Barrier()
