"""DEFLATE (RFC 1951), bare and in the zlib frame (RFC 1950), by the fastest library that is there.

Python's own zlib is enough.  With the extra `fast`, ISA-L packs the low levels and unpacks, and
zlib-ng packs the high ones; what they write is plain DEFLATE that anybody reads, only not the same
bytes.
"""

from __future__ import annotations

import zlib
from functools import cache
from importlib import import_module

from ..abilities import Buffer
from ..hints import Any

BARE, FRAMED = -15, 15
_LEVEL = 6
# ISA-L has levels up to this one; the default is its second: a twelfth of the time of zlib's sixth
# for 6 % more bytes (docs/benchmarks.md).
_ISAL_LEVELS, _ISAL_DEFAULT = 3, 2


class Deflate:
    """Units compressed with DEFLATE.

    ``level``: 1 (fast) to 9 (small), None for the library's own choice.  ``bits`` is the window
    size of what is packed: positive with a zlib header and checksum, negative without (then a unit
    of any window is unpacked).
    """

    __slots__ = ("bits", "level")

    def __init__(self, level: int | None = None, bits: int = FRAMED) -> None:
        self.level = level
        self.bits = bits

    def pack(self, data: Buffer) -> bytes:
        """``data`` compressed; it may come out longer."""
        library, level = _packer(self.level)
        machine = library.compressobj(level, zlib.DEFLATED, self.bits)
        return bytes(machine.compress(data) + machine.flush())

    def unpack(self, data: Buffer, unit: int) -> bytes:
        """The first ``unit`` bytes that ``data`` holds; what follows the stream is ignored.

        Raises ValueError when the stream is damaged or holds fewer.
        """
        # This one of ISA-L's allocates a unit at once, not piece by piece.
        quick = _library("isal.igzip_lib")
        if quick is not None:
            frame = quick.DECOMP_DEFLATE if self.bits < 0 else quick.DECOMP_ZLIB
            try:
                out: bytes = quick.IgzipDecompressor(frame).decompress(data, unit)
            except quick.error:
                out = b""
            if len(out) == unit:
                return out
        # What is wrong with a stream is zlib's to say.
        machine = zlib.decompressobj(BARE if self.bits < 0 else self.bits)
        try:
            out = machine.decompress(data, unit)
        except zlib.error as error:
            raise ValueError(f"the compressed data are damaged: {error}") from error
        if len(out) < unit:
            raise ValueError(f"the compressed data hold {len(out)} bytes instead of {unit}")
        return out


@cache
def _packer(level: int | None) -> tuple[Any, int]:
    """The library for a level, and what it calls that level."""
    quick = _library("isal.isal_zlib")
    if quick is not None and (level is None or level <= _ISAL_LEVELS):
        return quick, _ISAL_DEFAULT if level is None else level
    level = _LEVEL if level is None else level
    return _library("zlib_ng.zlib_ng") or zlib, level


@cache
def _library(name: str) -> Any:
    """An optional library, None where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        return None
