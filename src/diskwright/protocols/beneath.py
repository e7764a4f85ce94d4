"""A file that an image names, opened below a folder: no symbolic link and no ``..`` leads out.

The path is walked from the folder's own descriptor, one component at a time and none of them
through a link, so that what was looked at is what gets opened, whatever is renamed meanwhile.
Links that stay below are followed by hand.  Systems without ``openat`` compare the path that the
descriptor itself has.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from ..errors import Outside
from .os_portable import Portable

_FOLLOWED = 40
"""Symbolic links in one path, as Linux counts them."""
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # a FIFO that took the file's place must not hold us up


def below(path: str, folders: Sequence[str]) -> tuple[str, list[str]] | None:
    """The widest of ``folders`` (absolute) that ``path`` begins with, and the components behind
    it; None where there is none.  Nothing but the folders is looked at: links and ``..`` behind
    them are as they are written.
    """
    parts = _parts(os.path.join(os.getcwd(), path))
    for folder in sorted(folders, key=len):
        root = _parts(folder)
        if parts[: len(root)] == root and len(parts) > len(root):
            left = parts[len(root) :]
            return below(_climbed(folder, left[1:]), folders) if left[0] == ".." else (folder, left)
    return None


def open_beneath(table: Portable, path: str, flags: int, folders: Sequence[str]) -> int:
    """Open the regular file ``path``, which must lie below one of ``folders``.

    Raises :class:`~diskwright.errors.Outside` when it does not, or is no regular file, and OSError.
    """
    if os.open in os.supports_dir_fd:
        fd = _walk(path, flags, folders)
    else:
        fd = _checked(table, path, flags, folders)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Outside(path, "it is not a regular file")
    return fd


def _climbed(folder: str, left: Sequence[str]) -> str:
    """The path ``folder/../left``."""
    return os.path.join(os.path.dirname(os.path.realpath(folder)), *left)


def _parts(path: str) -> list[str]:
    return [os.path.normcase(part) for part in path.replace(os.sep, "/").split("/")
            if part not in ("", ".")]  # fmt: skip


def _walk(path: str, flags: int, folders: Sequence[str]) -> int:
    found = path
    for _ in range(_FOLLOWED):
        start = below(found, folders)
        if start is None:
            raise Outside(path, f"it leads to '{found}'")
        outcome = _descend(*start, flags, path)
        if isinstance(outcome, int):
            return outcome
        found = outcome
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _descend(folder: str, left: list[str], flags: int, path: str) -> int | str:
    """Go down from ``folder`` by the components ``left``: the file's descriptor, or the absolute
    path that a link or ``..`` leads to."""
    way = [os.open(folder, _FOLDER)]
    followed = 0
    try:
        while left:
            name, *left = left
            if name == "..":
                if len(way) == 1:
                    return _climbed(folder, left)
                os.close(way.pop())
                continue
            mode = os.stat(name, dir_fd=way[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                followed += 1
                if followed > _FOLLOWED:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                target = os.readlink(name, dir_fd=way[-1])
                left = _parts(target) + left
                if target.startswith("/"):
                    return "/" + "/".join(left)
            elif left:
                way.append(os.open(name, _FOLDER | _NO_LINK, dir_fd=way[-1]))
            elif stat.S_ISREG(mode):
                return os.open(name, flags | _NO_LINK | _AT_ONCE, dir_fd=way[-1])
        raise Outside(path, "it is not a regular file")
    finally:
        for fd in way:
            os.close(fd)


def _checked(table: Portable, path: str, flags: int, folders: Sequence[str]) -> int:
    """Where there is no ``openat``: what the descriptor's own path says counts."""
    fd = table.open(path, flags)
    try:
        own = table.path_of(fd, path)
        if below(own, [os.path.realpath(folder) for folder in folders]) is None:
            raise Outside(path, f"it leads to '{own}'")
    except BaseException:
        os.close(fd)
        raise
    return fd
