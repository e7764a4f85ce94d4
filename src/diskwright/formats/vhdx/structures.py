"""The structures before the first mebibyte: file identifier, headers and region tables (MS-VHDX
2.2), and what all of VHDX shares: GUIDs, signatures, places and bounds.

GUIDs are kept as they are stored: 16 bytes, the first three fields little-endian.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from ...codecs.crc32c import crc32c
from ...errors import CorruptImage, MalformedImage, UnsupportedFeature
from ...ondisk import Fields
from ...records import NamedTuple

KIB, MIB = 1 << 10, 1 << 20
SLOT = "file"

IDENTIFIER = b"vhdxfile"
HEADERS = (64 * KIB, 128 * KIB)
REGION_TABLES = (192 * KIB, 256 * KIB)
HEADER_SECTION = MIB
"""Nothing but identifier, headers and region tables is before this offset."""

HEADER_BYTES = 4 * KIB
REGION_TABLE_BYTES = 64 * KIB
_MOST_REGIONS = 2047
MAX_FILE = 1 << 47
"""No structure ends behind this: twice the largest disk."""

NO_GUID = bytes(16)
_GUID = struct.Struct("<IHH2s6s")


def guid(text: str) -> bytes:
    """``text`` (8-4-4-4-12, braces or not) as it is stored."""
    a, b, c, d, e = text.strip("{}").split("-")
    return _GUID.pack(int(a, 16), int(b, 16), int(c, 16), bytes.fromhex(d), bytes.fromhex(e))


def guid_text(stored: bytes) -> str:
    """A stored GUID in lower case with braces."""
    a, b, c, d, e = _GUID.unpack(stored)
    return f"{{{a:08x}-{b:04x}-{c:04x}-{d.hex()}-{e.hex()}}}"


def new_guid() -> bytes:
    """A random GUID."""
    from uuid import uuid4  # costs start-up time that reading an image does without

    return uuid4().bytes_le


BAT_REGION = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")

HEADER = Fields(
    "<",
    "Signature:4s Checksum:I SequenceNumber:Q FileWriteGuid:16s DataWriteGuid:16s LogGuid:16s "
    "LogVersion:H Version:H LogLength:I LogOffset:Q",
)
REGION_TABLE = Fields("<", "Signature:4s Checksum:I EntryCount:I Reserved:I")
REGION_ENTRY = Fields("<", "Guid:16s FileOffset:Q Length:I Required:I")


class Header(NamedTuple):
    """A header (2.2.2); ``slot`` is which of the two places it was read from."""

    slot: int
    sequence: int
    file_guid: bytes
    data_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int

    @property
    def offset(self) -> int:
        """Its place in the file."""
        return HEADERS[self.slot]

    def encode(self) -> bytes:
        """The 4 KiB of it."""
        data = HEADER.pack(
            b"head", 0, self.sequence, self.file_guid, self.data_guid, self.log_guid,
            self.log_version, self.version, self.log_length, self.log_offset,
        )
        return sealed(data.ljust(HEADER_BYTES, b"\0"))


def sealed(data: bytes) -> bytes:
    """``data``, whose bytes 4 to 7 are zero, with its checksum there."""
    return data[:4] + crc32c(data).to_bytes(4, "little") + data[8:]


def is_sealed(data: bytes) -> bool:
    """True when the checksum in bytes 4 to 7 is right."""
    stored = int.from_bytes(data[4:8], "little")
    return crc32c(data[:4] + bytes(4) + data[8:]) == stored


def parse_header(data: bytes, slot: int) -> Header | None:
    """The header in ``data`` (4 KiB); None when signature or checksum are wrong."""
    if data[:4] != b"head" or not is_sealed(data):
        return None
    return Header(slot, *HEADER.unpack_from(data)[2:])


def current_header(first: bytes, second: bytes) -> Header:
    """The header that is in force.

    Two valid ones with equal sequence numbers are accepted only when they say the same (some
    writers leave such a pair).  Raises CorruptImage when none is valid.
    """
    found = [h for h in (parse_header(first, 0), parse_header(second, 1)) if h is not None]
    if not found:
        raise CorruptImage("No valid VHDX header found", field="header", offset=HEADERS[0])
    if len(found) == 2 and found[0].sequence == found[1].sequence:
        if first != second:
            raise CorruptImage(
                "Both VHDX headers are valid, have the same sequence number and differ",
                field="SequenceNumber",
                offset=HEADERS[0] + 8,
            )
        return found[0]
    return max(found, key=lambda h: h.sequence)


def check_header(h: Header) -> None:
    """Raise UnsupportedFeature or MalformedImage for a header that is not to be gone by."""
    if h.version != 1:
        raise UnsupportedFeature(f"VHDX version {h.version}", offset=h.offset + 66)
    if h.log_version != 0:
        raise UnsupportedFeature(f"VHDX log version {h.log_version}", offset=h.offset + 64)
    if h.log_length % MIB or (h.log_guid != NO_GUID and not h.log_length):
        raise MalformedImage(
            f"log of {h.log_length:#x} bytes", field="LogLength", offset=h.offset + 68
        )
    if h.log_length and (
        h.log_offset % MIB or not HEADER_SECTION <= h.log_offset <= MAX_FILE - h.log_length
    ):
        raise MalformedImage(
            f"log at {h.log_offset:#x}", field="LogOffset", offset=h.offset + 72
        )


class Region(NamedTuple):
    """An entry of the region table (2.2.3.2)."""

    kind: bytes
    offset: int
    length: int
    required: bool

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


def parse_regions(data: bytes, place: int) -> list[Region]:
    """The regions of the table in ``data`` (64 KiB), read from ``place``.

    Raises MalformedImage when it breaks the specification (2.2.3): signature, checksum, count,
    alignment, overlaps, a kind that is there twice.  What is unknown is left to the caller.
    """
    if data[:4] != b"regi" or not is_sealed(data):
        raise MalformedImage("no valid region table", field="region table", offset=place)
    count = REGION_TABLE.unpack_from(data)[2]
    if count > _MOST_REGIONS:
        raise MalformedImage(f"{count} regions", field="EntryCount", offset=place + 8)
    regions: list[Region] = []
    for number in range(count):
        at = REGION_TABLE.size + number * REGION_ENTRY.size
        kind, offset, length, flags = REGION_ENTRY.unpack_from(data, at)
        if (
            offset % MIB
            or length % MIB
            or not length
            or not HEADER_SECTION <= offset <= MAX_FILE - length
        ):
            raise MalformedImage(
                f"region {guid_text(kind)} at {offset:#x}, {length:#x} bytes",
                field=f"region {number}",
                offset=place + at,
            )
        regions.append(Region(kind, offset, length, bool(flags & 1)))
    if len({region.kind for region in regions}) < count:
        raise MalformedImage("a region is there twice", field="region table", offset=place)
    check_apart([(r.offset, r.length, f"region {guid_text(r.kind)}") for r in regions], place)
    return regions


def check_apart(parts: list[tuple[int, int, str]], place: int) -> None:
    """Raise MalformedImage when two of (offset, length, name) overlap."""
    ordered = sorted(parts)
    for before, after in pairwise(ordered):
        if before[0] + before[1] > after[0]:
            raise MalformedImage(
                f"{before[2]} and {after[2]} overlap", field="region table", offset=place
            )


def encode_regions(regions: list[Region]) -> bytes:
    """The 64 KiB of a region table."""
    data = REGION_TABLE.pack(b"regi", 0, len(regions), 0)
    for region in regions:
        data += REGION_ENTRY.pack(region.kind, region.offset, region.length, region.required)
    return sealed(data.ljust(REGION_TABLE_BYTES, b"\0"))


def identifier(creator: str) -> bytes:
    """The 64 KiB of the file identifier (2.2.1); ``creator`` has at most 255 UTF-16 units."""
    name = creator.encode("utf-16-le")[:510]
    return (IDENTIFIER + name).ljust(64 * KIB, b"\0")
