"""An open file or block device: what is open, for whom and how, and its space.  The bytes are
moved by :mod:`.fileio`."""

from __future__ import annotations

import errno
import os
import sys
from _weakrefset import WeakSet
from collections.abc import Collection, Sequence

from ..contract import FUA, MAY_UNMAP, NO_FALLBACK, Limits
from ..engine.kernel import BaseDriver
from ..engine.node import Node
from ..errors import UsageError
from ..extents import Data, Extent, Zero
from ..hints import TYPE_CHECKING
from ..units import align_up
from .base import PERMISSIONS, WRITING
from .fileio import FileIO
from .locks import ImageLocks
from .opening import CACHE_MODES, open_descriptor
from .os_portable import Device, Portable
from .os_portable import table as system_table
from .space import Discards, Space, find_runs, merged, rough_runs

if TYPE_CHECKING:
    from .reopening import Reopened

_EVERYTHING = frozenset(PERMISSIONS)
_QUIET = frozenset({"consistent-read", "write-unchanged"})
_ZERO_STEP = 1 << 20
_COPY_STEP = 64 << 20


class FileNode(FileIO):
    """An open file or block device; made by :meth:`open`.  ``size`` is its length when it was
    opened, and grows with what is written through this node."""

    def __init__(
        self, driver: BaseDriver, filename: str, table: Portable, fd: int, device: Device
    ) -> None:
        super().__init__(driver, filename, table, fd, device)
        self.cache = "writeback"
        self.discards = Discards()
        self.force_share = False
        self.auto_read_only = False
        self.for_writing = self.has_writers = False
        """How it is open, and what its users need."""
        self.unmap = True
        self._claim_fd = -1  # holds the exclusive claim on a device
        self.locks = ImageLocks(table, fd, filename)
        _live.add(self)

    def abandon(self) -> None:
        if not self.closed:
            self.closed = True
            self._close_descriptors()

    __del__ = abandon

    @classmethod
    async def open(
        cls,
        driver: BaseDriver,
        filename: str,
        *,
        writable: bool = False,
        cache: str = "writeback",
        force_share: bool = False,
        create: bool = False,
        locking: str = "auto",
        discard: str = "unmap",
        perms: Collection[str] | None = None,
        shared: Collection[str] | None = None,
        auto_read_only: bool = False,
        within: Sequence[str] = (),
    ) -> FileNode:
        """Open ``filename`` (not UTF-8: surrogate escapes).

        ``create`` makes it, or empties it once it is locked.  ``perms`` and ``shared`` are what
        the node's users need and what they let other programs do; by default a writer shares
        with readers only and a reader refuses writers.  ``force_share`` (read-only) shares
        everything.  ``locking``: auto, on (fail where there are no locks), off.  ``discard``:
        unmap or ignore.  ``auto_read_only``: the file is opened for writing while ``perms`` need
        that alone.  ``within``: folders that the file must be below (see :mod:`.beneath`).
        Raises OSError, UsageError, ImageInUse and Outside.
        """
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {cache}")
        writable = writable or create
        if force_share and writable:
            raise UsageError("force-share=on can only be used with read-only images")
        table = system_table()
        for_writing = create or (writable and not auto_read_only)
        fd, device = open_descriptor(table, filename, for_writing, cache, create, within)
        node = cls(driver, filename, table, fd, device)
        try:
            node.force_share = force_share
            node.unmap = discard in ("unmap", "on")
            node.read_only = not writable
            node.auto_read_only, node.for_writing = auto_read_only, for_writing
            if for_writing and device.kind == "device":
                node._claim_fd = fd
            node.locks.required = locking == "on"
            node.locks.works = locking != "off" and node.locks.works
            if create:
                node.set_permissions({"write", "resize"}, _EVERYTHING - {"resize"})
                if device.kind == "file":
                    table.truncate(fd, 0)
                    node.size = 0
                    node.device = node._space.device = table.device(fd)
                node._new = True
                node._written += 1
            else:
                if perms is None:
                    perms = {"consistent-read", "write", "resize"} if writable else {PERMISSIONS[0]}
                if force_share:
                    shared = _EVERYTHING
                node.set_permissions(perms, _QUIET if shared is None else shared)
            node._use_cache(cache, await node._alignment(cache, fd))
        except BaseException:
            node.closed = True
            node._close_descriptors()
            raise
        return node

    async def _alignment(self, cache: str, fd: int) -> int:
        """What requests must be aligned to on ``fd``, which was opened with the flags for
        ``cache``."""
        if not CACHE_MODES[cache][0]:
            return 1
        if not self.table.direct_flag:
            self.table.set_direct(fd)
            return 1
        from .direct import probe_alignment

        found = await self._job(probe_alignment, self.table, fd, self.size)
        return max(found, self.device.sector) if self.device.kind == "device" else found

    def _use_cache(self, cache: str, alignment: int) -> None:
        """Go on in this mode."""
        direct, through, unsafe = CACHE_MODES[cache]
        self._bounce, self.limits = None, Limits()
        if direct and self.table.direct_flag:
            from .bounce import Bounce
            from .direct import DirectIO

            mover = DirectIO(self.driver, self.table, self._fd, alignment)
            self._bounce = Bounce(alignment, mover.read, mover.write)
            self.limits = Limits(alignment)
        self.cache, self._write_through, self._no_flush = cache, through, unsafe
        self._space = Space(self.table, self._fd, self.device)
        self._fast_read, self._cached_only = self.table.fast_read, self.table.cached_only

    # -- zeroes and discards
    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self.check_writable()
        spans = merged(offsets, lengths)
        if not spans:
            return
        bounce = self._bounce
        lease = await bounce.lock(offsets, lengths) if bounce is not None else None
        end = spans[-1][1]
        try:
            unmap = bool(flags & MAY_UNMAP) and self.unmap
            left, edges = await self._job(self._space.zero, spans, unmap)
        except BaseException:
            self._changed_to(min(end, self._length()))
            raise
        finally:
            if bounce is not None and lease is not None:
                bounce.leases.drop(lease)
        self._changed_to(end)
        if unmap and not left:
            self.discards.count(len(spans), [stop - start for start, stop in spans])
        if left and flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "zeroes can only be written here", self.filename)
        for start, stop in left + edges:
            block = bytes(min(stop - start, _ZERO_STEP))
            for at in range(start, stop, _ZERO_STEP):
                await super().write([at], [block[: stop - at]])
        if flags & FUA or self._write_through:
            await self.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self.check_writable()
        spans = merged(offsets, lengths)
        if not self.unmap or not spans:
            return
        bounce = self._bounce
        lease = await bounce.lock(offsets, lengths) if bounce is not None else None
        done: list[int] = []
        try:
            done = await self._job(self._space.discard, spans)
        finally:
            self.discards.count(len(spans), done)
            self._changed_to(0)
            if bounce is not None and lease is not None:
                bounce.leases.drop(lease)
        if self._write_through:
            await self.flush()

    # -- what is where
    async def extents(self, offset: int, length: int) -> list[Extent]:
        self.check_open()
        end = offset + length
        inside = min(end, self.size)
        found: list[Extent] = []
        at = offset
        while at < inside:
            if "data_from" in self._space.missing:
                run = (at, inside, True)
            else:
                known = self._holes.at(at)
                run = known or await self._look(at, inside)
            stop = min(run[1], inside)
            if run[2]:
                found.append(Data("", at, stop - at, not self.read_only))
            else:
                found.append(Zero(stop - at, explicit=False))
            at = stop
        if at < end and found and isinstance(found[-1], Data):
            # Around the page cache a file ends with a whole sector, as it is read.
            stop = min(align_up(at, self.limits.alignment), end)
            found[-1] = found[-1]._replace(length=found[-1].length + stop - at)
            at = stop
        if at < end:
            found.append(Zero(end - at, explicit=False))
        return found

    async def rough_extents(self, offset: int, length: int, least_hole: int) -> list[Extent]:
        """Like :meth:`extents`, for who reads anyway: a hole between data that is not twice as
        long as ``least_hole`` may be told as data."""
        self.check_open()
        inside = min(offset + length, self.size)
        if "data_from" in self._space.missing or offset >= inside:
            return await self.extents(offset, length)
        try:
            runs = await self._job(self._rough, offset, inside, least_hole)
        except OSError as error:
            self._cannot_tell(error)
            return await self.extents(offset, length)
        found: list[Extent] = []
        for end, data in runs:
            run = end - offset
            if data:
                found.append(Data("", offset, run, not self.read_only))
            else:
                found.append(Zero(run, explicit=False))
            offset = end
            length -= run
        if length:
            found.append(Zero(length, explicit=False))
        return found

    def _rough(self, start: int, stop: int, least_hole: int) -> list[tuple[int, bool]]:
        return list(rough_runs(self.table, self._fd, start, stop, least_hole))

    def _cannot_tell(self, error: OSError) -> None:
        """Remember that the file system does not tell its holes; other errors are raised."""
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise error
        self._space.missing.add("data_from")

    async def _look(self, at: int, stop: int) -> tuple[int, int, bool]:
        """Ask the file system for the run at ``at``, and for what follows it."""
        changes = self._holes.changes
        try:
            runs = await self._job(find_runs, self.table, self._fd, at, stop, self.size)
        except OSError as error:
            self._cannot_tell(error)
            return at, stop, True
        if not self.force_share:
            self._holes.add(runs, changes)
        return runs[0]

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self.check_writable()
        try:
            await self._job(self._space.resize, size, preallocation)
        finally:
            self._written += 1
            self._overshot = False
            self.size = self._length()
            self._holes.forget()
            self.changed()

    def refresh(self) -> int:
        """Look at the length again (another program may have changed it) and tell the parents."""
        self.check_open()
        size = self._length()
        if size != self.size:
            self.size = size
            self._holes.forget()
            self.changed()
        return size

    def disk_size(self) -> int | None:
        """Bytes that the file system has allocated for it, where it tells."""
        self.check_open()
        blocks: int | None = getattr(os.fstat(self._fd), "st_blocks", None)
        return None if blocks is None else blocks * 512

    # -- ways around the loop
    async def copy_range(self, source: Node, source_offset: int, offset: int, length: int) -> int:
        """Copy from ``source`` without moving the bytes through this process (a reflink where
        the file system has them).  Bytes copied, which may be fewer; 0: it cannot be done, or
        ``source`` ends there."""
        self.check_writable()
        if not isinstance(source, FileNode):
            return 0
        source.check_open()
        if self._bounce is not None or source._bounce is not None:
            return 0
        length = min(length, source.size - source_offset, _COPY_STEP)
        if length <= 0:
            return 0
        copied = 0
        try:
            copied = await source._counted(
                self._job(self._space.copy, source._fd, source_offset, offset, length)
            )
        finally:
            self._changed_to(offset + copied if copied else 0)
        if copied and self._write_through:
            await self.flush()
        return copied

    def fileno(self) -> int:
        """The descriptor, as long as the node is open."""
        self.check_open()
        return self._fd

    def set_permissions(self, perms: Collection[str], shared: Collection[str]) -> None:
        """What the users of this node need, and what they let other programs do.  Raises
        :class:`~diskwright.errors.ImageInUse` and OSError, and changes nothing then."""
        shared = _EVERYTHING if self.force_share else shared
        if self.auto_read_only:
            from .reopening import follow

            follow(self, perms, shared)
        else:
            self.locks.set(perms, shared)
        self.has_writers = not WRITING.isdisjoint(perms)

    async def reopen(
        self,
        *,
        writable: bool | None = None,
        cache: str | None = None,
        auto_read_only: bool | None = None,
    ) -> Reopened:
        """Flush, and open the same file again; forgets that a flush failed.  Raises OSError, and
        then stays as it was.  The caller keeps what came of it or takes it back."""
        from .reopening import switch

        return await switch(self, writable, cache, auto_read_only)

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        try:
            while self._jobs:
                await self._idle.wait()
            if self._overshot:
                self._cut_back()
            await self._flush()
        finally:
            # Given up, not only closed: a child of the process may hold a copy of the descriptor.
            try:
                self.locks.drop()
            finally:
                self._close_descriptors()

    def _close_descriptors(self) -> None:
        """Their locks end with them."""
        for fd in {self._fd, self.locks.fd, self._claim_fd} - {-1}:
            os.close(fd)
        self._fd = self.locks.fd = self._claim_fd = -1
        _live.discard(self)


_live: WeakSet[FileNode] = WeakSet()


def _forked() -> None:
    """In a forked child: close its copies, so that they do not keep the locks alive."""
    for node in list(_live):
        node.closed = True
        node._close_descriptors()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forked)
