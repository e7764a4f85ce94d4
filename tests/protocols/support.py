"""Tables of calls that count, fail or fall short, and a few shortcuts."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diskwright.protocols import os_portable
from diskwright.protocols.os_linux import Linux
from diskwright.protocols.os_portable import Portable


class Watching(Linux):
    """The calls of Linux, counted by row; ``fail`` names rows that raise, ``limit`` is the most
    that one transfer moves."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.fail: dict[str, int] = {}
        self.limit = 0
        self.fast_read = self._fast_read
        self.fast_write = self._fast_write

    def _note(self, row: str) -> None:
        self.calls[row] += 1
        if row in self.fail:
            raise OSError(self.fail[row], os.strerror(self.fail[row]))

    def _cut(self, buffers: Sequence[Any]) -> Sequence[Any]:
        if not self.limit:
            return buffers
        return [memoryview(buffers[0])[: self.limit]]

    def _fast_read(self, fd: int, buffers: Sequence[Any], offset: int, flags: int) -> int:
        self._note("fast_read")
        return os.preadv(fd, self._cut(buffers), offset, flags)

    def _fast_write(self, fd: int, buffer: Any, offset: int) -> int:
        self._note("fast_write")
        return os.pwrite(fd, self._cut([buffer])[0], offset)

    def read(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._note("read")
        return super().read(fd, self._cut(buffers), offset)

    def write(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._note("write")
        return super().write(fd, self._cut(buffers), offset)

    def read_ahead(self, fd: int, offset: int, length: int) -> None:
        self._note("read_ahead")
        super().read_ahead(fd, offset, length)


def _watch(row: str) -> Any:
    original = getattr(Linux, row)

    def call(self: Watching, *arguments: Any) -> Any:
        self._note(row)
        return original(self, *arguments)

    return call


for _row in (
    "sync_data",
    "sync",
    "sync_directory",
    "truncate",
    "allocate",
    "punch",
    "zero_range",
    "zero_device",
    "discard_device",
    "data_from",
    "copy",
    "clone",
    "lock",
    "locked",
):
    setattr(Watching, _row, _watch(_row))


@contextmanager
def using(table: Portable) -> Iterator[None]:
    """Files opened meanwhile use this table."""
    before = dict(os_portable._tables)
    os_portable._tables[False] = os_portable._tables[True] = table
    try:
        yield
    finally:
        os_portable._tables.clear()
        os_portable._tables.update(before)


def drop_cache(path: str | os.PathLike[str]) -> None:
    """Take the file's pages out of the page cache."""
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(20):
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if not reads_cached(path):
                return
            time.sleep(0.01)  # pages that somebody still looks at stay
    finally:
        os.close(fd)


def reads_cached(path: str | os.PathLike[str], offset: int = 0) -> bool:
    """Whether the page at ``offset`` is in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            return False
        raise
    finally:
        os.close(fd)
