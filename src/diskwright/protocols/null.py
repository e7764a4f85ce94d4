"""Protocols ``null-co`` and ``null-aio``: a disk that keeps nothing, to measure everything else."""

from __future__ import annotations

from collections.abc import Sequence

from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..errors import NotSupported
from ..extents import Extent, Zero
from ..hints import Any
from ..units import GIB
from .base import Buffer, Leaf, clear


class NullNode(Leaf):
    """``size`` bytes (1 GiB).  Each batch takes ``latency_ns``.  With ``read_zeroes`` reads give
    zeroes and the disk is one hole; otherwise ``into`` is left as it was."""

    def __init__(
        self,
        driver: BaseDriver,
        size: int = GIB,
        latency_ns: int = 0,
        read_zeroes: bool = False,
        *,
        driver_name: str = "null-co",
        name: str = "",
    ) -> None:
        super().__init__(driver, driver_name, name)
        self.size = size
        self.latency_ns = latency_ns
        self.read_zeroes = read_zeroes

    async def _wait(self) -> None:
        self.check_open()
        if self.latency_ns:
            await self.driver.sleep(self.latency_ns / 1e9)

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        await self._wait()
        if into is None:
            return list(map(bytes, lengths))
        if self.read_zeroes:
            for view in into:
                clear(view, 0, len(view))
        return into

    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
        tag: str = "write_aio",
    ) -> None:
        await self._wait()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        await self._wait()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        await self._wait()

    async def flush(self) -> None:
        await self._wait()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        if self.read_zeroes:
            self.check_open()
            return [Zero(length, explicit=False)]
        return self.all_data(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self.check_open()
        if size != self.size:
            raise NotSupported("Image format driver does not support resize")

    async def close(self) -> None:
        self.closed = True


async def open_null(driver: BaseDriver, options: dict[str, Any]) -> NullNode:
    """Open by options: ``size``, ``latency-ns``, ``read-zeroes``."""
    node = NullNode(
        driver,
        int(options.get("size", GIB)),
        int(options.get("latency-ns", 0)),
        options.get("read-zeroes", False) in (True, "on"),
        driver_name=str(options.get("driver", "null-co")),
    )
    node.read_only = bool(options.get("read-only"))
    node.options = dict(options)
    return node


_OPTIONS = (
    Option("size", "size", "size of the null block", GIB),
    Option("latency-ns", "int", "nanoseconds that each request takes", 0),
    Option("read-zeroes", "bool", "read as zeroes and report a hole", False),
)

DRIVER = Driver("null-co", "protocol", options=_OPTIONS, open=open_null)
DRIVER_AIO = Driver("null-aio", "protocol", options=_OPTIONS, open=open_null)
