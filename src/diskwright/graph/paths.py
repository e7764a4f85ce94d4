"""Paths of another machine: what they mean here, by a mapping that the caller gives.

Images made on Windows name their parents and extents by drive (``C:\\VMs\\base.vhdx``), share
(``\\\\server\\share\\base.vhdx``) or volume (``\\\\?\\Volume{GUID}\\base.vhdx``).  None of these
means a file here by itself; a mapping of a prefix to a directory says which one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import UsageError
from .names import foreign

_VERBATIM = re.compile(r"\\\\\?\\(?:(UNC)\\|(?=[A-Za-z]:))", re.IGNORECASE)

_Parts = tuple[str, ...]


class PathMap:
    """Prefixes of absolute paths and the directories that stand for them.

    Windows prefixes match in any case and with either slash, POSIX ones exactly.  A prefix matches
    whole components, the longest one counts, and ``..`` is resolved before: a path that climbs out
    of a prefix is not below it.  Raises UsageError for a prefix that is not absolute and for an
    empty directory.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.paths = dict(paths)
        self._known: list[tuple[_Parts, str]] = []
        for prefix, directory in self.paths.items():
            parts = _parts(prefix)
            if parts is None:
                raise UsageError(f"'{prefix}' cannot be mapped: it is no absolute path")
            if not directory or "\0" in directory:
                raise UsageError(f"'{prefix}' cannot be mapped to '{directory}'")
            self._known.append((_key(parts), directory))
        self._known.sort(key=lambda item: len(item[0]), reverse=True)

    def apply(self, name: str) -> str | None:
        """What ``name`` means here; None where no prefix matches."""
        parts = _parts(name) if self._known else None
        if parts is None:
            return None
        key = _key(parts)
        for prefix, directory in self._known:
            if key[: len(prefix)] == prefix:
                rest = "/".join(parts[len(prefix) :])
                return f"{directory.rstrip('/')}/{rest}" if rest else directory
        return None


def folder_of(name: str) -> str:
    """The folder of a Windows path: what a mapping of its like would begin with."""
    cut = max(name.rfind("\\"), name.rfind("/"))
    folder = name[:cut] if cut > 0 else name
    return folder if len(folder.strip("\\/")) > 1 else name


def _parts(name: str) -> _Parts | None:
    """The components of an absolute path: its root (``/``, ``\\\\`` or a drive), then names
    without ``.`` and ``..``; None for any other name."""
    if foreign(name):
        text = name.replace("/", "\\")
        verbatim = _VERBATIM.match(text)
        if verbatim is not None:
            text = ("\\\\" if verbatim.group(1) else "") + text[verbatim.end() :]
        if text.startswith("\\\\"):
            root, text = "\\\\", text[2:]
        else:
            root, text = text[:2], text[2:]
        names = text.split("\\")
    elif name.startswith("/"):
        root, names = "/", name.split("/")
    else:
        return None
    found: list[str] = []
    for part in names:
        if part == "..":
            del found[-1:]
        elif part not in ("", "."):
            found.append(part)
    return (root, *found)


def _key(parts: _Parts) -> _Parts:
    """Components as they are compared."""
    return parts if parts[0] == "/" else tuple(part.casefold() for part in parts)
