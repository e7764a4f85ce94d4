"""Writing an image in one pass: source map in, ordered bytes out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable

from ..abilities import Codec, StreamWriter
from ..errors import DiskError
from ..records import NamedTuple
from ..units import align_down
from .copy import CopyFailed, Segment
from .kernel import BaseDriver, Task, wait_all
from .node import Node

# What one job of the pool packs.  Smaller is not worth the way there and back; of larger ones
# fewer would run side by side in the same memory.
JOB = 1 << 20
_IN_FLIGHT = 6

Packed = list[tuple[int, bytes]]


class _Job(NamedTuple):
    """Units from guest offset ``start``; ``parts`` fill some of their bytes, the rest is zero."""

    start: int
    parts: list[Segment]


class Streamer:
    """One image on its way into ``target``, which is empty."""

    def __init__(
        self,
        driver: BaseDriver,
        target: Node,
        writer: StreamWriter,
        on_progress: Callable[[int, bool], None] | None = None,
    ) -> None:
        self.driver = driver
        self.target = target
        self.writer = writer
        self.on_progress = on_progress
        self.length = 0
        """Bytes written so far."""
        self._span = max(align_down(JOB, writer.unit), writer.unit)
        self._free: list[bytearray] = []

    async def run(self, segments: AsyncIterator[Segment]) -> int:
        """Write the whole image; returns its length in bytes.  Raises CopyFailed after everything
        that was begun has ended."""
        running: list[Task[Packed]] = []
        done = 0
        try:
            await self._append(self.writer.head(), 0)
            async for job in self._jobs(segments):
                if len(running) >= _IN_FLIGHT:
                    done = await self._finish(running.pop(0), done)
                running.append(self.driver.spawn(self._pack(job), "stream", io=True))
            while running:
                done = await self._finish(running.pop(0), done)
            await self._append(self.writer.end(), done)
        finally:
            await wait_all(running)
        return self.length

    async def _jobs(self, segments: AsyncIterator[Segment]) -> AsyncIterator[_Job]:
        """The data of ``segments`` (in guest order), cut at multiples of a job."""
        span = self._span
        start = -1
        parts: list[Segment] = []
        async for segment in segments:
            if segment.zero:
                self._tell(segment.length, True)
                continue
            at, end = segment.target_offset, segment.target_offset + segment.length
            while at < end:
                first = align_down(at, span)
                if first != start:
                    if parts:
                        yield _Job(start, parts)
                    start, parts = first, []
                length = min(first + span, end) - at
                skip = at - segment.target_offset
                parts.append(
                    segment._replace(
                        source_offset=segment.source_offset + skip,
                        target_offset=at,
                        length=length,
                    )
                )
                at += length
        if parts:
            yield _Job(start, parts)

    async def _pack(self, job: _Job) -> Packed:
        """Read a job's bytes and compress its units, in the pool."""
        unit = self.writer.unit
        buffer = self._free.pop() if self._free else bytearray(self._span)
        try:
            view = memoryview(buffer)
            filled = 0
            touched: dict[int, None] = {}
            for part in job.parts:
                at = part.target_offset - job.start
                end = at + part.length
                view[filled:at] = bytes(at - filled)
                filled = end
                touched.update(dict.fromkeys(range(at // unit, -(-end // unit))))
                try:
                    await part.source.read([part.source_offset], [part.length], [view[at:end]])
                except (OSError, DiskError) as error:
                    raise CopyFailed("read", part.target_offset, error) from error
            view[filled:] = bytes(len(view) - filled)
            packed = await self.driver.call(
                _pack_units, self.writer.codec, buffer, unit, list(touched)
            )
            first = job.start // unit
            for part in job.parts:
                self._tell(part.length, False)
            return [(first + index, data) for index, data in packed]
        finally:
            self._free.append(buffer)

    async def _finish(self, task: Task[Packed], done: int) -> int:
        """Append what a job has packed; returns how far into the disk that is."""
        pieces: list[bytes] = []
        for index, packed in await task:
            done = index * self.writer.unit
            pieces += self.writer.put(index, packed)
        await self._append(pieces, done)
        return done

    async def _append(self, pieces: Iterable[bytes], guest: int) -> None:
        """Write ``pieces`` at the end of what is there; ``guest`` is where the disk is then."""
        held: list[bytes] = []
        size = 0
        for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= JOB:
                await self._write(b"".join(held), guest)
                held, size = [], 0
        if size:
            await self._write(b"".join(held), guest)

    async def _write(self, data: bytes, guest: int) -> None:
        offset, self.length = self.length, self.length + len(data)
        try:
            await self.target.write([offset], [data])
        except (OSError, DiskError) as error:
            raise CopyFailed("write", guest, error) from error

    def _tell(self, length: int, zero: bool) -> None:
        if self.on_progress is not None:
            self.on_progress(length, zero)


def _pack_units(codec: Codec, buffer: bytearray, unit: int, indexes: list[int]) -> Packed:
    """The packed units of a buffer, those of zeroes left out.  Runs in the pool."""
    zeroes, view = bytes(unit), memoryview(buffer)
    return [
        (index, codec.pack(view[index * unit : (index + 1) * unit]))
        for index in indexes
        if not buffer.startswith(zeroes, index * unit)
    ]


async def stream(
    driver: BaseDriver,
    target: Node,
    writer: StreamWriter,
    segments: AsyncIterator[Segment],
    on_progress: Callable[[int, bool], None] | None = None,
) -> int:
    """Write the disk that ``segments`` describe (in guest order) into the empty ``target``; returns
    the image's length in bytes.  Units that read as zeroes are left out; the last one may end
    behind the disk, filled up with zeroes.  Nothing is written twice or out of order."""
    return await Streamer(driver, target, writer, on_progress).run(segments)
