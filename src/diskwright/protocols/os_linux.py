"""The table for Linux.  Rows that an old kernel or file system lacks answer with its own errno."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Sequence

from .base import Buffer
from .os_portable import Device, Portable, Writable, unsupported

assert sys.platform == "linux"

import fcntl  # noqa: E402 - after the assertion that tells type checkers the platform

# linux/fs.h and linux/falloc.h.
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_FICLONERANGE = 0x4020940D
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602
_FS_NOCOW_FL = 0x00800000
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FS_XFLAG_EXTSIZE = 0x00000800
# The ioctl forms of fallocate(2), generic since 5.5: no foreign-function module to import.
_FS_IOC_UNRESVSP64 = 0x4030582B
_FS_IOC_ZERO_RANGE = 0x40305839
_SPACE = struct.Struct("=hh4xqqiI4i")
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH, _FALLOC_ZERO = 0x01, 0x02, 0x10
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi")
_NOT_HERE = (errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


class Linux(Portable):
    """preadv2 with RWF_NOWAIT, fallocate, SEEK_DATA, copy_file_range, OFD locks."""

    name = "linux"
    vectors = min(os.sysconf("SC_IOV_MAX"), 1024)
    fast_read = staticmethod(os.preadv)
    cached_only = os.RWF_NOWAIT
    fast_write = staticmethod(os.pwrite)
    direct_flag = os.O_DIRECT
    exclusive_flag = os.O_EXCL
    locks = True

    def open(self, filename: str, flags: int, mode: int = 0o666) -> int:
        return os.open(filename, flags | os.O_CLOEXEC, mode)

    def again(self, fd: int, filename: str, flags: int) -> int:
        try:
            # The file itself, also when it was renamed or removed meanwhile.
            return self.open(f"/proc/self/fd/{fd}", flags)
        except FileNotFoundError:
            return super().again(fd, filename, flags)

    def device(self, fd: int) -> Device:
        status = os.fstat(fd)
        if not stat.S_ISBLK(status.st_mode):
            return super().device(fd)
        sector = _integer(fd, _BLKSSZGET, 512)
        return Device("device", os.lseek(fd, 0, os.SEEK_END), sector, bool(_integer(fd, _BLKROGET)))

    def memory_backed(self, fd: int) -> bool:
        number = os.fstat(fd).st_dev
        mount = _mount(os.major(number), os.minor(number))
        return mount is not None and mount[1] in ("tmpfs", "ramfs", "hugetlbfs")

    def who_uses(self, filename: str) -> str:
        number = os.stat(filename).st_rdev
        mount = _mount(os.major(number), os.minor(number))
        return f"it is mounted at '{mount[0]}'" if mount else "the system uses it"

    def read(self, fd: int, buffers: Sequence[Writable], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def read_ahead(self, fd: int, offset: int, length: int) -> None:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def write_out(self, fd: int, offset: int, length: int) -> None:
        # It begins to write what is dirty, and then drops what is clean: nothing, just now.
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def waits(self) -> int | None:
        import resource  # only once a write was slow

        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw

    def sync_data(self, fd: int) -> None:
        os.fdatasync(fd)

    def sync_directory(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            return  # may be entered but not read: there is nothing to sync it with
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
                raise
        finally:
            os.close(fd)

    def extend(self, fd: int, size: int) -> None:
        try:
            os.posix_fallocate(fd, size - 1, 1)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS):
                raise
            if os.fstat(fd).st_size < size:
                os.pwrite(fd, b"\0", size - 1)

    def allocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)

    def punch(self, fd: int, offset: int, length: int) -> None:
        _space(fd, _FS_IOC_UNRESVSP64, _FALLOC_PUNCH | _FALLOC_KEEP_SIZE, offset, length)

    def zero_range(self, fd: int, offset: int, length: int) -> None:
        _space(fd, _FS_IOC_ZERO_RANGE, _FALLOC_ZERO | _FALLOC_KEEP_SIZE, offset, length)

    def zero_device(self, fd: int, offset: int, length: int, unmap: bool) -> None:
        if unmap:
            _fallocate(fd, _FALLOC_PUNCH | _FALLOC_KEEP_SIZE, offset, length)
        else:
            fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))

    def discard_device(self, fd: int, offset: int, length: int) -> None:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("=QQ", offset, length))

    def data_from(self, fd: int, offset: int) -> tuple[int, int] | None:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        return start, os.lseek(fd, start, os.SEEK_HOLE)

    def copy(self, source: int, offset: int, target: int, at: int, length: int) -> int:
        return os.copy_file_range(source, target, length, offset, at)

    def clone(self, source: int, offset: int, target: int, at: int, length: int) -> None:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, offset, length, at))

    def no_copy_on_write(self, fd: int) -> None:
        flags = _integer(fd, _FS_IOC_GETFLAGS)
        fcntl.ioctl(fd, _FS_IOC_SETFLAGS, struct.pack("q", flags | _FS_NOCOW_FL))

    def extent_size_hint(self, fd: int, size: int) -> None:
        attributes = bytearray(fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(28)))
        flags, _ = struct.unpack_from("=II", attributes)
        struct.pack_into("=II", attributes, 0, flags | _FS_XFLAG_EXTSIZE, size)
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, bytes(attributes))

    def lock(self, fd: int, byte: int, held: bool) -> None:
        kind = fcntl.F_RDLCK if held else fcntl.F_UNLCK
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))

    def locked(self, fd: int, byte: int) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, _F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK


def _integer(fd: int, request: int, default: int = 0) -> int:
    """An ioctl that answers with one int; ``default`` when the device does not know it."""
    try:
        return int(struct.unpack_from("=I", fcntl.ioctl(fd, request, bytes(8)))[0])
    except OSError:
        return default


def _space(fd: int, request: int, mode: int, offset: int, length: int) -> None:
    try:
        fcntl.ioctl(fd, request, _SPACE.pack(0, os.SEEK_SET, offset, length, 0, 0, 0, 0, 0, 0))
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        _fallocate(fd, mode, offset, length)


_libc_fallocate: object = None


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself.  ctypes costs as much to import as the rest of a small command, so
    only what no ioctl does comes here."""
    global _libc_fallocate
    import ctypes

    if _libc_fallocate is None:
        libc = ctypes.CDLL(None, use_errno=True)
        for name in ("fallocate64", "fallocate"):
            _libc_fallocate = getattr(libc, name, None)
            if _libc_fallocate is not None:
                break
    if not callable(_libc_fallocate):
        raise unsupported()
    while _libc_fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _mount(major: int, minor: int) -> tuple[str, str] | None:
    """Where a device is mounted and as what: (mount point, file system), proc(5) mountinfo."""
    wanted = f"{major}:{minor}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.split(" ")
                if fields[2] == wanted:
                    return fields[4], fields[fields.index("-") + 1]
    except (OSError, ValueError, IndexError):
        pass  # no /proc: the message says less
    return None
