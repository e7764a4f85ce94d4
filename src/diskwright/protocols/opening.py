"""From a name to a descriptor: flags, kinds of files, devices in use."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from ..errors import NotSupported, UsageError
from .os_portable import Device, Portable

CACHE_MODES = {  # direct, write-through, no flush
    "writeback": (False, False, False),
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, True, False),
    "writethrough": (False, True, False),
    "unsafe": (False, False, True),
}


def open_flags(table: Portable, writable: bool, cache: str) -> int:
    """The flags of open(2) for this cache mode."""
    direct = CACHE_MODES[cache][0]
    if direct and not table.direct_flag and type(table).set_direct is Portable.set_direct:
        raise NotSupported(f"cache mode '{cache}' is not available on this system")
    return (os.O_RDWR if writable else os.O_RDONLY) | (table.direct_flag if direct else 0)


def open_descriptor(
    table: Portable,
    filename: str,
    writable: bool,
    cache: str,
    create: bool,
    within: Sequence[str] = (),
) -> tuple[int, Device]:
    """Open ``filename`` and look what it is.  A writer claims a block device, so that what is
    mounted or otherwise in use is refused, and stays refused to others meanwhile.

    ``within``: folders, of which the file (a regular one) must be below one; it is never made.
    """
    flags = open_flags(table, writable, cache)
    if not within:
        flags |= _flags_for(table, filename, writable, create)
    try:
        fd = _open(table, filename, flags, within)
    except OSError as error:
        if error.errno == errno.EBUSY:
            why = table.who_uses(filename)
            raise OSError(errno.EBUSY, f"Device or resource busy: {why}", filename) from error
        if error.errno == errno.EINVAL and CACHE_MODES[cache][0]:
            raise OSError(
                errno.EINVAL, "The file system does not support O_DIRECT", filename
            ) from error
        raise
    try:
        device = table.device(fd)
        if writable and device.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), filename)
    except BaseException:
        os.close(fd)
        raise
    return fd, device


def _flags_for(table: Portable, filename: str, writable: bool, create: bool) -> int:
    """What open(2) is told beside, for what ``filename`` is."""
    try:
        mode = os.stat(filename).st_mode
    except FileNotFoundError:
        if not create:
            raise
        return os.O_CREAT
    if stat.S_ISBLK(mode):
        return table.exclusive_flag if writable else 0
    if not stat.S_ISREG(mode):
        raise UsageError(f"'file' driver requires '{filename}' to be a regular file")
    return 0


def _open(table: Portable, filename: str, flags: int, within: Sequence[str]) -> int:
    if not within:
        return table.open(filename, flags, 0o644)
    from .beneath import open_beneath

    return open_beneath(table, filename, flags, within)
