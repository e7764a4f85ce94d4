"""Looking through L2 tables by runs: pure functions over their bytes.

What an allocator lays out is long runs of entries that name one cluster after the other; such a run
is told by one subtraction over all of it.  Only what is left is looked at entry by entry.
"""

from __future__ import annotations

from array import array
from functools import cache

from ....ondisk import big_endian_array, big_endian_bytes
from ....records import NamedTuple
from ..machine.core import COPIED, OFFSET, PACKED

_BLOCK = 512
"""Entries that are tried as one run when the table is none."""


class Run(NamedTuple):
    """``length`` entries from number ``at`` on, the first of which is ``entry``, each with the same
    flags as it and the next cluster.  They are standard entries, aligned, without reserved bits
    and the zero flag."""

    at: int
    entry: int
    length: int


class Loose(NamedTuple):
    """Entries from number ``at`` on, of any kind."""

    at: int
    entries: array[int]
    bitmaps: array[int] | None
    """Of extended entries: the other half of each."""


Piece = Run | Loose


@cache
def _lanes(count: int, size: int) -> tuple[int, int]:
    """Integers of ``count`` lanes of 64 bits: ones, and 0, size, 2 size, ..."""
    # Joined from bytes: shifting lane by lane into place takes the square of their number.
    ones = int.from_bytes((1).to_bytes(8, "big") * count, "big")
    ramp = int.from_bytes(big_endian_bytes(array("Q", range(0, count * size, size))), "big")
    return ones, ramp


def _is_run(raw: bytes, count: int, size: int) -> bool:
    first = int.from_bytes(raw[:8], "big")
    span = (count - 1) * size
    if first & ~(OFFSET | COPIED) or not first & OFFSET or first & (size - 1):
        return False
    if int.from_bytes(raw[-8:], "big") != first + span or (first & OFFSET) + span > OFFSET:
        return False
    ones, ramp = _lanes(count, size)
    return (first * ones + ramp).to_bytes(8 * count, "big") == raw


def pieces(raw: bytes, size: int, extended: bool = False) -> list[Piece]:
    """What the L2 table ``raw`` of an image with clusters of ``size`` bytes holds, in order;
    entries of zero are left out where many follow each other.

    Of an ``extended`` table all entries are loose, unless they are zero.
    """
    if raw.count(0) == len(raw):
        return []
    if extended:
        return _extended(raw)
    total = len(raw) >> 3
    if _is_run(raw, total, size):
        return [Run(0, int.from_bytes(raw[:8], "big"), total)]
    out: list[Piece] = []
    step = min(total, _BLOCK)
    for index in range(0, total, step):
        part = raw[8 * index : 8 * (index + step)]
        if part.count(0) == len(part):
            continue
        if _is_run(part, step, size):
            first = int.from_bytes(part[:8], "big")
            last = out[-1] if out else None
            if isinstance(last, Run) and (
                last.at + last.length == index and last.entry + last.length * size == first
            ):
                out[-1] = last._replace(length=last.length + step)
                continue
            out.append(Run(index, first, step))
            continue
        out.append(Loose(index, big_endian_array(64, part), None))
    return out


def _extended(raw: bytes) -> list[Piece]:
    out: list[Piece] = []
    for start in range(0, len(raw), 16 * _BLOCK):
        part = raw[start : start + 16 * _BLOCK]
        if part.count(0) < len(part):
            both = big_endian_array(64, part)
            out.append(Loose(start >> 4, both[::2], both[1::2]))
    return out


def pieces_of(raws: list[bytes], size: int, extended: bool) -> list[list[Piece]]:
    """`pieces` of several tables."""
    return [pieces(raw, size, extended) for raw in raws]


def span(pieces: list[Piece], size: int, packed_bits: int) -> tuple[int, int]:
    """The first and the end of all host bytes that entries name; (0, 0) for none."""
    first, end = 1 << 64, 0
    for piece in pieces:
        if isinstance(piece, Run):
            host = piece.entry & OFFSET
            first, end = min(first, host), max(end, host + piece.length * size)
            continue
        for entry in piece.entries:
            if not entry:
                continue
            host = entry & ((1 << packed_bits) - 1 if entry & PACKED else OFFSET)
            if host < first:
                first = host
            # Compressed data may reach into the cluster behind the next.
            if host + 3 * size > end:
                end = host + 3 * size
    return (first, end) if end else (0, 0)
