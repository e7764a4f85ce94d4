"""What bytes say of themselves in an image whose own pointers are gone: pure functions.

An L2 table is told by its entries: aligned places inside the file, reserved bits clear, COPIED set.
Noise passes for one with a probability of nothing; another image inside this disk does not, so a
table counts less the more of what it names is known to belong to somebody else.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ....ondisk import big_endian_array
from ..machine.core import COPIED, OFFSET, PACKED, ZERO_FLAG
from ..machine.submapping import ALL, SUBCLUSTERS

_RESERVED = (1 << 62) - (1 << 56) | (1 << 9) - 2
BEHIND = "its place is behind the end of the file"
_DAMAGED = "its entry is damaged"
_TOPS = bytes([0, *range(0x40, 0x81)])
"""What the first byte of an entry may be."""
_COUNTS = bytes(range(4))
MIN_BITS, MAX_BITS = 9, 21
_VALUE = struct.Struct(">64Q")
_SECTOR = 512


class Geometry(NamedTuple):
    """Cluster bits, the file's length in bytes, and the version (2 has no zero flag)."""

    bits: int
    length: int
    version: int
    stride: int = 1
    """Words of an L2 entry: 2 of an extended one."""
    external: bool = False
    """Its places are in a data file."""

    @property
    def of_l1(self) -> Geometry:
        """What L1 entries are judged by."""
        return self._replace(stride=1, external=False)


class Seen(NamedTuple):
    """What a cluster would be as a table."""

    good: int
    beyond: int
    """Sound entries, but for a place behind the end of the file."""
    bad: int
    copied: int
    packed: int
    targets: array[int]
    """Host offsets of its standard entries."""


def entry_problem(entry: int, geometry: Geometry, bitmap: int = 0) -> str:
    """Why an L2 entry (an extended one: with its bitmap) cannot be right, "" when it can."""
    if geometry.external:
        return _external_problem(entry, geometry, bitmap)
    if bitmap and _bad_bitmap(bitmap, bool(entry & OFFSET and not entry & PACKED)):
        return _DAMAGED
    if entry & PACKED:
        host = entry & (1 << 62 - (geometry.bits - 8)) - 1
        if entry & COPIED:
            return _DAMAGED
        return "" if host < geometry.length else BEHIND
    host = entry & OFFSET
    if entry & _RESERVED or host & (1 << geometry.bits) - 1:
        return _DAMAGED
    if entry & ZERO_FLAG and geometry.version < 3:
        return _DAMAGED
    if entry & COPIED and not host:
        return _DAMAGED
    return "" if host < geometry.length else BEHIND


def _external_problem(entry: int, geometry: Geometry, bitmap: int) -> str:
    host = entry & OFFSET
    if entry & (_RESERVED | PACKED) or host & (1 << geometry.bits) - 1:
        return _DAMAGED
    if bitmap and _bad_bitmap(bitmap, bool(entry & (OFFSET | COPIED))):
        return _DAMAGED
    return ""


def _bad_bitmap(bitmap: int, placed: bool) -> bool:
    stored = bitmap & ALL
    return bool(stored & bitmap >> SUBCLUSTERS or (stored and not placed))


def look(data: bytes, geometry: Geometry) -> Seen:
    """Take a cluster for an L2 table."""
    good = beyond = bad = copied = packed = 0
    targets = array("Q")
    if data.count(0) == len(data):
        return Seen(0, 0, 0, 0, 0, targets)
    words = big_endian_array(64, data)
    bitmaps = words[1::2] if geometry.stride == 2 else None
    for index, entry in enumerate(words[:: geometry.stride]):
        bitmap = bitmaps[index] if bitmaps is not None else 0
        if not entry and not bitmap:
            continue
        why = entry_problem(entry, geometry, bitmap)
        if why:
            if why == BEHIND:
                beyond += 1
            else:
                bad += 1
            continue
        good += 1
        if entry & PACKED:
            packed += 1
        elif geometry.external:
            copied += entry >> 63
        elif entry & OFFSET:
            targets.append(entry & OFFSET)
            copied += entry >> 63
    return Seen(good, beyond, bad, copied, packed, targets)


def may_be_table(data: bytes, stride: int = 1) -> bool:
    """A quick look that refuses nearly everything that is no table."""
    tops = data[:: 8 * stride]
    return not tops.translate(None, _TOPS) and tops.count(0) != len(tops)


def is_table(seen: Seen) -> bool:
    """Strict: for a cluster that nothing names.  Without COPIED it could be a refcount table."""
    return not seen.bad and bool(seen.copied or seen.packed) and seen.beyond <= 8 * seen.good


def may_be_counts(data: bytes) -> bool:
    """A block of 16-bit reference counts of 0 to 3."""
    return data[0::2].count(0) * 2 == len(data) and not data[1::2].translate(None, _COUNTS)


def vote(window: bytes, length: int, votes: Counter[int]) -> None:
    """Let every sector of a table speak for a cluster size: the largest that divides all places in
    it.  Each entry more halves the chance that it is too large, so a sector counts by its
    entries."""
    tops = window[::8]
    for at in range(0, len(window) - _SECTOR + 1, _SECTOR):
        part = tops[at // 8 : (at + _SECTOR) // 8]
        if 0x80 not in part or part.translate(None, b"\0\x80"):
            continue
        together = count = 0
        for entry in _VALUE.unpack_from(window, at):
            if entry:
                if entry & _RESERVED or entry & OFFSET >= length:
                    break
                together |= entry & OFFSET
                count += 1
        else:
            if together:
                bits = (together & -together).bit_length() - 1
                votes[min(bits, MAX_BITS)] += count * count


def winner(votes: Counter[int]) -> int | None:
    """The cluster bits that most speaks for; None without any."""
    return votes.most_common(1)[0][0] if votes else None


def l1_entry_problem(entry: int, geometry: Geometry) -> str:
    """Why an L1 entry that is not 0 cannot be right, "" when it can."""
    host = entry & OFFSET
    if entry & ~(COPIED | OFFSET) or not host or host & (1 << geometry.bits) - 1:
        return "the L1 entry of its table is damaged"
    return "" if host < geometry.length else "its L2 table is behind the end of the file"


class Marks:
    """Which clusters of the file are named by something, and which by more than one entry.

    Two bits a cluster, made in pages when they are needed; beyond ``limit`` pages nothing is noted,
    and ``full`` says so."""

    _PAGE = 15

    def __init__(self, limit: int = 1 << 15) -> None:
        self._used: dict[int, bytearray] = {}
        self._shared: dict[int, bytearray] = {}
        self._soft: dict[int, bytearray] = {}
        self._limit = limit
        self.full = False

    def _set(self, pages: dict[int, bytearray], cluster: int) -> None:
        page = pages.get(cluster >> self._PAGE)
        if page is None:
            if len(self._used) + len(self._shared) + len(self._soft) >= self._limit:
                self.full = True
                return
            page = pages[cluster >> self._PAGE] = bytearray(1 << self._PAGE - 3)
        inside = cluster & (1 << self._PAGE) - 1
        page[inside >> 3] |= 1 << (inside & 7)

    @staticmethod
    def _get(pages: dict[int, bytearray], cluster: int) -> bool:
        page = pages.get(cluster >> Marks._PAGE)
        inside = cluster & (1 << Marks._PAGE) - 1
        return page is not None and bool(page[inside >> 3] >> (inside & 7) & 1)

    def use(self, cluster: int, alone: bool = True, soft: bool = False) -> None:
        """Note a reference.  One that is ``alone`` conflicts with any before it, but for those of
        snapshots (``soft``)."""
        if not self._get(self._used, cluster):
            self._set(self._used, cluster)
            if soft:
                self._set(self._soft, cluster)
        elif alone and not soft:
            if self._get(self._soft, cluster):
                inside = cluster & (1 << self._PAGE) - 1
                self._soft[cluster >> self._PAGE][inside >> 3] &= ~(1 << (inside & 7))
            else:
                self._set(self._shared, cluster)

    def used(self, cluster: int) -> bool:
        return self._get(self._used, cluster)

    def shared(self, cluster: int) -> bool:
        return self._get(self._shared, cluster)


class Reasons:
    """A reason for some L1 indexes: a byte for each, so that any number of them costs little."""

    def __init__(self) -> None:
        self._codes = bytearray()
        self._texts: list[str] = [""]

    def __setitem__(self, index: int, text: str) -> None:
        if text not in self._texts:
            self._texts.append(text)
        if index >= len(self._codes):
            self._codes.extend(bytes(index + 1 - len(self._codes)))
        self._codes[index] = self._texts.index(text)

    def get(self, index: int) -> str:
        """The text, empty where there is none."""
        return self._texts[self._codes[index]] if index < len(self._codes) else ""

    def drop(self, index: int) -> None:
        if index < len(self._codes):
            self._codes[index] = 0

    def __iter__(self) -> Iterator[int]:
        return (index for index, code in enumerate(self._codes) if code)

    def __bool__(self) -> bool:
        return self._codes.count(0) != len(self._codes)
