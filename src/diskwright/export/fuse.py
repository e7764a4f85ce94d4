"""A node as one regular file: what a FUSE binding is asked for, in terms of the node.

Nothing here knows of a binding: the requests are those of a file system with one inode.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

from ..contract import MAY_UNMAP
from ..engine.futures import Condition
from ..engine.node import Node
from ..errors import NotSupported, UsageError
from ..graph.status import block_status
from ..units import SECTOR

SEEK_DATA, SEEK_HOLE = 3, 4  # lseek(2); not every Python knows them
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10  # fallocate(2)
BLOCK = 4096
_MAX_SIZE = (1 << 63) - 1


class DiskFile:
    """Serves ``node`` as a file.

    ``growable``: the file's length is the disk's, and may be changed; otherwise it is fixed, as
    that of a block device.  ``allocated`` tells how many bytes the host has given to the disk.
    Requests raise OSError or what the node raises, after :meth:`close` ``ENOTCONN``.
    """

    def __init__(
        self,
        node: Node,
        *,
        writable: bool = False,
        growable: bool = False,
        allocated: Callable[[Node], int | None] = lambda node: None,
    ) -> None:
        self.node = node
        self.writable = writable
        self.growable = writable and growable
        self.closed = False
        self.mode = stat.S_IFREG | (0o600 if writable else 0o400)
        self.owner = _us()
        self._allocated = allocated
        self._accessed = self._written = self._touched = time.time_ns()
        self._active = 0
        self._resizing = False
        self._changed = Condition()

    async def __aenter__(self) -> None:
        """Around each request: :meth:`close` waits for all."""
        if self.closed:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self._active += 1

    async def __aexit__(self, *error: object) -> None:
        self._active -= 1
        self._changed.notify()

    async def close(self) -> None:
        """Take no more requests; those that were begun have ended when it returns."""
        self.closed = True
        while self._active:
            await self._changed.wait()

    # -- attributes
    async def attributes(self) -> dict[str, Any]:
        """``st_...``, times in nanoseconds.  Reading does not change them."""
        async with self:
            size = self.node.size
            used = self._allocated(self.node)
            return {
                "st_mode": self.mode,
                "st_nlink": 1,
                "st_uid": self.owner[0],
                "st_gid": self.owner[1],
                "st_size": size,
                "st_blocks": -(-(size if used is None else used) // 512),
                "st_blksize": BLOCK,
                "st_atime": self._accessed,
                "st_mtime": self._written,
                "st_ctime": self._touched,
            }

    async def permit(self, mode: int) -> None:
        """Set who may use it (chmod)."""
        async with self:
            if not self.writable and mode & 0o222:
                raise _refused(errno.EROFS)
            self.mode = stat.S_IFREG | (mode & 0o7777)
            self._touched = time.time_ns()

    async def give(self, user: int, group: int) -> None:
        """Set whose it is (chown); -1: as it was."""
        async with self:
            self.owner = (
                self.owner[0] if user < 0 else user,
                self.owner[1] if group < 0 else group,
            )
            self._touched = time.time_ns()

    async def stamp(self, accessed: int | None, written: int | None) -> None:
        """Set times, in nanoseconds (utimensat); None: as it was."""
        async with self:
            self._touched = time.time_ns()
            self._accessed = self._accessed if accessed is None else accessed
            self._written = self._written if written is None else written

    def _changed_now(self) -> None:
        self._written = self._touched = time.time_ns()

    def space(self) -> dict[str, int]:
        """``f_...``: a file system that its one file fills."""
        blocks = -(-self.node.size // BLOCK)
        return {"f_bsize": BLOCK, "f_frsize": BLOCK, "f_blocks": blocks, "f_bfree": 0,
                "f_bavail": 0, "f_files": 1, "f_ffree": 0, "f_namemax": 255}  # fmt: skip

    # -- data
    async def read(self, offset: int, into: memoryview) -> int:
        """Fill ``into``; returns how many bytes there were."""
        async with self:
            length = max(0, min(len(into), self.node.size - offset))
            if length:
                await self.node.read([offset], [length], [into[:length]])
            return length

    async def write(self, offset: int, data: memoryview) -> int:
        """Write; returns how much of it.  Behind the end the file grows, or there is no space."""
        async with self:
            self._may_write()
            await self._reach(offset + len(data))
            length = max(0, min(len(data), self.node.size - offset))
            if len(data) and not length:
                raise _refused(errno.ENOSPC)
            if length:
                await self.node.write([offset], [data[:length]])
                self._changed_now()
            return length

    async def flush(self) -> None:
        """All writes that were answered are durable."""
        async with self:
            if self.writable:
                await self.node.flush()

    async def empty(self) -> None:
        """It was opened to be written anew (``O_TRUNC``).  As for a block device, that means
        nothing where the length is fixed."""
        if self.growable:
            await self.truncate(0)

    async def truncate(self, size: int) -> None:
        """Set the length; only where the file is growable."""
        async with self:
            self._may_write()
            if size != self.node.size:
                if not self.growable:
                    raise _refused(errno.EPERM)
                await self._resize(size, shrink=True)

    async def allocate(self, mode: int, offset: int, length: int) -> None:
        """fallocate(2): punch a hole, zero a range, or grow."""
        async with self:
            self._may_write()
            end = offset + length
            kind = mode & ~KEEP_SIZE
            if mode == 0:
                if end <= self.node.size:  # a thin disk cannot promise space
                    raise _refused(errno.EOPNOTSUPP)
                await self._reach(end)
                if end > self.node.size:
                    raise _refused(errno.ENOSPC)
                return
            if kind not in (PUNCH_HOLE, ZERO_RANGE) or (kind == PUNCH_HOLE and kind == mode):
                raise _refused(errno.EOPNOTSUPP)
            if not mode & KEEP_SIZE:
                await self._reach(end)
                if end > self.node.size:
                    raise _refused(errno.ENOSPC)
            count = min(end, self.node.size) - offset
            if count > 0:
                # A hole must read as zeroes, which a discard does not promise.
                flags = MAY_UNMAP if kind == PUNCH_HOLE else 0
                await self.node.zero([offset], [count], flags)
                self._changed_now()

    async def seek(self, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE."""
        async with self:
            if whence not in (SEEK_DATA, SEEK_HOLE):
                raise _refused(errno.EINVAL)
            size = self.node.size
            if not 0 <= offset < size:
                raise _refused(errno.ENXIO)
            while offset < size:
                for part in await block_status(self.node, offset, size - offset):
                    if part.zero == (whence == SEEK_HOLE):
                        return offset
                    offset += part.length
                await self.node.driver.turn()
            if whence == SEEK_DATA:
                raise _refused(errno.ENXIO)
            return size

    # -- size
    def _may_write(self) -> None:
        if not self.writable:
            raise _refused(errno.EROFS)

    async def _reach(self, end: int) -> None:
        """Grow to ``end`` where that is wanted and allowed."""
        if self.growable and end > self.node.size:
            await self._resize(end, shrink=False)

    async def _resize(self, size: int, shrink: bool) -> None:
        node: Any = self.node
        if size > _MAX_SIZE:
            raise _refused(errno.EFBIG)
        while self._resizing:
            await self._changed.wait()
        if size <= node.size and not shrink:
            return
        self._resizing = True
        try:
            try:
                await node.truncate(size)
            except UsageError as error:  # of a format that has whole sectors only
                if shrink or not size % SECTOR:
                    raise _refused(errno.EINVAL) from error
                await node.truncate(-(-size // SECTOR) * SECTOR)
            self._changed_now()
        except (NotSupported, NotImplementedError) as error:
            raise _refused(errno.EOPNOTSUPP) from error
        finally:
            self._resizing = False
            self._changed.notify()


if sys.platform == "win32":

    def _us() -> tuple[int, int]:
        """User and group of this process."""
        return 0, 0

else:

    def _us() -> tuple[int, int]:
        """User and group of this process."""
        return os.getuid(), os.getgid()


def _refused(number: int) -> OSError:
    return OSError(number, os.strerror(number))
