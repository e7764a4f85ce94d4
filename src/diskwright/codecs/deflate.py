"""DEFLATE (RFC 1951), bare and in the zlib frame (RFC 1950)."""

from __future__ import annotations

import zlib

from ..abilities import Buffer

BARE, FRAMED = -15, 15


class Deflate:
    """Units compressed with DEFLATE.

    ``level`` is zlib's (-1 to 9).  ``bits`` is the window size of what is packed: positive with a
    zlib header and checksum, negative without (then a unit of any window is unpacked).
    """

    __slots__ = ("bits", "level")

    def __init__(self, level: int = -1, bits: int = FRAMED) -> None:
        self.level = level
        self.bits = bits

    def pack(self, data: Buffer) -> bytes:
        """``data`` compressed; it may come out longer."""
        machine = zlib.compressobj(self.level, zlib.DEFLATED, self.bits)
        return machine.compress(data) + machine.flush()

    def unpack(self, data: Buffer, unit: int) -> bytes:
        """The first ``unit`` bytes that ``data`` holds; what follows the stream is ignored.

        Raises ValueError when the stream is damaged or holds fewer.
        """
        machine = zlib.decompressobj(BARE if self.bits < 0 else self.bits)
        try:
            out = machine.decompress(data, unit)
        except zlib.error as error:
            raise ValueError(f"the compressed data are damaged: {error}") from error
        if len(out) < unit:
            raise ValueError(f"the compressed data hold {len(out)} bytes instead of {unit}")
        return out
