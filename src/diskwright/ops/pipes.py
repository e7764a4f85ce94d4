"""Pipes as the ends of a conversion: raw disks come in, images go out in order."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from ..abilities import StreamWriter
from ..engine.buffers import page_buffer
from ..engine.copy import CopyFailed, CopyOptions, Segment, copy
from ..engine.held import CHUNK, Held
from ..engine.kernel import BaseDriver, Cancelled, wait_all
from ..engine.stream import stream
from ..errors import UsageError
from ..graph.opener import close_disk, open_disk
from ..protocols.pipe import Inlet, Outlet
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .images import ImageSpec
from .outputs import OnMoved, Output, Segments, Settings, ToImage, unseen
from .sources import SPARSE, Sources
from .streaming import limited


class Pipe(NamedTuple):
    """A descriptor in the place of the image that ``spec`` describes: ``fd`` is read to its end,
    or written in order.  ``size``: the bytes that come; None: as many as come."""

    fd: int
    spec: ImageSpec
    size: int | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.spec.name

    @property
    def format(self) -> str | None:
        """Of the image that goes through it."""
        return self.spec.format


class Spool:
    """A folder for what does not go through a pipe in order; ``on_spool`` is told of each file."""

    def __init__(self, on_spool: Callable[[str], None] | None) -> None:
        self.on_spool = on_spool
        self._folder: str | None = None

    def path(self, name: str) -> str:
        """The place of a file that is not there yet."""
        if self._folder is None:
            from tempfile import mkdtemp

            self._folder = mkdtemp(prefix="diskwright-")
        return os.path.join(self._folder, name)

    def tell(self, why: str, path: str) -> None:
        """A file is needed."""
        if self.on_spool is not None:
            self.on_spool(f"{why}: keeping it in '{path}' meanwhile")

    def close(self) -> None:
        """Remove everything."""
        if self._folder is not None:
            from shutil import rmtree

            rmtree(self._folder, ignore_errors=True)

    async def sources(
        self,
        driver: BaseDriver,
        sources: Sequence[ImageSpec | Pipe],
        targets: Sequence[ImageSpec | Pipe],
        settings: Settings,
    ) -> tuple[Sequence[ImageSpec | Pipe], FromPipe | None]:
        """What is to be read: a pipe as it comes, or images, of which one may have been a pipe."""
        pipe = next((spec for spec in sources if isinstance(spec, Pipe)), None)
        if pipe is None:
            return sources, None
        if len(sources) > 1:
            raise UsageError(f"{pipe.name} can only be the only source")
        raw = pipe.spec._replace(format="raw")
        if pipe.format == "raw":
            if settings.snapshot or settings.bitmaps or settings.overlay:
                raise UsageError(f"{pipe.name} is a raw disk: it has no snapshots, bitmaps, layers")
            if pipe.size is not None or all(_takes_any_length(t, settings) for t in targets):
                return (), FromPipe(driver, pipe)
            why = f"the length of {pipe.name} is not known (--size)"
        else:
            why = f"{pipe.format} cannot be read in order"
        path = self.path("source")
        self.tell(why, path)
        from .convert import convert

        file = ImageSpec(path, path, "raw", "unsafe")
        await convert(driver, [pipe._replace(spec=raw)], file, Settings())
        return [pipe.spec._replace(reference=path)], None


def _takes_any_length(target: ImageSpec | Pipe, settings: Settings) -> bool:
    """Whether the size need not be known before the target is made."""
    if isinstance(target, Pipe):
        return target.format == "raw"
    fixed = ("preallocation", "encrypt", "data_file")
    options = any(key.startswith(fixed) and value for key, value in settings.options.items())
    return not settings.create or (target.format in ("raw", "qcow2") and not options)


class FromPipe:
    """A raw disk that comes through a pipe, in the place of :class:`.sources.Sources`.

    ``length``: the bytes that have come.
    """

    def __init__(self, driver: BaseDriver, pipe: Pipe) -> None:
        self.driver, self.pipe = driver, pipe
        self.inlet = Inlet(driver, pipe.fd, pipe.name)
        self.length = 0

    @property
    def size(self) -> int | None:
        """Of the disk: whole sectors."""
        return None if self.pipe.size is None else align_up(self.pipe.size, SECTOR)

    async def data(self) -> int:
        """Bytes that will be read; 0 when nobody knows."""
        return self.pipe.size or 0

    async def segments(self) -> AsyncIterator[Segment]:
        """What comes.  Raises CopyFailed, and UsageError for too much or too little."""
        size, ended = self.pipe.size, False
        while not ended and self.length != size:
            want = CHUNK if size is None else min(CHUNK, size - self.length)
            view = page_buffer(want)
            count = await self._fill(view)
            ended = count < want
            if count:
                at, self.length = self.length, self.length + count
                yield Segment(Held(self.driver, view[:count]), 0, at, count)
        if size is None:
            return
        if self.length < size:
            raise UsageError(
                f"{self.pipe.name} ended after {self.length} bytes; {size} were to come"
            )
        if more := await self._fill(page_buffer(CHUNK)):
            raise UsageError(
                f"{self.pipe.name} has at least {size + more} bytes; {size} were to come"
            )

    async def _fill(self, view: memoryview) -> int:
        try:
            return await self.inlet.fill(view)
        except OSError as error:
            raise CopyFailed("read", self.length, error) from error

    def close(self) -> None:
        """Wait for nothing more."""
        self.inlet.close()


class ToPipe(Output):
    """A pipe.  ``writer`` makes the image; None: the raw disk of ``size`` bytes (None: as many as
    come, in whole sectors)."""

    def __init__(
        self,
        driver: BaseDriver,
        pipe: Pipe,
        size: int | None,
        writer: StreamWriter | None = None,
        rate: int = 0,
    ) -> None:
        self.driver, self.name = driver, pipe.name
        self.size, self.writer, self.rate = size, writer, rate
        self.outlet = Outlet(driver, pipe.fd, pipe.name)

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        """Send it; who is cancelled does not wait for the other end of the pipe."""
        task = self.driver.spawn(self._send(segments, moved), "to a pipe")
        try:
            await task
        except Cancelled:
            self.outlet.abort()
            task.cancel()
            with suppress(Exception, Cancelled):
                await wait_all([task])
            raise
        except CopyFailed as error:
            if error.side == "write":
                error.name = self.name
            raise

    async def _send(self, segments: Segments, moved: OnMoved) -> None:
        if self.writer is not None:
            segments = limited(self.driver, segments, self.rate)
            await stream(self.driver, self.outlet, self.writer, segments, moved)
            return
        options = CopyOptions(sparse=0, target_zero=True, rate=self.rate)
        end = 0

        async def watched() -> Segments:
            nonlocal end
            async for segment in segments:
                end = segment.target_offset + segment.length
                yield segment

        await copy(self.driver, self.outlet, watched(), options, moved)
        try:
            await self.outlet.pad(align_up(end, SECTOR) if self.size is None else self.size)
        except OSError as error:
            raise CopyFailed("write", self.outlet.size, error) from error

    async def finish(self) -> None:
        await self.outlet.close()

    async def discard(self) -> None:
        await self.outlet.close()


class Spooled(ToPipe):
    """A pipe for an image that cannot be made in order: it is made in a file first."""

    def __init__(self, driver: BaseDriver, pipe: Pipe, image: ToImage, path: str) -> None:
        super().__init__(driver, pipe, None)
        self.image, self.path = image, path

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        await self.image.take(segments, moved)

    async def finish(self) -> None:
        try:
            await self.image.finish()
            node = await open_disk(self.driver, {"driver": "file", "filename": self.path})
            try:
                self.size = node.size
                source = Sources([node], SPARSE, None, 0, False, None)
                await super().take(source.segments())
            finally:
                await close_disk(node)
        finally:
            await super().finish()

    async def discard(self) -> None:
        await self.image.discard()
        await super().discard()
