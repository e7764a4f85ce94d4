"""The table of operating-system calls, with what every system has.

The other tables (``os_linux``, ``os_darwin``, ``os_windows``) are this one with better rows.  A
row that a system lacks raises ``OSError(ENOTSUP)``, and the file protocol does without.  The
environment variable ``DISKWRIGHT_PORTABLE=1`` selects this table everywhere.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from _thread import allocate_lock
from collections.abc import Callable, Sequence

from ..records import NamedTuple
from .base import Buffer

Writable = bytearray | memoryview

OFFSET_MAX = (1 << 63) - 1  # of off_t


class Device(NamedTuple):
    """What a descriptor is: ``kind`` is ``file`` or ``device``; sizes in bytes."""

    kind: str
    size: int
    sector: int = 512
    """Logical sector: the smallest request that the medium takes."""
    read_only: bool = False


def unsupported() -> OSError:
    """The answer of a row that the system does not have."""
    return OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


class Portable:
    """Rows take descriptors, offsets and lengths in bytes, raise :class:`OSError`, and may move
    fewer bytes than asked where they return a count.  All of them may block."""

    name = "portable"
    vectors = 1
    """Most buffers that one ``read`` or ``write`` takes."""
    fast_read: Callable[[int, Sequence[Writable], int, int], int] | None = None
    """The bare call behind ``read`` (descriptor, buffers, offset, flags), for loops that cannot
    afford a frame a request."""
    cached_only = 0
    """Its flag for "do not wait for a medium" (:class:`BlockingIOError`, or less than asked)."""
    fast_write: Callable[[int, Buffer, int], int] | None = None
    """The bare call that writes one buffer (descriptor, buffer, offset)."""
    direct_flag = 0
    """What :func:`os.open` takes to go around the page cache; 0: see ``set_direct``."""
    exclusive_flag = 0
    """What :func:`os.open` takes to claim a block device for itself."""
    locks = False
    """``lock`` and ``locked`` exist."""

    def __init__(self) -> None:
        self._seek = allocate_lock()

    # -- opening
    def open(self, filename: str, flags: int, mode: int = 0o666) -> int:
        """A descriptor that children do not inherit."""
        return os.open(filename, flags | getattr(os, "O_BINARY", 0), mode)

    def again(self, fd: int, filename: str, flags: int) -> int:
        """Open once more what ``fd`` has open."""
        new = self.open(filename, flags)
        if not os.path.sameopenfile(fd, new):
            os.close(new)
            raise OSError(errno.ESTALE, f"'{filename}' is another file now")
        return new

    def path_of(self, fd: int, filename: str) -> str:
        """The path of what ``fd``, opened as ``filename``, has open, without links."""
        own = os.path.realpath(filename)
        if not os.path.samestat(os.fstat(fd), os.lstat(own)):
            raise OSError(errno.ESTALE, f"'{filename}' is another file now")
        return own

    def set_direct(self, fd: int) -> None:
        """Go around the page cache where that is not a flag of open."""
        raise unsupported()

    def device(self, fd: int) -> Device:
        """What was opened."""
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return Device("file", status.st_size)
        raise unsupported()

    def memory_backed(self, fd: int) -> bool:
        """True when the file lies in memory, so that reading it cannot stall."""
        return False

    def who_uses(self, filename: str) -> str:
        """Why a device cannot be claimed, for the message."""
        return "it is in use"

    # -- moving bytes
    def read(self, fd: int, buffers: Sequence[Writable], offset: int) -> int:
        """Fill the buffers from ``offset``; 0 at the end of the file."""
        view = buffers[0]
        with self._seek:
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, len(view))
        view[: len(data)] = data
        return len(data)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        """Write the buffers at ``offset``."""
        with self._seek:
            os.lseek(fd, offset, os.SEEK_SET)
            return os.write(fd, buffers[0])

    def read_ahead(self, fd: int, offset: int, length: int) -> None:
        """Begin to bring this range into the page cache."""

    def write_out(self, fd: int, offset: int, length: int) -> None:
        """Begin to write this range, which has just been changed, from the page cache to the
        medium."""

    def waits(self) -> int | None:
        """How often this thread has waited so far, where the system counts that."""
        return None

    def sync_data(self, fd: int) -> None:
        """Data, and what is needed to find them, are durable."""
        os.fsync(fd)

    def sync(self, fd: int) -> None:
        """Data and attributes are durable."""
        os.fsync(fd)

    def sync_directory(self, path: str) -> None:
        """The names in the directory ``path`` are durable, as far as it can be asked."""

    # -- space
    def truncate(self, fd: int, size: int) -> None:
        """Set the length."""
        if size > OFFSET_MAX:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        os.ftruncate(fd, size)

    def extend(self, fd: int, size: int) -> None:
        """Make the file at least ``size`` bytes long; its last byte belongs to whoever asks.
        Unlike ``truncate`` this cannot cut off what somebody else writes at the same time."""
        with self._seek:
            if os.lseek(fd, 0, os.SEEK_END) < size:
                os.lseek(fd, size - 1, os.SEEK_SET)
                os.write(fd, b"\0")

    def allocate(self, fd: int, offset: int, length: int) -> None:
        """Reserve space; the file grows when the range ends beyond its end."""
        raise unsupported()

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give the space back; the range, which lies inside the file, reads as zeroes."""
        raise unsupported()

    def zero_range(self, fd: int, offset: int, length: int) -> None:
        """Zero without writing and keep the space; the range lies inside the file."""
        raise unsupported()

    def zero_device(self, fd: int, offset: int, length: int, unmap: bool) -> None:
        """Zero sectors of a block device.  With ``unmap`` only if they can be unmapped."""
        raise unsupported()

    def discard_device(self, fd: int, offset: int, length: int) -> None:
        """Discard sectors of a block device."""
        raise unsupported()

    def data_from(self, fd: int, offset: int) -> tuple[int, int] | None:
        """The first run of data at or after ``offset``, as (start, end); None: a hole up to the
        end of the file."""
        raise unsupported()

    def copy(self, source: int, offset: int, target: int, at: int, length: int) -> int:
        """Copy inside the system; bytes copied."""
        raise unsupported()

    def clone(self, source: int, offset: int, target: int, at: int, length: int) -> None:
        """Share the blocks of the two files (reflink)."""
        raise unsupported()

    def no_copy_on_write(self, fd: int) -> None:
        """Ask the file system to rewrite this (empty) file in place."""
        raise unsupported()

    def extent_size_hint(self, fd: int, size: int) -> None:
        """Ask the file system to allocate in steps of ``size`` bytes."""
        raise unsupported()

    # -- locks
    def lock(self, fd: int, byte: int, held: bool) -> None:
        """Hold a shared lock on one byte, or give it back."""
        raise unsupported()

    def locked(self, fd: int, byte: int) -> bool:
        """True when another opener holds a lock on this byte."""
        raise unsupported()


_tables: dict[bool, Portable] = {}


def table() -> Portable:
    """The calls of the system that this runs on."""
    portable = os.environ.get("DISKWRIGHT_PORTABLE") == "1"
    found = _tables.get(portable)
    if found is None:
        found = _tables[portable] = Portable() if portable else _native()
    return found


def _native() -> Portable:
    if sys.platform == "linux":
        from .os_linux import Linux

        return Linux()
    if sys.platform == "darwin":
        from .os_darwin import Darwin

        return Darwin()
    if sys.platform == "win32":
        from .os_windows import Windows

        return Windows()
    return Portable()
