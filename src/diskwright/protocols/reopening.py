"""A file that is opened anew in place, for other uses or as its writers come and go.

The descriptor keeps its number, and what is open under it is another opening of the same file: a
system call that is on its way ends on the one that it began with, and nothing is lost.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from contextlib import suppress

from ..errors import UsageError
from ..hints import TYPE_CHECKING
from .base import WRITING
from .opening import CACHE_MODES, open_flags

if TYPE_CHECKING:
    from .filenode import FileNode

_STATE = (
    "read_only", "auto_read_only", "for_writing", "cache", "limits", "_bounce", "_write_through",
    "_no_flush", "_space", "_fast_read", "_cached_only", "_flush_error", "_claim_fd",
)  # fmt: skip


class Reopened:
    """What a file was before it was opened anew.  :meth:`keep` or :meth:`undo` must end it; neither
    can fail."""

    def __init__(self, node: FileNode) -> None:
        self.node = node
        self._state = {name: getattr(node, name) for name in _STATE}
        self._fd = os.dup(node._fd)
        if node.locks.fd == node._fd:
            node.locks.fd = self._fd
        if node._claim_fd == node._fd:
            node._claim_fd = self._fd

    def keep(self) -> None:
        """It stays as it is now."""
        node = self.node
        done = {self._fd}
        with suppress(OSError):  # else the locks stay where they are
            before = node.locks.fd
            node.locks.move(node._fd)
            done.add(before)
        if node._claim_fd == self._fd and not node.for_writing:
            node._claim_fd = -1
        for fd in done - {node.locks.fd, node._claim_fd}:
            os.close(fd)

    def undo(self) -> None:
        """It is again what it was."""
        node = self.node
        os.dup2(self._fd, node._fd, inheritable=False)
        os.close(self._fd)
        if node.locks.fd == self._fd:
            node.locks.fd = node._fd
        for name, value in self._state.items():
            setattr(node, name, value)
        node.changed()


async def switch(
    node: FileNode, writable: bool | None, cache: str | None, auto_read_only: bool | None
) -> Reopened:
    """Flush ``node``, and open its file again; forgets that a flush failed.  What is None stays.
    Raises OSError, and then it stays as it was."""
    node.check_open()
    writable = not node.read_only if writable is None else writable
    cache = node.cache if cache is None else cache
    auto = node.auto_read_only if auto_read_only is None else auto_read_only
    if cache not in CACHE_MODES:
        raise UsageError(f"Invalid cache option: {cache}")
    for_writing = writable and (node.has_writers or not auto)
    same = (for_writing, CACHE_MODES[cache][0]) == (node.for_writing, CACHE_MODES[node.cache][0])
    if node._flush_error is None:
        await node.flush()
    if same and node._flush_error is None:
        fd, claims = os.dup(node._fd), node._claim_fd == node._fd
    else:
        fd, claims = _open(node, for_writing, cache)
    try:
        alignment = await node._alignment(cache, fd)
        while node._jobs:
            await node._idle.wait()
        before = Reopened(node)
    except BaseException:
        os.close(fd)
        raise
    os.dup2(fd, node._fd, inheritable=False)
    os.close(fd)
    if claims:
        node._claim_fd = node._fd
    node.read_only, node.auto_read_only, node.for_writing = not writable, auto, for_writing
    node._flush_error = None
    node._use_cache(cache, alignment)
    node.changed()
    return before


def follow(node: FileNode, perms: Collection[str], shared: Collection[str]) -> None:
    """Take the permissions, and have the file open for writing while they need that alone.

    Raises OSError and :class:`~diskwright.errors.ImageInUse`, and changes nothing then.
    """
    wanted = not (node.read_only or WRITING.isdisjoint(perms))
    if wanted == node.for_writing:
        node.locks.set(perms, shared)
        return
    if not wanted:
        node.locks.set(perms, shared)
        if node.locks.kept:
            return
        with suppress(OSError):  # it stays open for what nobody does
            _replace(node, *_open(node, False, node.cache))
        return
    fd, claims = _open(node, True, node.cache)
    try:
        node.locks.set(perms, shared)
    except BaseException:
        os.close(fd)
        raise
    _replace(node, fd, claims)


def _open(node: FileNode, for_writing: bool, cache: str) -> tuple[int, bool]:
    """Another opening of the file, and whether it claims the device that the file is."""
    table = node.table
    claims = for_writing and node.device.kind == "device" and node._claim_fd < 0
    flags = open_flags(table, for_writing, cache)
    try:
        fd = table.again(
            node._fd, node.filename, flags | (table.exclusive_flag if claims else 0)
        )
    except OSError as error:
        error.filename = node.filename
        raise
    if for_writing and table.device(fd).read_only:
        os.close(fd)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), node.filename)
    return fd, claims


def _replace(node: FileNode, fd: int, claims: bool) -> None:
    """Go on with ``fd``, at once."""
    try:
        if node._overshot and not node._jobs:
            node._cut_back()
        if node.locks.fd == node._fd:
            node.locks.move(fd)
            node.locks.fd = node._fd
        os.dup2(fd, node._fd, inheritable=False)
    finally:
        os.close(fd)
    if claims:
        node._claim_fd = node._fd
    elif node.for_writing and node._claim_fd == node._fd:
        node._claim_fd = -1
    node.for_writing = not node.for_writing
