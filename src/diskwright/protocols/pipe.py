"""Ends of pipes: bytes that come, or go, in their order and once.

Waiting for the other end can be cancelled where the descriptor can be polled (pipes, sockets);
regular files and devices, which can be the ends of a command as well, are moved in the pool.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import FileIO

from ..engine.kernel import BaseDriver, Future
from .base import Buffer, Leaf

_ROOM = 1 << 20
"""Bytes that a pipe should hold: less wakes both of its ends more often."""
_F_SETPIPE_SZ = 1031
_PIECE = 1 << 20
_ZEROES = bytes(_PIECE)


class Inlet:
    """What the descriptor ``fd`` gives until its end; ``name`` is what messages call it."""

    def __init__(self, driver: BaseDriver, fd: int, name: str) -> None:
        self.driver, self.name = driver, name
        self._fd = fd
        self._file = FileIO(fd, "rb", closefd=False)
        self._polled = _can_be_polled(fd)
        _widen(fd)

    async def fill(self, view: memoryview) -> int:
        """Fill ``view``; returns how many bytes there were, fewer only at the end.  Raises
        OSError."""
        done = 0
        while done < len(view):
            if self._polled:
                await self.driver.readable(self._fd)
                count = self._file.readinto(view[done:])
            else:
                count = await self.driver.call(self._file.readinto, view[done:])
            if count == 0:
                break
            done += count or 0  # None: somebody else was faster
        return done

    def close(self) -> None:
        """Wait for it no more; the descriptor stays open."""
        if self._polled:
            self.driver.forget(self._fd)


class Outlet(Leaf):
    """A node that is written from its beginning to its end: what a write leaves out before it
    becomes zeroes.  ``size`` is what was sent."""

    def __init__(self, driver: BaseDriver, fd: int, name: str) -> None:
        super().__init__(driver, "pipe", name)
        _widen(fd)
        self._fd, self._polled = _own(fd)
        self._file = FileIO(self._fd, "wb")
        self._last: Future[None] = Future()
        """Set when the write that was issued last has ended."""
        self._last.set()
        self._error: OSError | None = None

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        await self._in_turn(zip(offsets, buffers, strict=True))

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        await self._in_turn(
            (offset + length, b"") for offset, length in zip(offsets, lengths, strict=True)
        )

    async def pad(self, size: int) -> None:
        """Send zeroes until ``size`` bytes were sent."""
        await self._in_turn([(size, b"")])

    def abort(self) -> None:
        """Whoever waits for the other end does so in vain: it fails."""
        self._error = OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        if self._polled:
            self.driver.forget(self._fd)

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self._polled:
                self.driver.forget(self._fd)
            self._file.close()

    async def _in_turn(self, parts: Iterable[tuple[int, Buffer]]) -> None:
        before, self._last = self._last, Future()
        mine = self._last
        try:
            await before
            for offset, data in parts:
                while self.size < offset:
                    await self._send(memoryview(_ZEROES)[: offset - self.size])
                if offset < self.size:
                    raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
                await self._send(memoryview(data).cast("B"))
        except OSError as error:
            self._error = self._error or error
            raise
        finally:
            mine.set()

    async def _send(self, view: memoryview) -> None:
        while view:
            if self._error is not None:
                raise self._error
            self.check_open()
            if not self._polled:
                count = await self.driver.call(self._file.write, view[:_PIECE])
            elif not (count := self._file.write(view)):
                await self.driver.writable(self._fd)
                continue
            self.size += count
            view = view[count:]


def _can_be_polled(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return sys.platform != "win32" and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def _own(fd: int) -> tuple[int, bool]:
    """A descriptor of our own for the same end, and whether it can be polled.

    Not to block is a property of the open pipe, which others share: it is opened once more.
    """
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and sys.platform == "linux":
        with suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK), True
    return os.dup(fd), False


def _widen(fd: int) -> None:
    if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(fd).st_mode):
        from fcntl import fcntl

        with suppress(OSError):
            fcntl(fd, _F_SETPIPE_SZ, _ROOM)
