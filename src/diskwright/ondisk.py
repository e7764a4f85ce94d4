"""On-disk structs: plain codecs over :mod:`struct` and :mod:`array`, cheap to import."""

from __future__ import annotations

import sys
from array import array
from struct import Struct, calcsize


class Fields(Struct):
    """A struct whose fields have names, each given as ``NAME:TYPE`` with a type of :mod:`struct`.

    ``order`` is ``<`` (little-endian) or ``>``.  ``places`` is the (offset, size) in bytes of each
    field by its name, in order; the documentation's byte tables are compared with it.
    """

    def __init__(self, order: str, fields: str) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        types, at = order, 0
        for field in fields.split():
            name, _, kind = field.partition(":")
            size = calcsize(order + kind)
            self.places[name] = (at, size)
            types += kind
            at += size
        super().__init__(types)

    def offset_of(self, name: str) -> int:
        """Where the field begins, in bytes from the start of the struct."""
        return self.places[name][0]


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
