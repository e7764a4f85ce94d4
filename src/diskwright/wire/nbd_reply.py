"""Replies of the NBD server: headers in columns, each beside the buffer that follows it."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from . import nbd_const as c
from .nbd_batch import Refusal

Buffer = bytes | bytearray | memoryview

_SIMPLE = struct.Struct(">II8s")
_CHUNK = struct.Struct(">IHH8sI")
_READ_CHUNK = struct.Struct(">Q8sIQ")
_READ_HEAD = c.STRUCTURED_REPLY_MAGIC << 32 | c.REPLY_FLAG_DONE << 16 | c.REPLY_OFFSET_DATA
_SIMPLE_OK = c.SIMPLE_REPLY_MAGIC << 32

SIMPLE_SIZE = 16
READ_CHUNK_SIZE = 28
HEADERS = 256
"""Most replies that one :class:`ReadHeaders` holds."""

_structs: dict[tuple[str, int], struct.Struct] = {}


def _columns(row: str, count: int) -> struct.Struct:
    found = _structs.get((row, count))
    if found is None:
        found = _structs[row, count] = struct.Struct(">" + row * count)
    return found


class ReadHeaders:
    """The headers of up to :data:`HEADERS` read replies in one block that is used again."""

    __slots__ = ("_block", "slots", "structured")

    def __init__(self, structured: bool) -> None:
        size = READ_CHUNK_SIZE if structured else SIMPLE_SIZE
        self.structured = structured
        self._block = bytearray(size * HEADERS)
        view = memoryview(self._block)
        self.slots = [view[at : at + size] for at in range(0, size * HEADERS, size)]

    def fill(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[Buffer]:
        """One header for each read; they stay valid until the next call."""
        count = len(cookies)
        if count == 1:
            return (read_header(self.structured, cookies[0], offsets[0], lengths[0]),)
        if self.structured:
            flat: list[int | bytes] = [_READ_HEAD] * (4 * count)
            flat[1::4] = cookies
            flat[2::4] = [length + 8 for length in lengths]
            flat[3::4] = offsets
            _columns("Q8sIQ", count).pack_into(self._block, 0, *flat)
        else:
            flat = [_SIMPLE_OK] * (2 * count)
            flat[1::2] = cookies
            _columns("Q8s", count).pack_into(self._block, 0, *flat)
        return self.slots[:count]


def read_header(structured: bool, cookie: bytes, offset: int, length: int) -> bytes:
    """The header before the bytes of one read."""
    if structured:
        return _READ_CHUNK.pack(_READ_HEAD, cookie, length + 8, offset)
    return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, cookie)


def done(cookies: Sequence[bytes]) -> bytes:
    """Success without data; a simple reply is allowed there in either mode."""
    count = len(cookies)
    if count == 1:
        return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, cookies[0])
    out = []
    for at in range(0, count, HEADERS):
        part = cookies[at : at + HEADERS]
        flat: list[int | bytes] = [_SIMPLE_OK] * (2 * len(part))
        flat[1::2] = part
        out.append(_columns("Q8s", len(part)).pack(*flat))
    return b"".join(out)


def failed(structured: bool, command: int, cookie: bytes, errno: int) -> bytes:
    """An error; where the reply of success would be structured this one is too."""
    if structured and command in (c.CMD_READ, c.CMD_BLOCK_STATUS):
        head = _CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_ERROR, cookie, 6)
        return head + struct.pack(">IH", errno, 0)
    return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, errno, cookie)


def refused(structured: bool, refusal: Refusal) -> bytes:
    """The answer to a request that was not carried out."""
    command, cookie, errno = refusal
    if errno:
        return failed(structured, command, cookie, errno)
    if structured and command == c.CMD_READ:  # a read of nothing: no chunk may be empty
        head = (c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_NONE)
        return _CHUNK.pack(*head, cookie, 0)
    return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, cookie)


def block_status(cookie: bytes, extents: Iterable[tuple[int, int]]) -> bytes:
    """``extents`` are (length, state flags) in order, at least one; lengths below 2**32."""
    rows = b"".join(struct.pack(">II", *row) for row in extents)
    head = _CHUNK.pack(
        c.STRUCTURED_REPLY_MAGIC, c.REPLY_FLAG_DONE, c.REPLY_BLOCK_STATUS, cookie, 4 + len(rows)
    )
    return head + struct.pack(">I", c.BASE_ALLOCATION_ID) + rows
