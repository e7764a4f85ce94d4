"""CRC-32C (Castagnoli; RFC 3720 appendix B.4) without a loop over bytes.

A checksum is linear over GF(2), so a message can be folded: of two neighbouring words the first
is moved over the second (a multiplication by a constant, which is a table look-up for each byte)
and added to it.  One `bytes.translate` does the look-ups of all words at once, which is some
hundred times faster than a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

from ..abilities import Buffer

_POLYNOMIAL = 0x82F63B78  # reflected
_ONES = 0xFFFFFFFF
# Below so many bytes a loop over them is faster.
_SHORT = 256
# So many are compared at once, which is much faster than one by one.
_ZEROES = bytes(1024)


def crc32c(data: Buffer, crc: int = 0) -> int:
    """The checksum of ``data``, where ``crc`` is that of what stands before it.

    Zeroes at the end, of which structures on disk mostly consist, cost nothing.
    """
    crc ^= _ONES
    filled = _filled(bytes(data))
    if len(filled) < _SHORT:
        crc = _by_bytes(crc, filled)
    else:
        head = len(filled) & 3
        crc = _folded(_by_bytes(crc, filled[:head]), filled[head:])
    return _behind_zeroes(crc, len(data) - len(filled)) ^ _ONES


def _filled(data: bytes) -> bytes:
    """All but the zeroes at the end."""
    end = len(data)
    while data.endswith(_ZEROES, 0, end):
        end -= len(_ZEROES)
    return data[:end].rstrip(b"\0")


def _by_bytes(crc: int, data: Buffer) -> int:
    table = _byte_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def _folded(crc: int, data: bytes) -> int:
    """`_by_bytes` for a multiple of four bytes."""
    # What was computed so far is added to the first word.  Words lie beside each other as four
    # planes, one for each byte of a word.
    data = (int.from_bytes(data[:4], "little") ^ crc).to_bytes(4, "little") + data[4:]
    planes = [data[i::4] for i in range(4)]
    words = len(data) >> 2
    level = 2  # of 2**level bytes is what a word stands for
    while words > 16:
        if words & 1:
            planes = [b"\0" + plane for plane in planes]  # leading zeroes add nothing
            words += 1
        half = words >> 1
        total = int.from_bytes(b"".join([plane[1::2] for plane in planes]), "little")
        for plane, tables in zip(planes, _plane_tables(level), strict=True):
            first = plane[::2]
            moved = b"".join([first.translate(table) for table in tables])
            total ^= int.from_bytes(moved, "little")
        joined = total.to_bytes(4 * half, "little")
        planes = [joined[i * half : (i + 1) * half] for i in range(4)]
        words = half
        level += 1
    a, b, c, d = _word_tables(level)
    value = 0
    for p, q, r, s in zip(*planes, strict=True):
        value = a[value & 0xFF] ^ b[value >> 8 & 0xFF] ^ c[value >> 16 & 0xFF] ^ d[value >> 24]
        value ^= p | q << 8 | r << 16 | s << 24
    return _by_bytes(value, bytes(4))


def _behind_zeroes(crc: int, count: int) -> int:
    """`_by_bytes` for ``count`` zeroes."""
    return _times(crc, _zeroes(count)) if count else crc


@lru_cache(64)
def _zeroes(count: int) -> int:
    """What so many zero bytes multiply by."""
    total, level = 1 << 31, 0
    while count:
        if count & 1:
            total = _times(total, _power(level))
        count >>= 1
        level += 1
    return total


@cache
def _byte_table() -> Sequence[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


@cache
def _power(level: int) -> int:
    """What 2**level zero bytes multiply by: x**(8 * 2**level), its highest power in bit 0."""
    return 1 << 23 if level == 0 else _times(_power(level - 1), _power(level - 1))


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of the checksum."""
    total = 0
    bit = 1 << 31
    while a:
        if a & bit:
            total ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return total


@cache
def _word_tables(level: int) -> Sequence[Sequence[int]]:
    """The same by byte of the word, for all values of a byte."""
    matrix = [_times(1 << bit, _power(level)) for bit in range(32)]
    out = []
    for place in range(4):
        moved = [0] * 256
        for value in range(1, 256):
            low = value & -value
            moved[value] = moved[value ^ low] ^ matrix[8 * place + low.bit_length() - 1]
        out.append(moved)
    return out


@cache
def _plane_tables(level: int) -> Sequence[Sequence[bytes]]:
    """The same as four tables for `bytes.translate`, one for each byte of the result."""
    return [
        [bytes([value >> shift & 0xFF for value in moved]) for shift in (0, 8, 16, 24)]
        for moved in _word_tables(level)
    ]
