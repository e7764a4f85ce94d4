"""The fsspec file system ``diskwright``: what disk images hold, as files.

``diskwright:///vm/disk.qcow2`` is the disk in an image, as one raw file.
``diskwright://part1::/vm/disk.qcow2`` and ``diskwright://disk.raw::s3://bucket/disk.qcow2`` are
files *in* an image, which may lie on any other file system of fsspec: the whole disk, its
partitions, and the same of each internal snapshot.  Needs the extra ``fsspec``.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

try:
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
    from fsspec.registry import filesystem  # type: ignore[import-untyped]
    from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]
    from fsspec.utils import tokenize  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError("diskwright.fs needs fsspec (install diskwright[fsspec])") from error

from .api import Disk, open
from .errors import DiskError
from .ops.gates import Policy
from .ops.partitions import Partition, partitions
from .ops.rawfile import RawDisk

DISK = "disk.raw"
"""The whole disk."""
SNAPSHOTS = "snapshots"
"""The folder of the internal snapshots, each a folder by its name."""
_BUFFER = 128 << 10
_OF_FSSPEC = {
    "asynchronous", "loop", "use_listings_cache", "listings_expiry_time", "max_paths",
    "skip_instance_cache",
}  # fmt: skip

Info = dict[str, Any]


class DiskFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Disk images as files, or one image as a folder.

    Without ``fo`` paths are those of another file system (``target_protocol`` with
    ``target_options``; by default the files of this machine), and each image is the disk in it.
    With ``fo``, a path or URL there or an open file, paths are those in this image: ``disk.raw``,
    ``part1`` ..., and ``snapshots/NAME/disk.raw`` ....

    Files are opened for reading (``rb``), or for changing bytes of the disk in place (``r+b``).
    Every open file has the image open for itself, so files may be used in different threads, and
    what was pickled (``secrets`` included) opens it again.  The other arguments are those of
    :func:`diskwright.open`.
    """

    protocol = "diskwright"
    root_marker = ""
    cachable = False  # a token does not tell one open file from another

    def __init__(
        self,
        fo: Any = None,
        target_protocol: str | None = None,
        target_options: Mapping[str, Any] | None = None,
        *,
        format: str | None = None,
        policy: str | Policy | None = None,
        options: Mapping[str, Any] | None = None,
        secrets: Mapping[str, bytes | str] | None = None,
        backing: bool = True,
        force_share: bool = False,
        **storage_options: Any,
    ) -> None:
        unknown = sorted(storage_options.keys() - _OF_FSSPEC)
        if unknown:  # a policy that is misspelled must not be none
            raise TypeError(f"the file system 'diskwright' has no option {unknown[0]!r}")
        super().__init__(**storage_options)
        self._how: dict[str, Any] = {
            "format": format, "policy": policy, "options": options, "secrets": secrets,
            "backing": backing, "force_share": force_share,
        }  # fmt: skip
        more = target_options or {}
        self._target: Any = None  # where the images lie
        if fo and not isinstance(fo, str | os.PathLike):
            self._image = fo
        elif fo and target_protocol is None:
            self._target, self._image = url_to_fs(os.fspath(fo), **more)
        else:
            self._target = filesystem(target_protocol or "file", **more)
            self._image = self._target._strip_protocol(os.fspath(fo)) if fo else None

    # -- what there is
    def info(self, path: str, **kwargs: Any) -> Info:
        """``name``, ``size`` in bytes and ``type``; of an image also its ``format``, of a partition
        its ``offset`` in the disk, ``partition_type`` and ``label``."""
        path = self._strip_protocol(path)
        if self._image is None:
            return self._shown(self._target.info(path))
        path = path.lstrip("/")
        if not path:
            return _folder("")
        for entry in self._inside(path.rpartition("/")[0]):
            if entry["name"] == path:
                return entry
        raise _not_found(path)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What is in a folder, or the one file.  Among images the size of what cannot be opened as
        a disk is None."""
        path = self._strip_protocol(path)
        if self._image is None:
            found = self._target.ls(path, detail=True, **kwargs)
            entries = [self._shown(entry, unknown=True) for entry in found] if detail else found
        else:
            entry = self.info(path)
            entries = [entry] if entry["type"] == "file" else self._inside(entry["name"])
        return entries if detail else [entry["name"] for entry in entries]

    def ukey(self, path: str) -> str:
        """Changes with the image's file."""
        if self._target is None:
            return str(tokenize(self.info(path)))
        image = self._image or self._strip_protocol(path)
        return str(tokenize(path, self._target.ukey(image)))

    def _shown(self, entry: Info, unknown: bool = False) -> Info:
        """What another file system says of a file, as the disk in it."""
        if entry["type"] != "file":
            return entry
        shown: Info = {"name": entry["name"], "type": "file", "size": None}
        try:
            with ExitStack() as stack:
                disk = self._enter(stack, entry["name"])
                return {**shown, "size": disk.size, "format": disk.format}
        except (OSError, DiskError):
            if unknown:
                return shown
            raise

    def _inside(self, folder: str) -> list[Info]:
        """The entries of a folder in the image."""
        with ExitStack() as stack:
            if folder == SNAPSHOTS:
                disk = self._enter(stack, self._image)
                return [_folder(f"{SNAPSHOTS}/{name}") for name in _snapshots(disk)]
            disk = self._enter(stack, self._image, _snapshot_of(folder))
            entries = [_file(f"{folder}/{leaf}".lstrip("/"), part) for leaf, part in _files(disk)]
            if not folder and _snapshots(disk):
                entries.append(_folder(SNAPSHOTS))
            return entries

    # -- opening
    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any
    ) -> io.BufferedReader | io.BufferedRandom:
        writable = mode in ("r+b", "rb+")
        if not writable and mode != "rb":
            raise io.UnsupportedOperation(f"a disk is opened with 'rb' or 'r+b', not {mode!r}")
        with ExitStack() as stack:
            if self._image is None:
                disk = self._enter(stack, path, writable=writable)
                part = Partition(0, 0, disk.size, "")
            else:
                disk, part = self._find(stack, path.lstrip("/"), writable)
            ends = stack.pop_all()
        make = WritableDiskFile if writable else DiskFile
        return make(_Held(disk, part, ends), self, path, block_size or _BUFFER)

    def _find(self, stack: ExitStack, path: str, writable: bool) -> tuple[Disk, Partition]:
        """A file in the image: the open disk, and where it is there."""
        if not path:
            raise IsADirectoryError(errno.EISDIR, f"an image is a folder: its disk is {DISK}", path)
        folder, _, leaf = path.rpartition("/")
        snapshot = _snapshot_of(folder)
        if snapshot and writable:
            raise io.UnsupportedOperation("snapshots are not written to")
        disk = self._enter(stack, self._image, snapshot, writable)
        for name, part in _files(disk):
            if name == leaf:
                return disk, part
        raise _not_found(path)

    def _enter(
        self, stack: ExitStack, image: Any, snapshot: str = "", writable: bool = False
    ) -> Disk:
        """Open an image until ``stack`` is left."""
        if self._target is not None and not isinstance(self._target, LocalFileSystem):
            image = stack.enter_context(self._target.open(image, "r+b" if writable else "rb"))
        disk = stack.enter_context(open(image, writable=writable, **self._how))
        if snapshot:
            found = _snapshots(disk)
            if snapshot not in found:
                raise _not_found(f"{SNAPSHOTS}/{snapshot}")
            disk.snapshots.show(found[snapshot])
        return disk


class _Held(RawDisk):
    """A part of a disk that is closed with it."""

    def __init__(self, disk: Disk, part: Partition, ends: ExitStack) -> None:
        super().__init__(disk, part.start, part.size)
        self._ends = ends

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._ends.close()


class DiskFile(io.BufferedReader):
    """A file that was opened for reading.  It can be pickled: it is opened again then."""

    def __init__(self, raw: _Held, fs: DiskFileSystem, path: str, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self.fs, self.path, self.size = fs, path, raw.size

    @property
    def full_name(self) -> str:
        """The path with its protocol."""
        return str(self.fs.unstrip_protocol(self.path))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (self.fs, self.path, self.tell())

    def __del__(self) -> None:
        """Nothing: the disk says that it was dropped open."""


class WritableDiskFile(io.BufferedRandom):
    """A file that was opened for changing bytes in place."""

    def __init__(self, raw: _Held, fs: DiskFileSystem, path: str, buffer_size: int) -> None:
        super().__init__(raw, buffer_size)
        self.fs, self.path, self.size = fs, path, raw.size

    def __del__(self) -> None:
        """Nothing: what io does here would write."""


def _again(fs: DiskFileSystem, path: str, position: int) -> Any:
    file = fs.open(path)
    file.seek(position)
    return file


def _snapshot_of(folder: str) -> str:
    """The name of the folder below ``snapshots``; empty for the image itself."""
    head, _, name = folder.partition("/")
    if folder and (head != SNAPSHOTS or not name or "/" in name):
        raise _not_found(folder)
    return name


def _files(disk: Disk) -> Iterator[tuple[str, Partition]]:
    """The names of a disk's parts, and where they are; the first is all of it."""
    yield DISK, Partition(0, 0, disk.size, "")
    for part in partitions(disk.read_at, disk.size):
        yield f"part{part.number}", part


def _snapshots(disk: Disk) -> dict[str, str]:
    """The ids of a disk's snapshots by the names of their folders: ``name``, or ``name~id`` where
    that is taken."""
    found: dict[str, str] = {}
    for one in disk.snapshots.list():
        name = _folder_name(one.name or one.id)
        found[f"{name}~{one.id}" if name in found else name] = one.id
    return found


def _folder_name(name: str) -> str:
    """What a snapshot is called need not be the name of a folder."""
    return quote(name, safe=" !@#$&()+,;=~'") if name.strip(".") else name.replace(".", "%2E")


def _file(name: str, part: Partition) -> Info:
    info: Info = {"name": name, "type": "file", "size": part.size}
    if part.number:
        info |= {"offset": part.start, "partition_type": part.type, "label": part.name}
    return info


def _folder(name: str) -> Info:
    return {"name": name, "type": "directory", "size": 0}


def _not_found(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
