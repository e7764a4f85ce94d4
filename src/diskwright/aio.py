"""The asyncio API: the same disks on a running event loop.

>>> from diskwright import aio
>>> async with aio.open("disk.qcow2", writable=True) as disk:
...     await disk.write_at(0, b"hello")
...     await disk.flush()

Requests of several asyncio tasks run at the same time.  A disk belongs to the loop on which it was
opened.  A cancelled request is waited for until its I/O has ended.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Generator, Mapping
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .api import OpenDisk
from .contract import FUA, MAY_UNMAP
from .engine.aio_driver import AsyncioDriver
from .engine.kernel import BaseDriver
from .errors import UsageError
from .graph.node import Buffer, Node
from .graph.opener import close_disk, discard_disk, open_disk
from .ops.calls import OPERATIONS, operation
from .ops.gates import Policy, Source, gate_of, kept, reference_of

P = ParamSpec("P")
T = TypeVar("T")


def open(
    source: Source,
    *,
    writable: bool = False,
    format: str | None = None,
    policy: str | Policy | None = None,
    options: Mapping[str, Any] | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    discard: str = "unmap",
    detect_zeroes: str = "off",
    secrets: Mapping[str, bytes | str] | None = None,
) -> _Opening:
    """Open a disk: ``disk = await open(...)``, or ``async with open(...) as disk``.

    Takes what :func:`diskwright.open` takes, and raises the same.
    """
    named = {
        "format": format,
        "writable": writable,
        "options": options,
        "cache": cache,
        "force_share": force_share,
        "gate": gate_of(policy),
        "backing": backing,
        "discard": discard,
        "detect_zeroes": detect_zeroes,
        "secrets": kept(secrets),
    }
    return _Opening(source, named)


def awaitable(
    call: Callable[Concatenate[BaseDriver, P], Coroutine[Any, Any, T]],
) -> Callable[P, Coroutine[Any, Any, T]]:
    """An operation of the engine as a coroutine function of asyncio."""

    @functools.wraps(call)
    async def awaited(*arguments: P.args, **named: P.kwargs) -> T:
        return await run(lambda driver: call(driver, *arguments, **named))

    awaited.__wrapped__ = MethodType(call, awaited)
    return awaited


if TYPE_CHECKING:
    from .ops.bitmap_list import AsyncBitmaps
    from .ops.calls import looking, making, mending
    from .ops.map import Extent
    from .ops.rawfile import RawDisk
    from .ops.snapshot_list import AsyncSnapshots

    info = awaitable(looking.info)
    info_chain = awaitable(looking.info_chain)
    check = awaitable(mending.check)
    plan_repair = awaitable(mending.plan_repair)
    undo = awaitable(mending.undo)
    salvage = awaitable(mending.salvage)
    convert = awaitable(making.convert)
    compare = awaitable(looking.compare)
    commit = awaitable(making.commit)
    rebase = awaitable(making.rebase)
    amend = awaitable(making.amend)
    digest = awaitable(looking.digest)
    inspect = awaitable(looking.inspect)
    create = awaitable(making.create)
    overlay = awaitable(making.overlay)
    measure = awaitable(looking.measure)
    map = awaitable(looking.map)
    picture = awaitable(looking.picture)


def __getattr__(name: str) -> Any:
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = awaitable(operation(name))
    return found


async def run(make: Callable[[AsyncioDriver], Coroutine[Any, Any, T]]) -> T:
    """Run one operation of the engine on the running loop."""
    driver = AsyncioDriver()
    try:
        return await driver.bridge(driver.in_time(make(driver)))
    finally:
        driver.stop_pool()


class _Opening:
    """An :func:`open` that can be awaited, or entered."""

    def __init__(self, source: Source, named: dict[str, Any]) -> None:
        self._source, self._named = source, named
        self._disk: Disk | None = None

    async def _open(self) -> Disk:
        driver = AsyncioDriver()
        opened: list[Node] = []

        async def work() -> None:
            opened.append(await open_disk(driver, reference_of(self._source), **self._named))

        try:
            await driver.bridge(work())
        except BaseException:
            for node in opened:  # cancelled when it was open already
                await driver.bridge(discard_disk(node))
            driver.stop_pool()
            raise
        return Disk(opened[0], driver)

    def __await__(self) -> Generator[Any, None, Disk]:
        return self._open().__await__()

    async def __aenter__(self) -> Disk:
        self._disk = await self._open()
        return self._disk

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._disk is not None:
            await self._disk.close()


class Disk(OpenDisk):
    """An open disk on an asyncio loop; see :class:`diskwright.api.Disk` for each method."""

    def __init__(self, node: Node, driver: AsyncioDriver) -> None:
        super().__init__(node)
        self._driver = driver

    @property
    def node(self) -> Node:
        """The top of the graph; raises NodeClosed after close and in a forked process, UsageError
        on another loop."""
        node = super().node
        if asyncio.get_running_loop() is not self._driver.loop:
            raise UsageError("the disk belongs to another event loop")
        return node

    async def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of a range inside the disk."""
        node = self._inside(offset, length)
        if not length:
            return b""
        return bytes((await self._driver.bridge(node.read([offset], [length])))[0])

    async def readinto_at(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` with the bytes from ``offset``; returns how many that are."""
        view = memoryview(buffer).cast("B")
        node = self._inside(offset, len(view))
        if len(view):
            await self._driver.bridge(node.read([offset], [len(view)], [view]))
        return len(view)

    async def write_at(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write; ``fua``: durable when it returns."""
        view = memoryview(data).cast("B")
        node = self._inside(offset, len(view))
        if len(view):
            await self._driver.bridge(node.write([offset], [view], FUA if fua else 0))

    async def zero(
        self, offset: int, length: int, *, unmap: bool = False, fua: bool = False
    ) -> None:
        """Make a range read as zeroes."""
        node = self._inside(offset, length)
        flags = (MAY_UNMAP if unmap else 0) | (FUA if fua else 0)
        if length:
            await self._driver.bridge(node.zero([offset], [length], flags))

    async def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more; advisory."""
        node = self._inside(offset, length)
        if length:
            await self._driver.bridge(node.discard([offset], [length]))

    async def flush(self) -> None:
        """All writes that have returned are durable when it returns."""
        await self._driver.bridge(self.node.flush())

    async def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the virtual size (bytes)."""
        node = self.node
        if size < node.size and not shrink:
            raise UsageError("The new size is smaller: shrink=True allows it")
        await self._driver.bridge(node.truncate(size, preallocation))

    async def extents(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """What the ranges of the disk are, through its whole chain."""
        from .ops.map import extents

        return await self._driver.bridge(extents(self.node, offset, length))

    def raw(self) -> RawDisk:
        """The disk's bytes as an unbuffered file for code that runs in *other* threads
        (``asyncio.to_thread``): each request waits for this loop."""
        from .ops.rawfile import RawDisk

        self.node  # noqa: B018 - raises when it is closed
        return RawDisk(_FromThreads(self, self._driver.loop))

    @property
    def snapshots(self) -> AsyncSnapshots:
        """The internal snapshots of the image."""
        from .ops.snapshot_list import AsyncSnapshots

        return AsyncSnapshots(lambda: self.node, self._driver.bridge)

    @property
    def bitmaps(self) -> AsyncBitmaps:
        """The dirty bitmaps of the disk."""
        from .ops.bitmap_list import AsyncBitmaps

        return AsyncBitmaps(lambda: self.node, self._driver.bridge)

    async def close(self) -> None:
        """Write everything back, flush and close; a second call does nothing.  A cancellation
        waits for the end; a second one does not, and what was not flushed is lost."""
        if self.closed:
            return
        node, self._node = self.node, None
        try:
            await self._driver.bridge(close_disk(node), patient=True)
        finally:
            self._driver.stop_pool()

    async def __aenter__(self) -> Disk:
        self.node  # noqa: B018 - raises when it is closed
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class _FromThreads:
    """A disk of a loop, for the threads beside it."""

    def __init__(self, disk: Disk, loop: asyncio.AbstractEventLoop) -> None:
        self._disk, self._loop = disk, loop
        self.name, self.writable = disk.name, disk.writable

    @property
    def closed(self) -> bool:
        return self._disk.closed

    @property
    def size(self) -> int:
        size: int = OpenDisk.node.__get__(self._disk).size  # asked in no loop
        return size

    def readinto_at(self, offset: int, buffer: memoryview) -> int:
        return self._wait(self._disk.readinto_at, offset, buffer)

    def write_at(self, offset: int, data: memoryview) -> None:
        self._wait(self._disk.write_at, offset, data)

    def flush(self) -> None:
        self._wait(self._disk.flush)

    def _wait(self, call: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **k: P.kwargs) -> T:
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            raise UsageError("in the thread of its loop this file would wait for ever: use another")
        return asyncio.run_coroutine_threadsafe(call(*args, **k), self._loop).result()
