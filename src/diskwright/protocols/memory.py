"""Protocol ``memory``: a disk that lives as long as its node."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..extents import Extent
from ..hints import Any
from .base import Buffer, Leaf


class MemoryNode(Leaf):
    """Bytes in memory.  ``data`` is what it holds at first; it grows when written beyond its end,
    up to ``limit`` bytes (then ``ENOSPC``)."""

    def __init__(
        self, driver: BaseDriver, data: Buffer = b"", *, name: str = "", limit: int = 1 << 62
    ) -> None:
        super().__init__(driver, "memory", name)
        self.data = bytearray(data)
        self.size = len(self.data)
        self.limit = limit
        self.flushes = 0

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        self.check_open()
        data = self.data
        found: list[bytes] = []
        for offset, length in zip(offsets, lengths, strict=True):
            part = bytes(data[offset : offset + length])
            found.append(part if len(part) == length else part + bytes(length - len(part)))
        if into is None:
            return found
        for view, part in zip(into, found, strict=True):
            view[:] = part
        return into

    def _grow(self, end: int) -> None:
        if end > self.limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        if end > len(self.data):
            self.data.extend(bytes(end - len(self.data)))
            self.size = end

    def _writable(self) -> None:
        self.check_open()
        if self.read_only:
            raise OSError(errno.EACCES, "the node is read-only")

    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
        tag: str = "write_aio",
    ) -> None:
        self._writable()
        for offset, buffer in zip(offsets, buffers, strict=True):
            if buffer:
                self._grow(offset + len(buffer))
                self.data[offset : offset + len(buffer)] = buffer

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self._writable()
        for offset, length in zip(offsets, lengths, strict=True):
            if length:
                self._grow(offset + length)
                self.data[offset : offset + length] = bytes(length)

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._writable()
        for offset, length in zip(offsets, lengths, strict=True):
            length = min(length, self.size - offset)
            if length > 0:
                self.data[offset : offset + length] = bytes(length)

    async def flush(self) -> None:
        self.check_open()
        self.flushes += 1

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return self.all_data(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self._writable()
        if size > self.size:
            self._grow(size)
        else:
            del self.data[size:]
            self.size = size
        self.changed()

    async def close(self) -> None:
        self.closed = True


async def open_memory(driver: BaseDriver, options: dict[str, Any]) -> MemoryNode:
    """Open by options: ``size`` (bytes, 0 at first)."""
    node = MemoryNode(driver, bytes(int(options.get("size") or 0)))
    node.read_only = bool(options.get("read-only"))
    node.options = dict(options)
    return node


DRIVER = Driver(
    "memory",
    "protocol",
    options=(Option("size", "size", "length in bytes at the start", 0),),
    open=open_memory,
    create=open_memory,
    capabilities=frozenset({"resize"}),
)
