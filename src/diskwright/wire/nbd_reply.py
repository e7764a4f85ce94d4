"""Replies of the NBD server: headers in columns, each beside the buffer that follows it.

``mode`` is the form that was agreed on: ``SIMPLE``, ``STRUCTURED`` or ``EXTENDED``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from . import nbd_const as c
from .nbd_batch import Refusal

Buffer = bytes | bytearray | memoryview
Rows = Iterable[tuple[int, int]]
"""(length, state flags) in order, at least one."""

_SIMPLE = struct.Struct(">II8s")
_CHUNK = struct.Struct(">IHH8sI")
_EXTENDED = struct.Struct(">IHH8sQQ")
_READ_CHUNK = struct.Struct(">Q8sIQ")
_READ_EXTENDED = struct.Struct(">Q8sQQQ")
_READ_KIND = c.REPLY_FLAG_DONE << 16 | c.REPLY_OFFSET_DATA
_READ_HEAD = c.STRUCTURED_REPLY_MAGIC << 32 | _READ_KIND
_READ_EXTENDED_HEAD = c.EXTENDED_REPLY_MAGIC << 32 | _READ_KIND
_SIMPLE_OK = c.SIMPLE_REPLY_MAGIC << 32
_EXTENDED_OK = c.EXTENDED_REPLY_MAGIC << 32 | c.REPLY_FLAG_DONE << 16 | c.REPLY_NONE

READ_SIZES = (_SIMPLE.size, _READ_CHUNK.size, _READ_EXTENDED.size)
"""Bytes before the data of a read, by mode."""
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

    __slots__ = ("_block", "mode", "slots")

    def __init__(self, mode: int) -> None:
        size = READ_SIZES[mode]
        self.mode = mode
        self._block = bytearray(size * HEADERS)
        view = memoryview(self._block)
        self.slots = [view[at : at + size] for at in range(0, size * HEADERS, size)]

    def fill(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[Buffer]:
        """One header for each read; they stay valid until the next call."""
        count = len(cookies)
        if count == 1:
            return (read_header(self.mode, cookies[0], offsets[0], lengths[0]),)
        flat: list[int | bytes]
        if self.mode == c.STRUCTURED:
            flat = [_READ_HEAD] * (4 * count)
            flat[1::4] = cookies
            flat[2::4] = [length + 8 for length in lengths]
            flat[3::4] = offsets
            _columns("Q8sIQ", count).pack_into(self._block, 0, *flat)
        elif self.mode == c.EXTENDED:
            flat = [_READ_EXTENDED_HEAD] * (5 * count)
            flat[1::5] = cookies
            flat[2::5] = offsets
            flat[3::5] = [length + 8 for length in lengths]
            flat[4::5] = offsets
            _columns("Q8sQQQ", count).pack_into(self._block, 0, *flat)
        else:
            flat = [_SIMPLE_OK] * (2 * count)
            flat[1::2] = cookies
            _columns("Q8s", count).pack_into(self._block, 0, *flat)
        return self.slots[:count]


def read_header(mode: int, cookie: bytes, offset: int, length: int) -> bytes:
    """The header before the bytes of one read."""
    if mode == c.STRUCTURED:
        return _READ_CHUNK.pack(_READ_HEAD, cookie, length + 8, offset)
    if mode == c.EXTENDED:
        return _READ_EXTENDED.pack(_READ_EXTENDED_HEAD, cookie, offset, length + 8, offset)
    return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, cookie)


def done(cookies: Sequence[bytes], mode: int = c.SIMPLE, offsets: Sequence[int] = ()) -> bytes:
    """Success without data.  A simple reply is allowed there beside structured ones, too;
    extended ones repeat the ``offsets`` of their requests."""
    count = len(cookies)
    if mode == c.EXTENDED:
        return _done_extended(cookies, offsets)
    if count == 1:
        return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, 0, cookies[0])
    out = []
    for at in range(0, count, HEADERS):
        part = cookies[at : at + HEADERS]
        flat: list[int | bytes] = [_SIMPLE_OK] * (2 * len(part))
        flat[1::2] = part
        out.append(_columns("Q8s", len(part)).pack(*flat))
    return b"".join(out)


def _done_extended(cookies: Sequence[bytes], offsets: Sequence[int]) -> bytes:
    out = []
    for at in range(0, len(cookies), HEADERS):
        part = cookies[at : at + HEADERS]
        flat: list[int | bytes] = [_EXTENDED_OK, b"", 0, 0] * len(part)
        flat[1::4] = part
        flat[2::4] = offsets[at : at + HEADERS]
        out.append(_columns("Q8sQQ", len(part)).pack(*flat))
    return b"".join(out)


def _chunk(mode: int, flags: int, kind: int, cookie: bytes, offset: int, data: bytes) -> bytes:
    """A chunk in either form."""
    if mode == c.EXTENDED:
        head = _EXTENDED.pack(c.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(data))
    else:
        head = _CHUNK.pack(c.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(data))
    return head + data


def failed(mode: int, command: int, cookie: bytes, errno: int, offset: int = 0) -> bytes:
    """An error; where the reply of success would be structured this one is too."""
    if mode == c.EXTENDED or (mode and command in (c.CMD_READ, c.CMD_BLOCK_STATUS)):
        data = struct.pack(">IH", errno, 0)
        return _chunk(mode, c.REPLY_FLAG_DONE, c.REPLY_ERROR, cookie, offset, data)
    return _SIMPLE.pack(c.SIMPLE_REPLY_MAGIC, errno, cookie)


def refused(mode: int, refusal: Refusal) -> bytes:
    """The answer to a request that was not carried out."""
    command, cookie, errno, offset = refusal
    if errno:
        return failed(mode, command, cookie, errno, offset)
    if mode == c.STRUCTURED and command == c.CMD_READ:  # a read of nothing: no chunk may be empty
        return _chunk(mode, c.REPLY_FLAG_DONE, c.REPLY_NONE, cookie, offset, b"")
    return done((cookie,), mode, (offset,))


def block_status(mode: int, cookie: bytes, offset: int, found: Mapping[int, Rows]) -> bytes:
    """What each context says, by its number, at least one; without extended replies lengths are
    below 2**32."""
    out = []
    left = len(found)
    for context, extents in found.items():
        left -= 1
        flags = 0 if left else c.REPLY_FLAG_DONE
        if mode == c.EXTENDED:
            rows = [struct.pack(">QQ", *row) for row in extents]
            kind, data = c.REPLY_BLOCK_STATUS_EXT, struct.pack(">II", context, len(rows))
        else:
            rows = [struct.pack(">II", *row) for row in extents]
            kind, data = c.REPLY_BLOCK_STATUS, struct.pack(">I", context)
        out.append(_chunk(mode, flags, kind, cookie, offset, data + b"".join(rows)))
    return b"".join(out)
