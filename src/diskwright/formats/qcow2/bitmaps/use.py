"""The bitmap directory of an open image, and who may rely on it.

While a bitmap that is to follow all writes is not stored anew it is *in use*: whoever finds it so
knows that it may have missed some.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ....bitmaps import BitmapSet, DirtyBitmap
from ....contract import Barrier, Length, MetaWrite, Procedure, Read, Write
from ....errors import CorruptImage, MalformedImage
from ....hints import TYPE_CHECKING
from .. import header as hd
from ..machine.core import SLOT
from .directory import (
    AUTO,
    FLAGS_AT,
    IN_USE,
    Entry,
    Place,
    parse_directory,
    parse_place,
    shown,
    usable,
)

if TYPE_CHECKING:
    from ..format import Qcow2
    from ..image import Image


class Directory:
    """What is on disk.  ``entries``: those of the image's bitmaps by name; one that was removed and
    is still on disk is in ``stored`` alone."""

    def __init__(self, place: Place, stored: list[Entry]) -> None:
        self.place = place
        self.stored = stored
        self.entries = {shown(entry.name): entry for entry in stored}

    def _pending(self, bitmaps: BitmapSet) -> Iterator[Entry]:
        for entry in self.stored:
            if entry.flags & IN_USE:
                continue
            bitmap = bitmaps.find(shown(entry.name))
            if entry.flags & AUTO or (bitmap is not None and bitmap.enabled):
                yield entry

    def pending(self, bitmaps: BitmapSet) -> bool:
        """Some bitmap must be marked as in use before the next write."""
        return next(self._pending(bitmaps), None) is not None

    def in_use_writes(self, bitmaps: BitmapSet) -> list[MetaWrite]:
        """The writes that mark them so."""
        return [self.flags_write(e, e.flags | IN_USE) for e in self._pending(bitmaps)]

    def set_in_use(self, bitmaps: BitmapSet) -> None:
        """Those writes are durable."""
        for entry in list(self._pending(bitmaps)):
            entry.flags |= IN_USE

    def flags_write(self, entry: Entry, flags: int) -> MetaWrite:
        """Entries begin at multiples of 8, so that no sector ends within their flags."""
        at = self.place.offset + entry.at + FLAGS_AT
        return MetaWrite(SLOT, at, struct.pack(">I", flags))


def read_directory(image: Image) -> Procedure:
    """The Directory of an image, None without one.  Raises MalformedImage.

    Without the autoclear bit there is none: a program that knows no bitmaps has written since, so
    none of them is true any more.
    """
    h = image.header
    if h.version < 3 or not h.autoclear & hd.BITMAPS:
        return None
    place = parse_place(h)
    if place is None:
        return None
    length = yield Length(SLOT)
    if place.offset + place.size > length:
        raise MalformedImage("Bitmap directory is outside the file", field="bitmaps",
                             offset=place.offset)
    (raw,) = yield Read(SLOT, [(place.offset, place.size)])
    return Directory(place, parse_directory(raw, place, h))


def open_bitmaps(image: Image) -> Procedure:
    """Fill in the bitmaps of an image from its directory; their bits stay where they are.

    A damaged directory keeps nobody from reading the disk: ``bitmap_error`` tells of it, where it
    is not opened for writing.
    """
    checking = bool(image.options.get("check"))
    if checking and image.writable:
        return  # a repair keeps to what the file says
    try:
        image.directory = yield from read_directory(image)
    except MalformedImage as error:
        if image.writable:
            raise
        image.bitmap_error = error
        return
    if image.directory is None:
        return
    for name, entry in image.directory.entries.items():
        fits = usable(entry, image.size, image.cluster_bits)
        bitmap = DirtyBitmap(
            name,
            image.size,
            1 << entry.granularity_bits if fits else 1 << 31,
            enabled=bool(entry.flags & AUTO),
            persistent=True,
            budget=image.bitmaps.budget,
        )
        bitmap.inconsistent = not fits or bool(entry.flags & IN_USE)
        bitmap.loaded = False
        image.bitmaps.add(bitmap)


def use_bitmap(image: Qcow2, bitmap: DirtyBitmap) -> Procedure:
    """What is stored of ``bitmap`` is not to be relied on from now on; durable at the end."""
    directory = image.directory
    entry = directory.entries.get(bitmap.name) if directory is not None else None
    if directory is None or entry is None or entry.flags & IN_USE:
        return
    yield Write([directory.flags_write(entry, entry.flags | IN_USE)])
    yield Barrier()
    entry.flags |= IN_USE


def describe(directory: Directory | None) -> list[dict[str, object]]:
    """The bitmaps as ``qemu-img info --output=json`` shows them."""
    if directory is None:
        return []
    names = ((IN_USE, "in-use"), (AUTO, "auto"))
    return [
        {
            "flags": [name for bit, name in names if entry.flags & bit],
            "name": shown(entry.name),
            "granularity": 1 << entry.granularity_bits,
        }
        for entry in directory.stored
    ]


def bad_entry(bitmap: DirtyBitmap, index: int, entry: int) -> CorruptImage:
    """An entry of a bitmap's table that means nothing."""
    return CorruptImage(
        f"Bitmap '{bitmap.name}': table entry {index} is invalid: {entry:#x}", field="bitmap table"
    )
