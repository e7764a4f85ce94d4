"""Filter ``compress``: what is written to it goes compressed into the format below."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence

from ..contract import COMPRESSED, FUA
from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..errors import NodeClosed, UsageError
from ..extents import Extent, Opaque
from ..graph.node import Buffer, Node
from ..hints import Any
from ..protocols.bounce import Bounce
from ..units import align_down, align_up

SLOT = "file"


class CompressNode(Node):
    """One child in the slot ``file``, an image whose format stores single units compressed.

    Units are written as wholes: what a request does not cover of its first and last one is read
    before.  A format that has such data does not change them in place, so a unit that is stored
    already is written as it is.
    """

    def __init__(self, driver: BaseDriver, child: Node, unit: int) -> None:
        super().__init__(driver, "compress")
        self.closed = False
        self._bounce = Bounce(unit, self._read_units, self._write_units, end=lambda: self.size)
        self.attach(SLOT, child)

    @property
    def whole_unit(self) -> int:
        """Who copies into it should write whole units of so many bytes, each once."""
        return self._bounce.alignment

    @property
    def below(self) -> Node:
        """The child."""
        return self.children[SLOT].child

    @property
    def size(self) -> int:
        return self.below.size if SLOT in self.children else 0

    @size.setter
    def size(self, value: int) -> None:
        """Ignored at construction; it is the child's."""

    def child_changed(self, slot: str) -> None:
        child = self.child(SLOT)
        if child is not None:
            self.limits = child.limits
            self.read_only = self.read_only or child.read_only
        self.changed()

    def _check_open(self, write: bool) -> None:
        if self.closed:
            raise NodeClosed(f"node '{self.name}' is closed")
        if write and self.read_only:
            raise PermissionError(errno.EPERM, "Operation not permitted: the node is read-only")

    # -- requests
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        self._check_open(False)
        return await self.below.read(offsets, lengths, into)

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        self._check_open(True)
        for offset, buffer in zip(offsets, buffers, strict=True):
            self._check_bounds(offset, len(buffer))
        await self._bounce.write(offsets, buffers)
        if flags & FUA:
            await self.below.flush()

    def _check_bounds(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise OSError(errno.EIO, "Input/output error: beyond the end of the disk")

    async def _read_units(
        self, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[Buffer]:
        """Units, of which the last one of the disk may be filled up with zeroes."""
        size = self.size
        within = [max(0, min(n, size - o)) for o, n in zip(offsets, lengths, strict=True)]
        parts = await self.below.read(offsets, within)
        return [
            part if len(part) == n else bytes(part).ljust(n, b"\0")
            for part, n in zip(parts, lengths, strict=True)
        ]

    async def _write_units(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        try:
            await self.below.write(offsets, buffers, COMPRESSED)
            return
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        # Some unit is stored already; nothing of the batch was written.
        unit = self.whole_unit
        for offset, buffer in zip(offsets, buffers, strict=True):
            view = memoryview(buffer).cast("B")
            for at in range(0, len(view), unit):
                await self._write_unit(offset + at, view[at : at + unit])

    async def _write_unit(self, offset: int, data: memoryview) -> None:
        try:
            await self.below.write([offset], [data], COMPRESSED)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            await self.below.write([offset], [data])

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self._check_open(True)
        for offset, length in zip(offsets, lengths, strict=True):
            self._check_bounds(offset, length)
            await self._zero_one(offset, offset + length, flags)

    async def _zero_one(self, start: int, end: int, flags: int) -> None:
        """Whole units are zeroed below; ragged ends are written as data."""
        unit = self.whole_unit
        first = align_up(start, unit)
        last = end if end == self.size else align_down(end, unit)
        if first >= last:
            await self._bounce.write([start], [bytes(end - start)])
        else:
            if start < first:
                await self._bounce.write([start], [bytes(first - start)])
            lease = await self._bounce.lock([first], [align_up(last, unit) - first])
            try:
                await self.below.zero([first], [last - first], flags & ~FUA)
            finally:
                self._bounce.leases.drop(lease)
            if last < end:
                await self._bounce.write([last], [bytes(end - last)])
        if flags & FUA:
            await self.below.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._check_open(True)
        lease = await self._bounce.lock(offsets, lengths)
        try:
            await self.below.discard(offsets, lengths)
        finally:
            self._bounce.leases.drop(lease)

    async def flush(self) -> None:
        self._check_open(False)
        await self.below.flush()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self._check_open(False)
        return [Opaque(SLOT, offset, length)] if length else []

    async def reads_zero(self, offset: int, length: int) -> bool:
        return await self.below.reads_zero(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self._check_open(True)
        await self.below.truncate(size, preallocation)
        self.changed()

    async def close(self) -> None:
        self.closed = True


async def open_compress(
    driver: BaseDriver,
    options: dict[str, Any],
    open_child: Callable[[Any], Awaitable[Node]],
) -> CompressNode:
    """Open by options; ``file`` describes the image below.

    Raises UsageError where that one's format cannot store single units compressed.
    """
    if options.get("file") is None:
        raise UsageError('A block device must be specified for "file"')
    child = await open_child(options["file"])
    format: Any = getattr(child, "format", None)
    if not hasattr(format, "pack_codec"):
        raise UsageError(
            f"Compression is not supported for underlying format: {child.driver_name}"
        )
    return CompressNode(driver, child, format.unit)


DRIVER = Driver(
    "compress",
    "filter",
    options=(Option("file", "str", "the image below"),),
    open=open_compress,
)
