"""The bitmap directory on disk (qcow2 specification, "Bitmaps extension" and "Bitmaps")."""

from __future__ import annotations

from collections.abc import Iterable

from ....errors import MalformedImage
from ....ondisk import Fields
from ....units import align_up
from .. import header as hd

IN_USE, AUTO, EXTRA_COMPATIBLE = 1, 2, 4
KNOWN_FLAGS = IN_USE | AUTO | EXTRA_COMPATIBLE
DIRTY_TRACKING = 1
"""The only type that is defined."""

MAX_BITMAPS = 65535
MAX_DIRECTORY = 64 << 20
MAX_NAME = 1023
MAX_DATA = 512 << 20
"""Bytes that the clusters of one bitmap may take; other programs have the same limit."""
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
MAX_TABLE = MAX_DATA >> 9
"""Entries of a table: of clusters of 512 bytes, of which larger ones need fewer."""

EXTENSION = Fields(
    ">",
    "nb_bitmaps:I reserved:I bitmap_directory_size:Q bitmap_directory_offset:Q",
)
ENTRY = Fields(
    ">",
    "bitmap_table_offset:Q bitmap_table_size:I flags:I type:B granularity_bits:B name_size:H "
    "extra_data_size:I",
)
FLAGS_AT = ENTRY.offset_of("flags")
"""Where an entry has its flags."""

ENTRY_OFFSET = (1 << 56) - (1 << 9)
"""Bits 9-55 of an entry of a bitmap table: where a cluster of bits is."""
ALL_ONES = 1
"""An entry without a cluster whose bits are all set; 0: none is."""


class Place:
    """What the header extension says: ``count`` bitmaps, ``size`` bytes of directory at
    ``offset``."""

    __slots__ = ("count", "offset", "size")

    def __init__(self, count: int, size: int, offset: int) -> None:
        self.count, self.size, self.offset = count, size, offset

    def encode(self) -> bytes:
        """The data of the extension."""
        return EXTENSION.pack(self.count, 0, self.size, self.offset)


class Entry:
    """One bitmap of the directory.  ``at``: where the entry begins in it, in bytes."""

    __slots__ = ("at", "extra", "flags", "granularity_bits", "kind", "name", "table_offset",
                 "table_size")

    def __init__(self, name: bytes, granularity_bits: int, flags: int = 0) -> None:
        self.name = name
        self.granularity_bits = granularity_bits
        self.flags = flags
        self.kind = DIRTY_TRACKING
        self.extra = b""
        self.table_offset = 0
        self.table_size = 0
        self.at = 0

    def encode(self) -> bytes:
        """The entry, padded to 8 bytes."""
        head = ENTRY.pack(self.table_offset, self.table_size, self.flags, self.kind,
                           self.granularity_bits, len(self.name), len(self.extra))
        out = head + self.extra + self.name
        return out.ljust(align_up(len(out), 8), b"\0")


def table_entries(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Entries of the table of a bitmap of a disk of ``size`` bytes; a table has at least one."""
    bits = -(-size >> granularity_bits)
    return max(-(-bits >> 3 + cluster_bits), 1)


def parse_place(h: hd.Header) -> Place | None:
    """The header extension, bounded; None without one.  Raises MalformedImage."""
    data = h.extension(hd.EXT_BITMAPS)
    if data is None:
        return None
    if len(data) != EXTENSION.size:
        raise _bad(f"bitmaps_ext: Invalid extension length: {len(data)}")
    count, reserved, size, offset = EXTENSION.unpack(data)
    if reserved:
        raise _bad("bitmaps_ext: Reserved field is not zero")
    if count > MAX_BITMAPS:
        raise _bad(f"bitmaps_ext: image has {count} bitmaps, exceeding the limit of {MAX_BITMAPS}")
    if not count:
        raise _bad("bitmaps_ext: found bitmaps extension with zero bitmaps")
    if offset & (1 << h.cluster_bits) - 1:
        raise _bad("bitmaps_ext: invalid bitmap directory offset")
    if size > MAX_DIRECTORY:
        raise _bad(f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported "
                   f"size ({MAX_DIRECTORY})")
    if not offset or offset + size > hd.MAX_OFFSET or size < count * ENTRY.size:
        raise _bad("bitmaps_ext: invalid bitmap directory")
    return Place(count, size, offset)


def parse_directory(raw: bytes, place: Place, h: hd.Header) -> list[Entry]:
    """All entries, bounded.  Raises MalformedImage naming the field and the offset."""
    out: list[Entry] = []
    names: set[bytes] = set()
    at = 0
    while at < len(raw):
        start = place.offset + at
        if len(out) == place.count:
            raise _bad("More bitmaps found than specified in header extension", start)
        if len(raw) - at < ENTRY.size:
            raise _bad("Broken bitmap directory", start)
        entry = Entry(b"", 0)
        (entry.table_offset, entry.table_size, entry.flags, entry.kind, entry.granularity_bits,
         name_length, extra_length) = ENTRY.unpack_from(raw, at)
        entry.at = at
        middle = at + ENTRY.size + extra_length
        end = middle + name_length
        at = align_up(end, 8)
        if at > len(raw):
            raise _bad("Broken bitmap directory", start)
        entry.extra = raw[start - place.offset + ENTRY.size : middle]
        entry.name = raw[middle:end]
        _check(entry, h, start)
        if entry.name in names:
            raise _bad(f"Bitmap '{shown(entry.name)}' is there twice", start)
        names.add(entry.name)
        out.append(entry)
    if len(out) != place.count:
        raise _bad("Less bitmaps found than specified in header extension", place.offset)
    return out


def shown(name: bytes) -> str:
    """A name as it is printed; bytes that are not UTF-8 survive as surrogates."""
    return name.decode("utf-8", "surrogateescape")


def _check(entry: Entry, h: hd.Header, at: int) -> None:
    what = f"Bitmap '{shown(entry.name)}' doesn't satisfy the constraints"
    if not 0 < len(entry.name) <= MAX_NAME:
        raise _bad(what + ": name length", at)
    if entry.table_offset & (1 << h.cluster_bits) - 1 or not entry.table_offset:
        raise _bad(what + ": table offset", at)
    if not 0 < entry.table_size <= MAX_TABLE or entry.table_size << h.cluster_bits > MAX_DATA:
        raise _bad(what + ": table size", at)
    if entry.table_offset + 8 * entry.table_size > hd.MAX_OFFSET:
        raise _bad(what + ": table offset", at)
    if entry.granularity_bits > 63:
        raise _bad(what + ": granularity", at)


def usable(entry: Entry, size: int, cluster_bits: int) -> bool:
    """Whether this version can keep the bitmap true for a disk of ``size`` bytes: its type, flags
    and extra data are known, its granularity and table fit."""
    return (
        entry.kind == DIRTY_TRACKING
        and not entry.flags & ~KNOWN_FLAGS
        and (not entry.extra or bool(entry.flags & EXTRA_COMPATIBLE))
        and MIN_GRANULARITY_BITS <= entry.granularity_bits <= MAX_GRANULARITY_BITS
        and entry.table_size == table_entries(size, entry.granularity_bits, cluster_bits)
    )


def encode_directory(entries: Iterable[Entry]) -> bytes:
    """The whole directory; sets ``at`` of every entry."""
    out = bytearray()
    for entry in entries:
        entry.at = len(out)
        out += entry.encode()
    return bytes(out)


def _bad(text: str, at: int | None = None) -> MalformedImage:
    return MalformedImage(text, field="bitmaps", offset=at)
