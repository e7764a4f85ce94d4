"""On-disk structs: plain codecs over :mod:`struct` and :mod:`array`, cheap to import."""

from __future__ import annotations

import sys
from array import array

_SWAP = sys.byteorder == "little"

# array's 'L' is 4 or 8 bytes by platform, so it is used for neither width.
TYPECODES = {8: "B", 16: "H", 32: "I", 64: "Q"}
"""Array type code of an unsigned integer by its width in bits."""


def big_endian_array(bits: int, data: bytes | bytearray | memoryview) -> array[int]:
    """Decode ``data`` as unsigned big-endian integers of ``bits`` bits (8, 16, 32 or 64)."""
    values = array(TYPECODES[bits])
    values.frombytes(data)
    if _SWAP and bits > 8:
        values.byteswap()
    return values


def big_endian_bytes(values: array[int], start: int = 0, stop: int | None = None) -> bytes:
    """Encode ``values[start:stop]`` as big-endian integers of the array's own width."""
    part = values[start:stop]
    if _SWAP and part.itemsize > 1:
        part.byteswap()
    return part.tobytes()


def little_endian_array(bits: int, data: bytes | bytearray | memoryview) -> array[int]:
    """Decode ``data`` as unsigned little-endian integers of ``bits`` bits (8, 16, 32 or 64)."""
    values = array(TYPECODES[bits])
    values.frombytes(data)
    if not _SWAP and bits > 8:
        values.byteswap()
    return values


def little_endian_bytes(values: array[int], start: int = 0, stop: int | None = None) -> bytes:
    """Encode ``values[start:stop]`` as little-endian integers of the array's own width."""
    part = values[start:stop]
    if not _SWAP and part.itemsize > 1:
        part.byteswap()
    return part.tobytes()


def zeros(bits: int, count: int) -> array[int]:
    """``count`` zeroes of ``bits`` bits."""
    return array(TYPECODES[bits], bytes(count * (bits // 8)))
