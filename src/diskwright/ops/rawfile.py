"""A disk as a file object: what ``disk.raw()`` gives to code that reads and writes files."""

from __future__ import annotations

import errno
import io
import os
from typing import Any, Protocol


class SeekableDisk(Protocol):
    """What is needed of a disk."""

    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def writable(self) -> bool: ...
    @property
    def closed(self) -> bool: ...
    def readinto_at(self, offset: int, buffer: memoryview) -> int: ...
    def write_at(self, offset: int, data: memoryview) -> None: ...
    def flush(self) -> None: ...


class RawDisk(io.RawIOBase):
    """The bytes of a disk, or ``length`` of them from ``start``, as an unbuffered file;
    :class:`io.BufferedReader` goes over it.

    It has a position, so each thread needs one of its own.  Its end does not move: a write there
    is cut short, and one behind it raises ENOSPC.  Closing flushes the disk and leaves
    it open.
    """

    def __init__(self, disk: SeekableDisk, start: int = 0, length: int | None = None) -> None:
        self._disk = disk
        self._start, self._length = start, length
        self._position = 0
        self.name = disk.name
        self.mode = "rb+" if disk.writable else "rb"

    @property
    def size(self) -> int:
        """Length in bytes."""
        whole = max(0, self._disk.size - self._start)
        return whole if self._length is None else min(whole, self._length)

    def __repr__(self) -> str:
        return f"<RawDisk {self.name!r} mode={self.mode!r}>"

    def __del__(self) -> None:
        """Nothing: what io does here would flush."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._disk.writable

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._check()
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in start:
            raise ValueError(f"whence is 0, 1 or 2, not {whence}")
        if start[whence] + offset < 0:
            raise OSError(errno.EINVAL, "the position would be negative")
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        self._check()
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if length:
            self._disk.readinto_at(self._start + self._position, view[:length])
            self._position += length
        return length

    def write(self, data: Any, /) -> int:
        self._check()
        if not self.writable():
            raise io.UnsupportedOperation("the disk is open for reading")
        view = memoryview(data).cast("B")
        length = max(0, min(len(view), self.size - self._position))
        if len(view) and not length:
            raise OSError(errno.ENOSPC, "the disk ends here")
        if length:
            self._disk.write_at(self._start + self._position, view[:length])
            self._position += length
        return length

    def flush(self) -> None:
        """What was written is durable."""
        if not self.closed and not self._disk.closed and self._disk.writable:
            self._disk.flush()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")
