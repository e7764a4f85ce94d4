"""Which bitmaps an image can keep, and what changes of the disk ask of them."""

from __future__ import annotations

from ....bits import BitmapError
from ....contract import Procedure
from ....errors import UsageError
from ....hints import TYPE_CHECKING
from .. import header as hd
from .directory import (
    MAX_BITMAPS,
    MAX_DATA,
    MAX_DIRECTORY,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    MIN_GRANULARITY_BITS,
    Entry,
    table_entries,
)
from .use import use_bitmap

if TYPE_CHECKING:
    from ..format import Qcow2
    from ..image import Image


def check_bitmap(image: Image, name: str, granularity: int) -> None:
    """Raise BitmapError where a new bitmap like this cannot be kept in the image."""
    h = image.header
    if h.version < 3:
        raise BitmapError("Cannot store dirty bitmaps in qcow2 v2 files")
    image.check_write()
    encoded = name.encode("utf-8", "surrogateescape")
    bits = granularity.bit_length() - 1
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise BitmapError("Granularity must be power of 2 and at least 512")
    if len(encoded) > MAX_NAME:
        raise BitmapError(f"Name length exceeds maximum ({MAX_NAME} characters)")
    check_size(image, image.size, bits)
    kept = [bitmap.name for bitmap in image.bitmaps if bitmap.persistent]
    if len(kept) >= MAX_BITMAPS:
        raise BitmapError(
            f"Maximum number of persistent bitmaps is already reached ({MAX_BITMAPS})"
        )
    size = sum(
        len(Entry(each.encode("utf-8", "surrogateescape"), bits).encode())
        for each in [*kept, name]
    )
    if size > MAX_DIRECTORY:
        raise BitmapError("Not enough space in the bitmap directory")
    if h.extension(hd.EXT_BITMAPS) is None:
        new = h.copy()
        new.set_extension(hd.EXT_BITMAPS, bytes(24))
        try:
            new.encode()
        except UsageError as error:
            raise BitmapError(str(error)) from error


def check_size(image: Image, size: int, granularity_bits: int) -> None:
    """Raise BitmapError where the bits for a disk of ``size`` bytes are too many."""
    if table_entries(size, granularity_bits, image.cluster_bits) << image.cluster_bits > MAX_DATA:
        raise BitmapError(
            "Too much space will be occupied by the bitmap. Use larger granularity"
        )


def before_resize(image: Qcow2, size: int) -> Procedure:
    """All bits must be in memory, since tables of another length are needed, and none of the
    stored ones may be relied on while the disk has another size than they are for."""
    for bitmap in image.bitmaps:
        bitmap.check()
        if bitmap.persistent:
            check_size(image, size, bitmap.granularity.bit_length() - 1)
    for bitmap in image.bitmaps:
        if bitmap.persistent:
            yield from image.load_bitmap(bitmap)
            yield from use_bitmap(image, bitmap)


def drop_bitmaps(image: Qcow2) -> Procedure:
    """Remove all stored bitmaps and give their space back, before the image becomes one that has
    none.  Those that are in use by an operation are refused."""
    for bitmap in image.bitmaps:
        if bitmap.persistent and bitmap.busy:
            bitmap.check()
    for bitmap in image.bitmaps:
        if bitmap.persistent:
            image.drop_bitmap(bitmap)
            image.bitmaps.remove(bitmap)
    yield from image.store_bitmaps()
