"""What a disk begins with: partition tables and file systems that a reader of the raw bytes would
find.  A file that is an image *and* has one of these at its beginning can be read in two ways."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from .result import CONTENT, Match

LOOKED_AT = 64 << 10
"""Bytes of the beginning, and of the end, that are needed."""
_ENTRIES = range(446, 510, 16)
_PROTECTIVE = 0xEE
_ISO = 16 * 2048
_GPT = struct.Struct("<8sIIIIQQ")


def contents(head: bytes, tail: bytes, length: int) -> Iterator[Match]:
    """All of them, by the file's first and last bytes."""
    mbr = _mbr(head)
    if mbr is not None:
        yield Match("mbr", CONTENT, 0, mbr)
    for sector in (512, 4096):
        if head[sector : sector + 8] == b"EFI PART":
            yield Match("gpt", CONTENT, sector, _gpt(head[sector:], sector, length))
        elif tail[-sector:].startswith(b"EFI PART") and len(tail) >= sector:
            yield Match("gpt", CONTENT, -sector, "backup header alone")
    if head[_ISO + 1 : _ISO + 6] == b"CD001":
        yield Match("iso9660", CONTENT, _ISO)


def _mbr(head: bytes) -> str | None:
    """What kind of MBR it is; None where there is none.  Other boot sectors end with the same two
    bytes, so the entries have to make sense."""
    if head[510:512] != b"\x55\xaa":
        return None
    used = []
    for at in _ENTRIES:
        status, kind = head[at], head[at + 4]
        start, count = struct.unpack_from("<II", head, at + 8)
        if status not in (0, 0x80):
            return None
        if kind:
            if not count:
                return None
            used.append((kind, start))
    if not used:
        return None
    protective = any(kind == _PROTECTIVE for kind, _ in used)
    if protective:
        return "protective" if len(used) == 1 else "hybrid"
    return f"{len(used)} partition" + "s" * (len(used) > 1)


def _gpt(raw: bytes, sector: int, length: int) -> str:
    """UEFI specification 2.10, 5.3.2."""
    _, _, size, crc, _, _, other = _GPT.unpack_from(raw.ljust(_GPT.size, b"\0"))
    if not 92 <= size <= min(sector, len(raw)):
        return "malformed header"
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) != crc:
        return "header checksum does not match"
    if (other + 1) * sector > length:
        return "its backup is behind the end of the file"
    return ""
