"""The partitions of a disk, by its GPT or MBR: where they are, of what type, and what they are
called.  The guest wrote the tables, so nothing in them is believed before it fits the disk."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

from ..records import NamedTuple

Read = Callable[[int, int], bytes]
"""Reads (offset, length) of a disk, all of it inside."""

MOST_LOGICAL = 128
"""Logical partitions that are followed; their list is a chain, which may be a ring."""
MOST_ENTRIES = 1 << 20
"""Bytes of a GPT's entries (the usual 128 have 16 KiB)."""
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_GPT = struct.Struct("<8s4sII4xQQQQ16sQIII")


class Partition(NamedTuple):
    """``start`` and ``size`` are bytes; ``type`` is the GUID of a GPT or the two hexadecimal digits
    of an MBR; ``name`` is what a GPT calls it.  ``number`` is the one that Linux gives it."""

    number: int
    start: int
    size: int
    type: str
    name: str = ""


def partitions(read: Read, size: int) -> list[Partition]:
    """Those of a disk of ``size`` bytes, by their numbers: of its GPT, of which the backup counts
    where the first is damaged, and else of its MBR.  What does not lie inside the disk is left
    out."""
    if size < 1024:
        return []
    table = _gpt(read, size)
    found = _mbr(read, size) if table is None else table
    return [p for p in found if p.start > 0 and p.size > 0 and p.start + p.size <= size]


def _gpt(read: Read, size: int) -> list[Partition] | None:
    """UEFI specification 2.10, 5.3; None where there is none, or no good one."""
    for sector in (512, 4096):
        if size < 3 * sector:
            continue
        for at in (sector, size - size % sector - sector):
            table = _gpt_at(read, size, at, sector)
            if table is not None:
                return table
    return None


def _gpt_at(read: Read, size: int, at: int, sector: int) -> list[Partition] | None:
    raw = read(at, sector)
    mark, _, length, crc, own, _, _, _, _, lba, count, step, entries_crc = _GPT.unpack_from(raw)
    if mark != b"EFI PART" or not 92 <= length <= sector or own * sector != at:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != crc:
        return None
    if step < 128 or step % 8 or count * step > MOST_ENTRIES or lba * sector + count * step > size:
        return None
    entries = read(lba * sector, count * step)
    if zlib.crc32(entries) != entries_crc:
        return None
    found = []
    for number in range(count):
        entry = entries[number * step : number * step + 128]
        if any(entry[:16]):
            first, last = struct.unpack_from("<QQ", entry, 32)
            name = entry[56:].decode("utf-16-le", "replace").partition("\0")[0]
            start, end = first * sector, (last + 1) * sector
            found.append(Partition(number + 1, start, end - start, _guid(entry), name))
    return found


def _guid(raw: bytes) -> str:
    a, b, c = struct.unpack_from("<IHH", raw)
    return f"{a:08x}-{b:04x}-{c:04x}-{raw[8:10].hex()}-{raw[10:16].hex()}"


def _entries(raw: bytes) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of the four entries of a boot record."""
    if raw[510:512] != b"\x55\xaa" or any(raw[at] not in (0, 0x80) for at in range(446, 510, 16)):
        return []  # other boot sectors end with the same two bytes
    return [(raw[at + 4], *struct.unpack_from("<II", raw, at + 8)) for at in range(446, 510, 16)]


def _mbr(read: Read, size: int) -> Iterator[Partition]:
    """The four primary partitions, and the logical ones in an extended one."""
    extended = 0
    for number, (kind, first, count) in enumerate(_entries(read(0, 512)), 1):
        if kind in _EXTENDED:
            extended = extended or first
        elif kind not in (0, _PROTECTIVE):
            yield Partition(number, first * 512, count * 512, f"{kind:02x}")
    if extended:
        yield from _logical(read, size, extended)


def _logical(read: Read, size: int, extended: int) -> Iterator[Partition]:
    """Each boot record tells of one partition, relative to itself, and of the next record, relative
    to the first."""
    record, seen = extended, set[int]()
    while len(seen) < MOST_LOGICAL and record not in seen and (record + 1) * 512 <= size:
        seen.add(record)
        entries = _entries(read(record * 512, 512))[:2]
        if len(entries) < 2:
            return
        (kind, first, count), (link, following, _) = entries
        if kind and kind not in _EXTENDED:
            yield Partition(4 + len(seen), (record + first) * 512, count * 512, f"{kind:02x}")
        if link not in _EXTENDED:
            return
        record = extended + following
