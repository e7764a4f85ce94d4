"""The bytes of a file as far as they can be had: all of them by position, or of a stream what was
kept while it went by."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ImageError
from ...hints import Protocol

HEAD = 4 << 20
"""Bytes that are kept of a stream's beginning."""
TAIL = 1 << 20
"""Bytes that are kept of its end."""
MOST_KEPT = 64 << 20
"""Bytes that are kept of all between, because an image's header says that its tables are there."""
_ENDLESS = 1 << 60
MOST_READ = 512 << 20
"""Bytes of one table."""


class NotSeen(Exception):
    """These bytes of a stream were not kept, or have not come yet."""

    def __init__(self, offset: int, length: int) -> None:
        self.offset, self.length = offset, length
        super().__init__(offset, length)


class View(Protocol):
    """``length`` of the file in bytes, and its bytes by position."""

    length: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range; short only at the end of the file.  Raises NotSeen."""


class FileWindow:
    """A file that is read by position."""

    def __init__(self, length: int, read: Callable[[int, int], bytes]) -> None:
        self.length = length
        self._read = read

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.length - offset)
        if length > MOST_READ:
            raise ImageError(f"a table of {length} bytes", offset=offset)
        return self._read(offset, length) if length > 0 else b""


class StreamWindow:
    """A stream: its beginning, its end, and the ranges that were asked for before they came.

    While it goes on, ``length`` is what no file is long.
    """

    def __init__(self) -> None:
        self.length = 1 << 62
        self.position = 0
        self.head = bytearray()
        self._tail = bytearray()
        self._kept: list[tuple[int, int, bytearray]] = []
        self._room = MOST_KEPT

    def feed(self, data: memoryview) -> None:
        """Take the next bytes."""
        start = self.position
        self.position = end = start + len(data)
        if start < HEAD:
            self.head += data[: HEAD - start]
        for offset, length, kept in self._kept:
            first, stop = max(offset, start), min(offset + length, end)
            if first < stop:
                kept += data[first - start : stop - start]
        self._tail += data[-TAIL:]
        if len(self._tail) >= 2 * TAIL:
            del self._tail[:-TAIL]

    def keep(self, offset: int, length: int) -> bool:
        """Keep a range that has not come yet; False where that is too late or too much."""
        if offset < self.position or length > self._room or offset + length > _ENDLESS:
            return False
        self._room -= length
        self._kept.append((offset, length, bytearray()))
        return True

    def end(self) -> None:
        """There is no more."""
        self.length = self.position

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.length - offset)
        if length <= 0:
            return b""
        end = offset + length
        tail = self.position - len(self._tail)
        for start, part in (
            (0, self.head),
            (tail, self._tail),
            *((at, kept) for at, _, kept in self._kept),
        ):
            if start <= offset and end <= start + len(part):
                return bytes(part[offset - start : end - start])
        raise NotSeen(offset, length)
