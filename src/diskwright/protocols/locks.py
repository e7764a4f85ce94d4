"""Locks on the bytes on which QEMU locks, so that each refuses what the other has open.

For permission *i* an opener holds a shared lock on byte ``100 + i`` when it uses it, and on
``200 + i`` when it does not let others use it (measured with qemu-img and qemu-io 10.0).  After
taking its own, an opener looks whether anybody else holds the opposite byte.
"""

from __future__ import annotations

import errno
from collections.abc import Collection

from ..errors import ImageInUse
from .base import PERMISSIONS
from .os_portable import Portable

_USED, _UNSHARED = 100, 200


class ImageLocks:
    """The locks of one descriptor, which belong to it and end with it.

    ``required``: fail where the file system has no such locks; otherwise go on without."""

    def __init__(self, table: Portable, fd: int, filename: str, required: bool = False) -> None:
        self.table, self.fd, self.filename, self.required = table, fd, filename, required
        self.held: set[int] = set()
        self.works = table.locks
        self._wanted: set[int] = set()
        self._floor: frozenset[int] = frozenset()
        self.kept = False
        """Between :meth:`keep` and :meth:`settle`."""

    def set(self, perms: Collection[str], shared: Collection[str]) -> None:
        """Use ``perms`` from now on and let others use ``shared``.  Raises
        :class:`~diskwright.errors.ImageInUse`, and then holds what it held before."""
        if not self.works:
            if self.required:
                raise OSError(errno.ENOTSUP, f"'{self.filename}' cannot be locked here")
            return
        used = [i for i, name in enumerate(PERMISSIONS) if name in perms]
        unshared = [i for i, name in enumerate(PERMISSIONS) if name not in shared]
        wanted = {_USED + i for i in used} | {_UNSHARED + i for i in unshared}
        added: list[int] = []
        try:
            for byte in sorted(wanted - self.held):
                self.table.lock(self.fd, byte, True)
                added.append(byte)
            # Who came after a byte was held has seen it, and gone.
            for i in used:
                if _USED + i in added and self.table.locked(self.fd, _UNSHARED + i):
                    raise ImageInUse(self.filename, PERMISSIONS[i])
            for i in unshared:
                if _UNSHARED + i in added and self.table.locked(self.fd, _USED + i):
                    raise ImageInUse(self.filename, PERMISSIONS[i], shared=True)
        except BaseException as error:
            for byte in added:
                self.table.lock(self.fd, byte, False)
            # EINVAL, ENOLCK, ENOTSUP: the kernel or the file system has no such locks.
            if isinstance(error, OSError) and error.errno in (
                errno.EINVAL,
                errno.ENOLCK,
                errno.ENOTSUP,
                errno.ENOSYS,
            ):
                self.works = False
                self.set(perms, shared)
                return
            raise
        self._wanted = wanted
        self._trim()

    def _trim(self) -> None:
        """Give up what is neither wanted nor kept."""
        wanted = self._wanted | self._floor
        for byte in sorted(self.held - wanted):
            self.table.lock(self.fd, byte, False)
        self.held = wanted

    def keep(self) -> None:
        """Give up nothing of what is held now until :meth:`settle`: it can be had again by
        :meth:`set`, which then cannot fail."""
        self._floor, self.kept = frozenset(self.held), True

    def settle(self) -> None:
        """End :meth:`keep`."""
        self._floor, self.kept = frozenset(), False
        if self.works:
            self._trim()

    def move(self, fd: int) -> None:
        """Hold the same on another opening of the file.  Those of this one end with it.  Raises
        OSError, and then all stay where they are."""
        moved: list[int] = []
        try:
            for byte in sorted(self.held):
                self.table.lock(fd, byte, True)
                moved.append(byte)
        except OSError:
            for byte in moved:
                self.table.lock(fd, byte, False)
            raise
        self.fd = fd

    def drop(self) -> None:
        """Give all up."""
        for byte in sorted(self.held):
            self.table.lock(self.fd, byte, False)
        self.held = set()
