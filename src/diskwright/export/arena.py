"""Where the bytes of reads lie until they were sent."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.buffers import page_buffer
from ..wire import nbd_reply as reply

_SIZE = 128 << 10


class Arena:
    """Buffers and headers for one group of read replies, used again after they were sent.

    Fresh memory costs a page fault every 4 KiB; equal requests find their views ready.
    """

    __slots__ = ("_length", "_slots", "_view", "header_size", "headers", "size")

    def __init__(self, mode: int) -> None:
        self.headers = reply.ReadHeaders(mode)
        self.header_size = reply.READ_SIZES[mode]
        self.size = 0
        self._view = memoryview(b"")
        self._length = 0
        self._slots: list[memoryview] = []

    def views(self, lengths: Sequence[int], total: int) -> list[memoryview]:
        """One view for each read of ``lengths`` bytes, ``total`` together."""
        length, count = lengths[0], len(lengths)
        equal = lengths.count(length) == count
        if equal and length == self._length and count <= len(self._slots):
            return self._slots[:count]
        if total > self.size:
            self.size = max(total, _SIZE)
            self._view = page_buffer(self.size)
            self._length = 0
        view = self._view
        if equal:
            fits = min(self.size // length, reply.HEADERS)
            self._slots = [view[at * length : (at + 1) * length] for at in range(fits)]
            self._length = length
            return self._slots[:count]
        out = []
        at = 0
        for length in lengths:
            out.append(view[at : at + length])
            at += length
        return out
