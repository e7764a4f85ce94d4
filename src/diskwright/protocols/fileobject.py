"""Protocol ``file-object``: a disk in what a program has open: a file, bytes in memory, a member of
an archive, a file of an fsspec file system.

The object belongs to the disks in it until they are closed: it has one position, which every
request moves.  It is not closed with them.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from ..contract import FUA, NO_FALLBACK
from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..errors import FlushFailed, UsageError, words
from ..extents import Extent
from ..hints import Any
from .base import Buffer, Leaf, clear
from .lane import Lane

_STEP = 1 << 20
_ZEROES = bytes(_STEP)


class Turns:
    """Those of all disks in one object, which the memory of fsspec gives to everybody who opens the
    same path."""

    def __init__(self, file: Any) -> None:
        self.file = file  # so that no other object gets its id
        self.lock = threading.Lock()


_turns: WeakValueDictionary[int, Turns] = WeakValueDictionary()
_guard = threading.Lock()


def turns_of(file: Any) -> Turns:
    """The same for every disk in ``file``."""
    with _guard:
        found = _turns.get(id(file))
        if found is None:
            found = _turns[id(file)] = Turns(file)
        return found


def _forked() -> None:
    """In a child: what other threads held is held by nobody."""
    global _guard
    _guard = threading.Lock()
    _turns.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class FileObjectNode(Leaf):
    """A seekable file object.  One request at a time is made of it, in a thread of the pool."""

    def __init__(self, driver: BaseDriver, file: Any, label: str) -> None:
        super().__init__(driver, "file-object")
        self._file = file
        self._turns = turns_of(file)
        self.filename = label or ""
        self._lane = Lane(driver)
        self._unflushed = False
        self._flush_error: OSError | None = None

    async def _do(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the object asked.  What it raises of its own kind becomes an OSError."""
        self.check_open()
        try:
            await self._lane.call(self._in_turn, function, *arguments)
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = self.filename or None
            raise
        except Exception as error:
            raise OSError(errno.EIO, words(error) or repr(error), self.filename or None) from error

    async def begin(self, writable: bool) -> None:
        """Learn the length."""
        await self._do(self._measure)
        self.read_only = not writable

    # -- in a thread
    def _in_turn(self, function: Callable[..., None], *arguments: Any) -> None:
        with self._turns.lock:
            function(*arguments)

    def _measure(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        self.size = self._file.tell() if end is None else end

    def _read(self, offsets: Sequence[int], views: Sequence[memoryview]) -> None:
        for offset, view in zip(offsets, views, strict=True):
            inside = max(0, min(len(view), self.size - offset))
            at = 0
            if inside:
                self._file.seek(offset)
            while at < inside:
                part = self._file.read(min(inside - at, _STEP))
                if not part:
                    raise OSError(errno.EIO, f"the file ends at {offset + at}, not {self.size}")
                if len(part) > inside - at:
                    raise OSError(errno.EIO, "the file gives more bytes than were asked for")
                view[at : at + len(part)] = part
                at += len(part)
            clear(view, inside, len(view))

    def _write(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            if len(buffer):
                self._write_one(offset, buffer)

    def _write_one(self, offset: int, buffer: Buffer) -> None:
        if offset > self.size:
            self._fill(self.size, offset)
        self._file.seek(offset)
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view):
            count = self._file.write(view[done:])
            if not count:
                raise OSError(errno.EIO, "the file takes no more bytes")
            done += count
            self.size = max(self.size, offset + done)

    def _fill(self, start: int, stop: int) -> None:
        for at in range(start, stop, _STEP):
            self._write_one(at, _ZEROES[: stop - at])

    def _zero(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        for offset, length in zip(offsets, lengths, strict=True):
            self._fill(offset, offset + length)

    def _truncate(self, size: int) -> None:
        if size > self.size:  # not every object grows by truncate
            self._fill(self.size, size)
        else:
            self._file.truncate(size)
            self.size = size

    def _flush(self) -> None:
        self._file.flush()
        try:
            fd = self._file.fileno()
        except (AttributeError, OSError, ValueError, NotImplementedError):
            return  # not a file of the system
        os.fsync(fd)

    # -- requests
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        views = [memoryview(bytearray(n)) for n in lengths] if into is None else into
        await self._do(self._read, offsets, views)
        return views

    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
        tag: str = "write_aio",
    ) -> None:
        self.check_writable()
        self._unflushed = True
        await self._do(self._write, offsets, buffers)
        if flags & FUA:
            await self.flush()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self.check_writable()
        if flags & NO_FALLBACK:
            raise OSError(errno.ENOTSUP, "zeroes can only be written here", self.filename)
        self._unflushed = True
        await self._do(self._zero, offsets, lengths)
        if flags & FUA:
            await self.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self.check_writable()

    async def flush(self) -> None:
        self.check_open()
        if self._flush_error is not None:
            raise FlushFailed(self._flush_error)
        if self._unflushed:
            self._unflushed = False
            try:
                await self._do(self._flush)
            except OSError as error:
                self._flush_error = error
                raise

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return self.all_data(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self.check_writable()
        self._unflushed = True
        try:
            await self._do(self._truncate, size)
        finally:
            self.changed()

    async def close(self) -> None:
        if not self.closed:
            try:
                await self.flush()
            finally:
                self.closed = True


def is_file_object(thing: object) -> bool:
    """True for what has the methods of an open file."""
    return hasattr(thing, "read") and hasattr(thing, "seek")


async def open_file_object(driver: BaseDriver, options: dict[str, Any]) -> FileObjectNode:
    """Open by options: ``object``, a seekable file object of bytes, and ``label``, what messages
    call it."""
    file, label = options.get("object"), str(options.get("label") or "a file object")
    writable = not options.get("read-only")
    if not is_file_object(file):
        raise UsageError("The driver 'file-object' needs an open file, which only a program has")
    for method, wanted in (("seekable", True), ("readable", True), ("writable", writable)):
        answer = getattr(file, method, None)
        # The local files of fsspec say "r+b" and that they are not writable.
        if method == "writable" and "+" in str(getattr(file, "mode", "")):
            continue
        if wanted and answer is not None and not answer():
            raise OSError(errno.EACCES, f"the file is not {method}", label)
    if isinstance(file, io.TextIOBase):
        raise UsageError(f"'{label}' is a file of text: open it in binary mode")
    node = FileObjectNode(driver, file, label)
    await node.begin(writable)
    return node


DRIVER = Driver(
    "file-object",
    "protocol",
    options=(
        Option("object", "object", "an open file"),
        Option("label", "str", "what messages call it"),
    ),
    open=open_file_object,
    capabilities=frozenset({"resize"}),
)
