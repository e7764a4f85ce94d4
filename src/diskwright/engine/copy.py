"""The one copy loop: everything that moves whole ranges between nodes goes through it."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from itertools import groupby

from ..contract import MAY_UNMAP
from ..errors import CorruptImage, DiskError, words
from ..records import NamedTuple
from .buffers import joined, page_buffer, zero_runs
from .kernel import BaseDriver, Cancelled, Future, wait_all
from .node import Node

_MOST_PARTS = 512  # of a batch: bounds the requests that one read or write has
_WRITES = 2  # on their way at a time when begun in order: one that runs and one behind it
# Most bytes of the first batches, and how many are of one size before they become twice as large:
# to fill new memory takes longer than to write it, and the writes must not run out meanwhile.
_FIRST = 256 << 10
_ALIKE = 3


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
    ``cause``.  ``name``: which target, where there are several."""

    name = ""

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
    ``in_order``: writes are begun in guest order (reads are not).  ``workers``: batches on their
    way, ``buffer``: most bytes of each.
    ``units``: what is written are whole units of so many bytes, of which many may be on their way
    (0: anything may be written); ``buffer`` is a multiple of it, the segments are rounded to it.
    ``rate``: bytes a second, 0 for no limit.  ``offload``: let the kernel copy between plain files.
    ``salvage``: a range that cannot be read becomes zeroes and is told to ``on_lost``.
    ``damaged``: so does one that cannot be decoded, in units of so many bytes of the source.
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
    damaged: int = 0
    units: int = 0


class Batch:
    """Segments that are read, searched for zeroes and written together."""

    __slots__ = ("buffer", "end", "held", "length", "parts", "written")

    def __init__(self) -> None:
        self.parts: list[Segment] = []
        self.length = 0
        """Bytes that are not told to be zeroes; in the buffer they follow each other."""
        self.held: list[tuple[Segment, memoryview | None]] = []
        """The parts with what was read of them."""
        self.buffer: memoryview | None = None
        self.end = 0
        """Where it ends in the target."""
        self.written = False

    def add(self, part: Segment) -> None:
        """Take ``part``; one that continues the last one becomes a part of it."""
        last = self.parts[-1] if self.parts else None
        self.end = part.target_offset + part.length
        if not part.zero:
            self.length += part.length
        if (
            last is not None
            and last.source is part.source
            and last.zero is part.zero
            and last.source_offset + last.length == part.source_offset
            and last.target_offset + last.length == part.target_offset
        ):
            self.parts[-1] = last._replace(length=last.length + part.length)
        else:
            self.parts.append(part)


class Copier:
    """One copy into ``target``.  ``on_progress`` is told the bytes just finished, and whether they
    were told to be zeroes (which takes no time); ``on_covered`` (of segments in order) the offset
    in the target before which everything has been written, and how many of these bytes were
    data."""

    def __init__(
        self,
        driver: BaseDriver,
        target: Node,
        options: CopyOptions,
        on_progress: Callable[[int, bool], None] | None = None,
        on_lost: Callable[[int, int, OSError | CorruptImage], None] | None = None,
        on_covered: Callable[[int, int], None] | None = None,
    ) -> None:
        self.driver = driver
        self.target = target
        self.options = options
        self.on_progress = on_progress
        self.on_lost = on_lost
        self.on_covered = on_covered
        self._open: deque[Batch] = deque()
        """Batches that are not written, or behind one that is not."""
        self._covered = 0
        self._free: list[memoryview] = []
        self._reading: deque[tuple[Batch, Future[None]]] = deque()
        self._writing: deque[Future[None]] = deque()
        self._turn: Future[None] = Future()
        """Set when the last write of the batch before has begun."""
        self._turn.set()
        self._started = 0.0
        self._moved = 0
        self._room = options.buffer if options.units else min(options.buffer, _FIRST)
        """Most bytes of the next batch: small ones first, so that the target has work soon."""

    async def run(self, segments: AsyncIterator[Segment]) -> None:
        """Copy all segments; raises the first error after everything issued has ended."""
        self._started = self.driver.now()
        self.target.will_flush(True)
        try:
            async for batch in self._batches(segments):
                await self._begin(batch)
            while self._reading:
                await self._pass_on()
            while self._writing:
                await self._writing.popleft()
        except BaseException:
            issued = [future for _, future in self._reading] + list(self._writing)
            with suppress(Exception, Cancelled):
                await wait_all(issued)
            raise
        finally:
            self.target.will_flush(False)

    # -- batches
    async def _batches(self, segments: AsyncIterator[Segment]) -> AsyncIterator[Batch]:
        """The segments in order, gathered until a buffer is full."""
        batch, begun = Batch(), 0
        async for segment in segments:
            for part in self._parts(segment):
                if len(batch.parts) >= _MOST_PARTS or (
                    not part.zero and batch.length + part.length > self._room
                ):
                    yield batch
                    batch = Batch()
                    begun += 1
                    if not begun % _ALIKE:
                        self._room = min(2 * self._room, self.options.buffer)
                batch.add(part)
        if batch.parts:
            yield batch

    def _parts(self, segment: Segment) -> Iterator[Segment]:
        """Pieces of at most a batch, cut at multiples of it so that they align in the target.

        Zeroes are not cut: a map takes them at any length.
        """
        done = 0
        while done < segment.length:
            size = 1 << 30 if segment.zero else self._room
            at = segment.target_offset + done
            length = min(size - at % size, segment.length - done)
            yield segment._replace(
                source_offset=segment.source_offset + done, target_offset=at, length=length
            )
            done += length

    async def _begin(self, batch: Batch) -> None:
        """Begin to read a batch, and to write those before it that have been read.

        With a cached source the next batch is read, searched and planned here while the pool
        writes the one before; with a slow one all that the workers allow are on their way.
        """
        while len(self._reading) + len(self._writing) >= self.options.workers:
            if self._reading and (not self._writing or self._reading[0][1].done):
                await self._pass_on()
            else:
                await self._writing.popleft()
        if self.on_covered is not None:
            self._open.append(batch)
        if self.options.in_order:
            self._reading.append(
                (batch, self.driver.start(self._read(batch), name="copy read", io=True))
            )
            while self._reading and self._reading[0][1].done:
                await self._pass_on()
        else:
            self._writing.append(self.driver.start(self._both(batch), name="copy", io=True))
        await self._throttle(batch)

    async def _pass_on(self) -> None:
        """Begin to write the first batch that was read."""
        batch, reading = self._reading.popleft()
        await reading
        most = self.options.workers if self.options.units else _WRITES
        while len(self._writing) >= most or (self._writing and self._writing[0].done):
            await self._writing.popleft()
        await self._turn
        self._turn = Future()
        work = self._write(batch, self._turn)
        self._writing.append(self.driver.start(work, name="copy write", io=True))

    async def _throttle(self, batch: Batch) -> None:
        self._moved += sum(part.length for part in batch.parts)
        if self.options.rate:
            ahead = self._moved / self.options.rate - (self.driver.now() - self._started)
            if ahead > 0:
                await self.driver.sleep(ahead)

    async def _both(self, batch: Batch) -> None:
        await self._read(batch)
        await self._write(batch, Future())

    # -- reading
    async def _read(self, batch: Batch) -> None:
        """Fill the buffer; what the kernel shall copy is not read."""
        parts = batch.parts
        if self.options.offload:
            parts = batch.parts = [p for p in parts if p.zero or not await self._offloaded(p)]
        reads: list[tuple[Segment, memoryview]] = []
        at = 0
        for part in parts:
            if part.zero:
                batch.held.append((part, None))
                continue
            if batch.buffer is None:
                batch.buffer = self._free.pop() if self._free else page_buffer(self.options.buffer)
            view = batch.buffer[at : at + part.length]
            at += part.length
            batch.held.append((part, view))
            reads.append((part, view))
        for source, group in groupby(reads, lambda read: read[0].source):
            await self._read_from(source, list(group))

    async def _read_from(self, source: Node, held: list[tuple[Segment, memoryview]]) -> None:
        try:
            await source.read(
                [part.source_offset for part, _ in held],
                [part.length for part, _ in held],
                [view for _, view in held],
            )
        except (OSError, DiskError) as error:
            if len(held) > 1:  # which one was it?
                for one in held:
                    await self._read_from(source, [one])
                return
            part, view = held[0]
            if self.options.damaged and isinstance(error, (OSError, CorruptImage)):
                await self._piecewise(part, view)
                return
            if not self.options.salvage or not isinstance(error, OSError):
                raise CopyFailed("read", part.target_offset, error) from error
            await self._salvage(part, view)

    async def _piecewise(self, part: Segment, view: memoryview) -> None:
        """By allocation units: one that cannot be decoded is lost as a whole, and no smaller part
        of it could be read."""
        unit = max(self.options.damaged, 512)
        start = 0
        while start < part.length:
            size = min(unit - (part.source_offset + start) % unit, part.length - start)
            offset, piece = part.source_offset + start, view[start : start + size]
            try:
                await part.source.read([offset], [size], [piece])
            except OSError:
                await self._salvage(part._replace(source_offset=offset, length=size), piece)
            except CorruptImage as failed:
                piece[:] = bytes(size)
                if self.on_lost is not None:
                    self.on_lost(offset, size, failed)
            start += size

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

    async def _offloaded(self, part: Segment) -> bool:
        """Copy in the kernel where both ends are plain data; False when they are not."""
        copy_range = getattr(self.target, "copy_range", None)
        if copy_range is None:
            return False
        done: int = await copy_range(
            part.source, part.source_offset, part.target_offset, part.length
        )
        if done < part.length:
            return False
        if self.on_progress is not None:
            self.on_progress(part.length, False)
        return True

    # -- writing
    async def _write(self, batch: Batch, turn: Future[None]) -> None:
        """Write what was read, in order, and give the buffer back."""
        where = 0
        try:
            groups = [
                (zero, tuple(zip(*runs, strict=True)))
                for zero, runs in groupby(self._runs(batch), lambda run: run[2] is None)
            ]
            for index, (zero, (offsets, lengths, data)) in enumerate(groups, 1):
                where = offsets[0]
                if index == len(groups):
                    turn.set()  # who waits for it runs when this one has been issued
                if zero:
                    await self.target.zero(offsets, lengths, self.options.zero_flags)
                else:
                    await self.target.write(offsets, data, self.options.flags)
        except (OSError, DiskError) as error:
            raise CopyFailed("write", where, error) from error
        finally:
            turn.set()
            if batch.buffer is not None:
                self._free.append(batch.buffer)
        if self.on_progress is not None:
            for part in batch.parts:
                self.on_progress(part.length, part.zero)
        if self.on_covered is not None:
            batch.written = True
            self._cover(self.on_covered)

    def _cover(self, on_covered: Callable[[int, int], None]) -> None:
        end = -1
        while self._open and self._open[0].written:
            batch = self._open.popleft()
            end = batch.end
            self._covered += batch.length
        if end >= 0:
            on_covered(end, self._covered)

    def _runs(self, batch: Batch) -> Iterator[tuple[int, int, memoryview | None]]:
        """What the target has to be told, in order: (offset, length, bytes or None for zeroes)."""
        sparse, leave_out = self.options.sparse, self.options.target_zero
        held = [(part.target_offset, part.length, view) for part, view in batch.held]
        for at, length, view in joined(held, batch.buffer) if self.options.units else held:
            if view is None:
                if not leave_out:
                    yield at, length, None
                continue
            for start, end, zero in zero_runs(view, sparse) if sparse else [(0, len(view), False)]:
                if not zero:
                    yield at + start, end - start, view[start:end]
                elif not leave_out:
                    yield at + start, end - start, None


async def copy(
    driver: BaseDriver,
    target: Node,
    segments: AsyncIterator[Segment],
    options: CopyOptions | None = None,
    on_progress: Callable[[int, bool], None] | None = None,
    on_lost: Callable[[int, int, OSError | CorruptImage], None] | None = None,
    on_covered: Callable[[int, int], None] | None = None,
) -> None:
    """Copy ``segments`` into ``target``; see :class:`CopyOptions` and :class:`Copier`."""
    options = options or CopyOptions()
    await Copier(driver, target, options, on_progress, on_lost, on_covered).run(segments)
