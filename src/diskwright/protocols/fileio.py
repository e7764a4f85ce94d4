"""Moving bytes to and from an open file or block device, and making them durable.

Reads that the page cache can answer, and small buffered writes while they are quick, run at once
on the thread that asks; everything else goes to the pool.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from itertools import islice, repeat
from operator import add, eq
from time import perf_counter

from ..contract import FUA
from ..engine.kernel import BaseDriver, Condition, Future, wait_all
from ..errors import FlushFailed
from ..hints import TYPE_CHECKING, Any, TypeVar
from ..units import align_up
from .base import Buffer, Leaf, clear
from .os_portable import Device, Portable, Writable
from .space import HoleMap, Space
from .transfer import Guard, fill, fill_all, put, put_all

if TYPE_CHECKING:
    from .bounce import Bounce
    from .lane import Lane
    from .outward import WriteOut

T = TypeVar("T")

_BESIDE = 64 << 10
"""Most bytes that are written on the asking thread while a copy fills the file: it has better
things to do there."""


class FileIO(Leaf):
    """Reads, writes and flushes of one descriptor."""

    inline_read = 4 << 20
    """Most bytes of a batch that is read on the asking thread."""
    inline_write = 1 << 20
    """Most bytes of a batch that is written on it."""

    def __init__(
        self, driver: BaseDriver, filename: str, table: Portable, fd: int, device: Device
    ) -> None:
        super().__init__(driver, "file" if device.kind == "file" else "host_device", filename)
        self.filename = filename
        self.table = table
        self.device = device
        self.size = device.size
        self.guard = Guard(table)
        self._fd = fd
        self._fast_read = table.fast_read
        self._fast_write = table.fast_write
        self._cached_only = table.cached_only
        self._bounce: Bounce | None = None  # set when the page cache is gone around
        self._write_through = self._no_flush = False
        self._space = Space(table, fd, device)
        self._holes = HoleMap()
        self._written = self._synced = 0  # generations of changes
        self._sync: Future[None] | None = None
        self._new = False  # its name is not known to be durable
        self._overshot = False  # aligned writes went beyond `size`
        self._write_out: WriteOut | None = None
        self._lane: Lane | None = None  # made for the first write in the pool
        self._filled = False  # by a copy
        self._flush_error: OSError | None = None
        self._jobs = 0
        self._idle = Condition()

    # -- the pool
    async def _job(self, function: Callable[..., T], *arguments: Any) -> T:
        self._jobs += 1
        try:
            return await self.driver.call(function, *arguments)
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._idle.notify()

    # -- reading
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        if self.closed:
            self.check_open()
        if self._bounce is not None:
            return await self._counted(self._bounce.read(offsets, lengths, into))
        views: Sequence[Writable] = list(map(bytearray, lengths)) if into is None else into
        total = sum(lengths)
        fast = self._fast_read
        if fast is None or total > self.inline_read:
            await self._job(fill_all, self.table, self._fd, list(zip(offsets, views, strict=True)))
            return views
        counts: list[int] = []
        try:
            if len(offsets) == 1:
                counts.append(fast(self._fd, views, offsets[0], self._cached_only))
            else:
                counts.extend(
                    map(fast, repeat(self._fd), zip(views), offsets, repeat(self._cached_only))
                )
        except BlockingIOError:
            pass  # the medium must be waited for
        except OSError as error:
            if error.errno != errno.ENOTSUP or not self._cached_only:
                raise
            # The file system cannot tell what is cached.
            if self.table.memory_backed(self._fd):
                self._cached_only = 0
            else:
                self._fast_read = None
            return await self.read(offsets, lengths, into, tag)
        if sum(counts) != total:
            await self._read_rest(offsets, views, counts)
        return views

    @staticmethod
    async def read_scattered(
        nodes: Sequence[Any],
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None,
    ) -> Sequence[Buffer] | None:
        """Read from several files at a time what the page cache has of them."""
        first = nodes[0]
        fast, flag = first._fast_read, first._cached_only
        for node in set(nodes):
            if not isinstance(node, FileIO) or node._bounce is not None:
                return None
            node.check_open()
            if node._fast_read is None or node._cached_only != flag:
                return None
        if fast is None or sum(lengths) > first.inline_read:
            return None
        views: Sequence[Writable] = list(map(bytearray, lengths)) if into is None else into
        counts: list[int] = []
        descriptors = [node._fd for node in nodes]
        try:
            counts.extend(map(fast, descriptors, zip(views), offsets, repeat(flag)))
        except OSError:
            pass  # the medium must be waited for, or it is told below
        if counts != lengths:
            counts += [-1] * (len(views) - len(counts))
            rest: dict[FileIO, tuple[list[int], list[int], list[memoryview]]] = {}
            for node, offset, view, count in zip(nodes, offsets, views, counts, strict=True):
                if count != len(view):
                    columns = rest.setdefault(node, ([], [], []))
                    columns[0].append(offset)
                    columns[1].append(len(view))
                    columns[2].append(memoryview(view))
            await wait_all(
                [first.driver.start(n.read(*columns), io=True) for n, columns in rest.items()]
            )
        return views

    async def _read_rest(
        self, offsets: Sequence[int], views: Sequence[Writable], counts: list[int]
    ) -> None:
        """What came short: the end of the file, or not cached."""
        counts += [0] * (len(views) - len(counts))
        short = [
            (offset + count, memoryview(view)[count:])
            for offset, view, count in zip(offsets, views, counts, strict=True)
            if count != len(view)
        ]
        table, fd = self.table, self._fd
        for _ in range(3):
            short = self._read_cached(short)
            if not short:
                return
            # The kernel brings all of them in at a time, while one job (one system call) waits
            # for the one that was asked for last.
            if len(short) > 1:
                for offset, view in short:
                    table.read_ahead(fd, offset, len(view))
            await self._job(fill, table, fd, *short.pop())
        if short := self._read_cached(short):
            await self._job(fill_all, table, fd, short)

    def _read_cached(self, requests: list[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
        """Read what is cached or beyond the end; what is left."""
        fast, fd, flag = self._fast_read, self._fd, self._cached_only
        assert fast is not None
        left = []
        for offset, view in requests:
            try:
                while len(view):
                    count = fast(fd, (view,), offset, flag)
                    if not count:
                        clear(view, 0, len(view))
                        break
                    offset += count
                    view = view[count:]
            except BlockingIOError:
                left.append((offset, view))
        return left

    async def _counted(self, work: Awaitable[T]) -> T:
        """Work that starts jobs of its own: close waits for it."""
        self._jobs += 1
        try:
            return await work
        finally:
            self._jobs -= 1
            if not self._jobs:
                self._idle.notify()

    # -- writing
    async def write(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        flags: int = 0,
        tag: str = "write_aio",
    ) -> None:
        if self.closed or self.read_only:
            self.check_writable()
        ends: list[int] | None = None
        if len(offsets) == 1:
            total = len(buffers[0])
            end = offsets[0] + total
        else:
            lengths = list(map(len, buffers))
            ends = list(map(add, offsets, lengths))
            total, end = sum(lengths), max(ends, default=0)
        if not total:
            return
        fast, fd, guard = self._fast_write, self._fd, self.guard
        try:
            if self._bounce is not None:
                await self._write_direct(self._bounce, offsets, buffers, end)
            elif (
                fast is None
                or total > (_BESIDE if self._filled else self.inline_write)
                or (began := perf_counter()) < guard.until
            ):
                await self._counted(self._put_behind(offsets, buffers))
            else:
                if guard.watching:
                    guard.look(began)
                if ends is None:
                    count = fast(fd, buffers[0], offsets[0])
                    if count != total:
                        put(self.table, fd, offsets[0], buffers[0], count)
                elif any(map(eq, ends, islice(offsets, 1, None))):
                    put_all(self.table, fd, offsets, buffers)
                else:
                    counts = list(map(fast, repeat(fd), buffers, offsets))
                    if sum(counts) != total:
                        for offset, buffer, count in zip(offsets, buffers, counts, strict=True):
                            put(self.table, fd, offset, buffer, count)
                ended = perf_counter()
                if ended - began > guard.patience:
                    guard.slow(ended, ended - began)
        except BaseException:
            self._changed_to(self._length())
            raise
        self._changed_to(end)
        if self._write_out is not None and self._write_out.add(offsets[0], end, total):
            self._begin_write_out(self._write_out)
        if flags & FUA or self._write_through:
            await self.flush()

    def _put_behind(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> Future[None]:
        """Write in the pool, into a file behind the writes before it."""
        lane = self._lane
        if lane is None and self.device.kind == "file":
            from .lane import Lane

            lane = self._lane = Lane(self.driver)
        call = self.driver.call if lane is None else lane.call
        return call(put_all, self.table, self._fd, offsets, buffers)

    def will_flush(self, soon: bool) -> None:
        self._filled = soon
        self._write_out = None
        if (
            soon
            and self.device.kind == "file"
            and not (self._no_flush or self._write_through or self._bounce is not None)
            and not self.table.memory_backed(self._fd)
        ):
            from .outward import WriteOut

            self._write_out = WriteOut()

    def _begin_write_out(self, out: WriteOut) -> None:
        """In the pool: it waits when the queue of the medium is full."""
        self._jobs += 1
        out.running = True
        call: Future[None] = self.driver.call(out.begin, self.table, self._fd, *out.take())

        def ended(_: Future[None]) -> None:
            out.running = False
            self._jobs -= 1
            if not self._jobs:
                self._idle.notify()

        call.callbacks.append(ended)

    def _changed_to(self, end: int) -> None:
        """Something was written, up to ``end``."""
        self._written += 1
        self._holes.forget()
        if end > self.highest:
            self.highest = end
        if end > self.size and self.device.kind == "file":
            self.size = end

    def _length(self) -> int:
        """The length of the file now (bytes)."""
        if self._fd < 0 or self._overshot:
            return self.size
        return self.table.device(self._fd).size

    async def _write_direct(
        self, bounce: Bounce, offsets: Sequence[int], buffers: Sequence[Buffer], end: int
    ) -> None:
        if self.device.kind == "file" and align_up(end, bounce.alignment) > max(end, self.size):
            self._overshot = True  # the last unit is written whole
        await self._counted(bounce.write(offsets, buffers))

    # -- durability
    async def flush(self) -> None:
        self.check_open()
        if self._overshot and not self._jobs:
            self._cut_back()
        await self._flush()

    def _cut_back(self) -> None:
        """Give the file its length back after writes of whole units at its end.  At once, and only
        while nothing is on its way: a write beyond could otherwise be cut off."""
        self.table.truncate(self._fd, self.size)
        self._overshot = False
        self._written += 1

    async def _flush(self) -> None:
        wanted = self._written
        while True:
            if self._flush_error is not None:
                raise FlushFailed(self._flush_error)
            if self._no_flush or self._synced >= wanted:
                return
            if self._sync is None:
                self._start_sync()
            assert self._sync is not None
            # Whoever came while it ran needs the next one: it may not cover what they wrote.
            await self._sync

    def _start_sync(self) -> None:
        covers = self._written
        self._jobs += 1
        call: Future[None] = self.driver.call(self._sync_file, self._fd, self._new)

        def ended(future: Future[None]) -> None:
            self._sync = None
            self._jobs -= 1
            if isinstance(future.error, OSError):
                self._flush_error = future.error
            elif future.error is None:
                self._synced = covers
                self._new = False
            if not self._jobs:
                self._idle.notify()

        call.callbacks.append(ended)
        self._sync = call

    def _sync_file(self, fd: int, new: bool) -> None:
        if not new:
            self.table.sync_data(fd)
            return
        self.table.sync(fd)
        self.table.sync_directory(os.path.dirname(os.path.realpath(self.filename)))
