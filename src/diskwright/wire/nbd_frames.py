"""The two forms of a request, compact and extended, as the structs that decode them in columns."""

from __future__ import annotations

import struct

from . import nbd_const as c

_WRITES = 256
"""Structs of writes that are kept: a client that never repeats a size must not fill the memory."""


class Frames:
    """One form of request: a row is magic, flags and type as one number (so that one comparison
    knows a plain request), the cookie, offset and length; ``size`` bytes together.

    ``read`` and ``write`` are that number for a plain read or write.
    """

    __slots__ = ("_reads", "_row", "_writes", "magic", "read", "size", "unpack", "write")

    def __init__(self, magic: int, row: str, write_flags: int) -> None:
        one = struct.Struct(f">{row}")
        self.magic = magic
        self.size = one.size
        self.unpack = one.unpack_from
        self.read = magic << 32 | c.CMD_READ
        self.write = magic << 32 | write_flags << 16 | c.CMD_WRITE
        self._row = row
        self._reads: dict[int, struct.Struct] = {}
        self._writes: dict[tuple[int, int], struct.Struct] = {}

    def reads(self, count: int) -> struct.Struct:
        """``count`` rows without payloads."""
        run = self._reads.get(count)
        if run is None:
            run = self._reads[count] = struct.Struct(">" + self._row * count)
        return run

    def writes(self, length: int, count: int) -> struct.Struct:
        """``count`` rows, each before ``length`` bytes of payload."""
        run = self._writes.get((length, count))
        if run is None:
            if len(self._writes) >= _WRITES:
                self._writes.clear()
            run = struct.Struct(">" + f"{self._row}{length}x" * count)
            self._writes[length, count] = run
        return run


COMPACT = Frames(c.REQUEST_MAGIC, "Q8sQI", 0)
EXTENDED = Frames(c.EXTENDED_REQUEST_MAGIC, "Q8sQQ", c.CMD_FLAG_PAYLOAD_LEN)
UNMARKED = Frames(c.EXTENDED_REQUEST_MAGIC, "Q8sQQ", 0)
"""As QEMU's client sends writes (measured with 10.0): without the flag that announces payload."""
