"""The one copy loop: everything that moves whole ranges between nodes goes through it."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import NamedTuple

from ..contract import MAY_UNMAP
from ..errors import DiskError, words
from .buffers import page_buffer, zero_runs
from .kernel import BaseDriver, Future, Task, wait_all
from .node import Node


class Segment(NamedTuple):
    """``length`` bytes from ``source_offset`` to ``target_offset``; ``zero``: they read as
    zeroes, so nothing is read."""

    source: Node
    source_offset: int
    target_offset: int
    length: int
    zero: bool = False


class CopyFailed(OSError, DiskError):
    """``side`` (``read`` or ``write``) failed for the part at ``offset`` of the target, because of
    ``cause``."""

    def __init__(self, side: str, offset: int, cause: OSError | DiskError) -> None:
        self.side, self.offset, self.cause = side, offset, cause
        number = cause.errno if isinstance(cause, OSError) else None
        doing = "reading" if side == "read" else "writing"
        text = f"error while {doing} at byte {offset}: {words(cause)}"
        OSError.__init__(self, number or errno.EIO, text)

    def __str__(self) -> str:
        return str(self.strerror)


class CopyOptions(NamedTuple):
    """How to copy.

    ``sparse``: look for zeroes in blocks of so many bytes (0: write everything that is read).
    ``target_zero``: the target reads as zeroes already, so zeroes are left out.
    ``in_order``: writes are issued in guest order (reads are not).
    ``rate``: bytes a second, 0 for no limit.  ``offload``: let the kernel copy between plain files.
    ``salvage``: a range that cannot be read becomes zeroes and is told to ``on_lost``.
    """

    sparse: int = 4096
    target_zero: bool = False
    in_order: bool = True
    workers: int = 8
    buffer: int = 1 << 20
    rate: int = 0
    flags: int = 0
    zero_flags: int = MAY_UNMAP
    offload: bool = False
    salvage: bool = False


class Copier:
    """One copy into ``target``.  ``on_progress`` is told the bytes just finished, and whether they
    were told to be zeroes (which takes no time)."""

    def __init__(
        self,
        driver: BaseDriver,
        target: Node,
        options: CopyOptions,
        on_progress: Callable[[int, bool], None] | None = None,
        on_lost: Callable[[int, int, OSError], None] | None = None,
    ) -> None:
        self.driver = driver
        self.target = target
        self.options = options
        self.on_progress = on_progress
        self.on_lost = on_lost
        self._free: list[memoryview] = []
        self._started = 0.0
        self._moved = 0

    async def run(self, segments: AsyncIterator[Segment]) -> None:
        """Copy all segments; raises the first error after everything issued has ended."""
        self._started = self.driver.now()
        running: list[Task[None]] = []
        before: Future[None] | None = None
        try:
            async for segment in segments:
                for part in self._parts(segment):
                    if len(running) >= self.options.workers:
                        await running.pop(0)
                    turn: Future[None] = Future()
                    running.append(
                        self.driver.spawn(self._one(part, before, turn), "copy", io=True)
                    )
                    before = turn if self.options.in_order else None
                    await self._throttle(part.length)
        finally:
            await wait_all(running)

    def _parts(self, segment: Segment) -> Iterator[Segment]:
        """Pieces of at most a buffer, cut at multiples of it so that they align in the target.

        Zeroes are not cut: a map takes them at any length.
        """
        size = 1 << 30 if segment.zero else self.options.buffer
        done = 0
        while done < segment.length:
            at = segment.target_offset + done
            length = min(size - at % size, segment.length - done)
            yield segment._replace(
                source_offset=segment.source_offset + done, target_offset=at, length=length
            )
            done += length

    async def _throttle(self, length: int) -> None:
        self._moved += length
        if self.options.rate:
            ahead = self._moved / self.options.rate - (self.driver.now() - self._started)
            if ahead > 0:
                await self.driver.sleep(ahead)

    async def _one(self, part: Segment, before: Future[None] | None, turn: Future[None]) -> None:
        """Copy one part; ``before`` is the turn of the part ahead of it, ``turn`` its own."""
        try:
            if part.zero:
                if before is not None:
                    await before
                await self._zero(part.target_offset, part.length)
            elif not (self.options.offload and await self._offloaded(part)):
                await self._through_buffer(part, before)
        finally:
            turn.set()
        if self.on_progress is not None:
            self.on_progress(part.length, part.zero)

    async def _offloaded(self, part: Segment) -> bool:
        """Copy in the kernel where both ends are plain data; False when they are not."""
        copy_range = getattr(self.target, "copy_range", None)
        if copy_range is None:
            return False
        done: int = await copy_range(
            part.source, part.source_offset, part.target_offset, part.length
        )
        return done == part.length

    async def _through_buffer(self, part: Segment, before: Future[None] | None) -> None:
        buffer = self._free.pop() if self._free else page_buffer(self.options.buffer)
        try:
            view = buffer[: part.length]
            try:
                await part.source.read([part.source_offset], [part.length], [view])
            except (OSError, DiskError) as error:
                if not self.options.salvage or not isinstance(error, OSError):
                    raise CopyFailed("read", part.target_offset, error) from error
                await self._salvage(part, view)
            if before is not None:
                await before
            offsets: list[int] = []
            data: list[memoryview] = []
            zero_offsets: list[int] = []
            zero_lengths: list[int] = []
            for start, end, zero in self._runs(view):
                if not zero:
                    offsets.append(part.target_offset + start)
                    data.append(view[start:end])
                elif not self.options.target_zero:
                    zero_offsets.append(part.target_offset + start)
                    zero_lengths.append(end - start)
            try:
                if zero_offsets:
                    await self.target.zero(zero_offsets, zero_lengths, self.options.zero_flags)
                if offsets:
                    await self.target.write(offsets, data, self.options.flags)
            except (OSError, DiskError) as error:
                raise CopyFailed("write", part.target_offset, error) from error
        finally:
            self._free.append(buffer)

    async def _salvage(self, part: Segment, view: memoryview) -> None:
        """Read what can be read, in sectors; the rest becomes zeroes and is reported."""
        step = 512
        for start in range(0, part.length, step):
            piece = view[start : start + step]
            try:
                await part.source.read([part.source_offset + start], [len(piece)], [piece])
            except OSError as failed:
                piece[:] = bytes(len(piece))
                if self.on_lost is not None:
                    self.on_lost(part.source_offset + start, len(piece), failed)

    def _runs(self, view: memoryview) -> Iterable[tuple[int, int, bool]]:
        """Runs of zero and other blocks: (start, end, zero)."""
        if not self.options.sparse:
            return [(0, len(view), False)]
        return zero_runs(view, self.options.sparse)

    async def _zero(self, offset: int, length: int) -> None:
        if not self.options.target_zero:
            try:
                await self.target.zero([offset], [length], self.options.zero_flags)
            except (OSError, DiskError) as error:
                raise CopyFailed("write", offset, error) from error


async def copy(
    driver: BaseDriver,
    target: Node,
    segments: AsyncIterator[Segment],
    options: CopyOptions | None = None,
    on_progress: Callable[[int, bool], None] | None = None,
    on_lost: Callable[[int, int, OSError], None] | None = None,
) -> None:
    """Copy ``segments`` into ``target``; see :class:`CopyOptions`."""
    await Copier(driver, target, options or CopyOptions(), on_progress, on_lost).run(segments)
