"""What bytes say of themselves in an image whose own pointers are gone: pure functions.

An L2 table is told by its entries: aligned places inside the file, reserved bits clear, COPIED set.
Noise passes for one with a probability of nothing; another image inside this disk does not, so a
table counts less the more of what it names is known to belong to somebody else.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, repeat

from ....records import NamedTuple
from ..check.scan import Loose, Run, pieces
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
_LEAST_PLACES = 4
"""Entries in a sector that must lie as those of a data file do."""


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

    good: int = 0
    beyond: int = 0
    """Sound entries, but for a place behind the end of the file."""
    bad: int = 0
    copied: int = 0
    packed: int = 0
    named: int = 0
    """Standard entries with a place in this file."""
    runs: array[int] = array("Q")
    """Their host clusters in the order of the entries: first, end, first, end, ..."""

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The runs."""
        return zip(self.runs[::2], self.runs[1::2], strict=True)

    def clusters(self) -> Iterator[int]:
        """The host clusters, one by one."""
        return chain.from_iterable(range(first, stop) for first, stop in self.pairs())


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
    size, length = 1 << geometry.bits, geometry.length
    good = beyond = bad = copied = packed = named = 0
    runs = array("Q")
    for piece in pieces(data, size, geometry.stride == 2):
        if isinstance(piece, Run):
            host = piece.entry & OFFSET
            inside = piece.length
            if not geometry.external:
                inside = max(0, min(inside, -(-(length - host) // size)))
                named += inside
                join(runs, range(host, host + inside * size, size), geometry.bits)
            good += inside
            beyond += piece.length - inside
            copied += inside * (piece.entry >> 63)
            continue
        quick = plain(piece, geometry)
        if quick is not None:
            good += quick.good
            copied += quick.copied
            if not geometry.external:
                named += len(quick.hosts) - quick.hosts.count(0)
                join(runs, quick.hosts, geometry.bits)
            continue
        hosts = array("Q")
        for entry, bitmap in zip(piece.entries, piece.bitmaps or repeat(0), strict=False):
            if not entry and not bitmap:
                continue
            why = entry_problem(entry, geometry, bitmap)
            if why:
                beyond += why == BEHIND
                bad += why != BEHIND
                continue
            good += 1
            if entry & PACKED:
                packed += 1
            elif geometry.external:
                copied += entry >> 63
            elif entry & OFFSET:
                hosts.append(entry & OFFSET)
                copied += entry >> 63
        named += len(hosts)
        join(runs, hosts, geometry.bits)
    return Seen(good, beyond, bad, copied, packed, named, runs)


class Plain(NamedTuple):
    """Entries of which none is compressed, a zero cluster, wrong or behind the end of the file."""

    hosts: array[int]
    """Their places, 0 for none."""
    good: int
    copied: int


@cache
def _lanes(count: int) -> int:
    """``count`` lanes of 64 bits, a 1 in each."""
    return int.from_bytes((1).to_bytes(8, "big") * count, "big")


def plain(piece: Loose, geometry: Geometry) -> Plain | None:
    """None when the entries must be looked at one by one."""
    entries, bitmaps = piece.entries, piece.bitmaps
    count = len(entries)
    ones = _lanes(count)
    value = int.from_bytes(entries.tobytes(), sys.byteorder)
    allowed = COPIED | OFFSET & -(1 << geometry.bits)
    if value & ones * (allowed ^ (1 << 64) - 1):
        return None
    hosts = array("Q", (value & ones * OFFSET).to_bytes(8 * count, sys.byteorder))
    none = hosts.count(0) - entries.count(0)  # of those that are not empty
    if not geometry.external and (none or max(hosts) >= geometry.length):
        return None
    good = count - entries.count(0)
    if bitmaps is not None:
        both = int.from_bytes(bitmaps.tobytes(), sys.byteorder)
        if both >> SUBCLUSTERS & both & ones * ALL:
            return None
        for entry, bitmap in zip(entries, bitmaps, strict=True):
            if bitmap and not entry:
                if bitmap & ALL:
                    return None
                good += 1
    return Plain(hosts, good, (value >> 63 & ones).bit_count())


def join(runs: array[int], hosts: Sequence[int], bits: int) -> None:
    """Add the clusters at ``hosts`` to runs; one that continues the last becomes a part of it."""
    if isinstance(hosts, range):
        first, stop = hosts.start >> bits, hosts.stop >> bits
        if runs and runs[-1] == first:
            runs[-1] = stop
        elif first < stop:
            runs.extend((first, stop))
        return
    end = runs[-1] if runs else -1
    for host in hosts:
        if host:
            cluster = host >> bits
            if cluster == end:
                end = runs[-1] = cluster + 1
            else:
                end = cluster + 1
                runs.extend((cluster, end))


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


class Kind(NamedTuple):
    """What tables in a file without header speak for."""

    bits: int
    extended: bool
    external: bool


def vote(window: bytes, start: int, length: int, votes: Counter[Kind]) -> None:
    """Let every sector of a table in ``window``, which begins at ``start`` of the file, speak.

    The cluster size is the largest that divides all places in it.  Each entry more halves the
    chance that it is too large, so a sector counts by its entries.
    """
    tops = window[::8]
    for at in range(0, len(window) - _SECTOR + 1, _SECTOR):
        part = tops[at // 8 : (at + _SECTOR) // 8]
        if 0x80 not in part:
            continue
        values = _VALUE.unpack_from(window, at)
        if not part.translate(None, b"\0\x80"):
            if (bits := _common(values, length)) is not None:
                votes[Kind(bits, False, False)] += sum(map(bool, values)) ** 2
                continue
            if (kind := _by_place(values, start + at, False)) is not None:
                votes[kind] += sum(map(bool, values)) ** 2
                continue
        if part[::2].translate(None, b"\0\x80") or not any(values[1::2]):
            continue
        entries, bitmaps = values[::2], values[1::2]
        pairs = zip(entries, bitmaps, strict=True)
        if any(_bad_bitmap(bitmap, bool(entry & (OFFSET | COPIED))) for entry, bitmap in pairs):
            continue
        weight = (2 * sum(map(bool, entries))) ** 2
        if (bits := _common(entries, length)) is not None:
            votes[Kind(bits, True, False)] += weight
        elif (kind := _by_place(entries, start + at, True)) is not None:
            votes[kind] += weight


def _common(entries: Sequence[int], length: int) -> int | None:
    """The most bits of a cluster that entries with places in the file allow."""
    together = 0
    for entry in entries:
        if entry & _RESERVED or entry & OFFSET >= length:
            return None
        together |= entry & OFFSET
    return min((together & -together).bit_length() - 1, MAX_BITS) if together else None


def _by_place(entries: Sequence[int], start: int, extended: bool) -> Kind | None:
    """Entries of a data file name the place in it at which they stand in their table: the distance
    of two neighbours is a cluster."""
    known = [(i, entry & OFFSET) for i, entry in enumerate(entries) if entry & OFFSET]
    if len(known) < _LEAST_PLACES or any(entry & _RESERVED for entry in entries):
        return None
    (one, first), (other, second) = known[0], known[1]
    size = (second - first) // (other - one)
    if size < 1 << MIN_BITS or size > 1 << MAX_BITS or size & size - 1:
        return None
    index = (start % size) >> (4 if extended else 3)
    base = first - (index + one) * size
    if base % (size * size >> (4 if extended else 3)):
        return None
    if any(host != base + (index + i) * size for i, host in known):
        return None
    return Kind(size.bit_length() - 1, extended, True)


def l1_entry_problem(entry: int, geometry: Geometry) -> str:
    """Why an L1 entry that is not 0 cannot be right, "" when it can."""
    host = entry & OFFSET
    if entry & ~(COPIED | OFFSET) or not host or host & (1 << geometry.bits) - 1:
        return "the L1 entry of its table is damaged"
    return "" if host < geometry.length else "its L2 table is behind the end of the file"
