"""The table for macOS."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Sequence

from .base import Buffer
from .os_portable import Device, Portable, Writable

assert sys.platform == "darwin"

import fcntl  # noqa: E402 - after the assertion that tells type checkers the platform

# sys/fcntl.h, sys/disk.h
_F_NOCACHE = 48
_F_FULLFSYNC = 51
_F_PREALLOCATE, _F_ALLOCATEALL, _F_PEOFPOSMODE = 42, 4, 3
_F_PUNCHHOLE = 99
_DKIOCGETBLOCKSIZE, _DKIOCGETBLOCKCOUNT = 0x40046418, 0x40086419
_DKIOCISWRITABLE = 0x4004641D


class Darwin(Portable):
    """Positional vectored I/O (macOS 11), F_NOCACHE, F_FULLFSYNC, F_PUNCHHOLE."""

    name = "darwin"
    vectors = min(os.sysconf("SC_IOV_MAX"), 1024) if hasattr(os, "preadv") else 1

    def set_direct(self, fd: int) -> None:
        fcntl.fcntl(fd, _F_NOCACHE, 1)

    def device(self, fd: int) -> Device:
        status = os.fstat(fd)
        if not (stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode)):
            return super().device(fd)
        sector: int = struct.unpack("=I", fcntl.ioctl(fd, _DKIOCGETBLOCKSIZE, bytes(4)))[0]
        count: int = struct.unpack("=Q", fcntl.ioctl(fd, _DKIOCGETBLOCKCOUNT, bytes(8)))[0]
        writable: int = struct.unpack("=I", fcntl.ioctl(fd, _DKIOCISWRITABLE, bytes(4)))[0]
        return Device("device", sector * count, sector, not writable)

    def read(self, fd: int, buffers: Sequence[Writable], offset: int) -> int:
        if self.vectors > 1:
            return os.preadv(fd, buffers, offset)
        data = os.pread(fd, len(buffers[0]), offset)
        buffers[0][: len(data)] = data
        return len(data)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        if self.vectors > 1:
            return os.pwritev(fd, buffers, offset)
        return os.pwrite(fd, buffers[0], offset)

    def sync_data(self, fd: int) -> None:
        try:
            # fsync(2) of this system leaves the data in the drive's cache.
            fcntl.fcntl(fd, _F_FULLFSYNC)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
            os.fsync(fd)

    def sync(self, fd: int) -> None:
        self.sync_data(fd)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def extend(self, fd: int, size: int) -> None:
        if os.fstat(fd).st_size < size:
            os.pwrite(fd, b"\0", size - 1)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        end = offset + length
        size = os.fstat(fd).st_size
        if end > size:
            # struct fstore: space after the physical end of the file.
            asked = struct.pack("=Iiqqq", _F_ALLOCATEALL, _F_PEOFPOSMODE, 0, end - size, 0)
            fcntl.fcntl(fd, _F_PREALLOCATE, asked)
            os.ftruncate(fd, end)

    def punch(self, fd: int, offset: int, length: int) -> None:
        # struct fpunchhole
        fcntl.fcntl(fd, _F_PUNCHHOLE, struct.pack("=IIqq", 0, 0, offset, length))

    def data_from(self, fd: int, offset: int) -> tuple[int, int] | None:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return start, os.lseek(fd, start, os.SEEK_HOLE)
