"""A target that is written in one pass: a new plain file, taken back when it does not get whole."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress

from ..abilities import StreamWriter
from ..engine.copy import Segment
from ..engine.kernel import BaseDriver
from ..engine.node import Buffer, Node
from ..engine.stream import stream
from ..errors import DiskError, UsageError
from ..graph import registry
from ..graph.closing import close_disk, discard_disk
from ..graph.create import create_file, prepare
from ..graph.gate import Gate
from ..graph.graph import Graph
from ..graph.names import Options, parse
from ..hints import Any
from ..records import NamedTuple
from ..units import SECTOR
from .outputs import OnMoved, Output, Segments, unseen

STEP = 1 << 20
"""Bytes between two looks at the clock where the rate is limited."""


class Pass(NamedTuple):
    """An image that is to be written in one pass; ``beside`` are options of the protocol."""

    writer: StreamWriter
    where: Options
    beside: Options


async def one_pass(
    driver: BaseDriver,
    filename: str,
    fmt: str,
    size: int,
    options: Mapping[str, Any],
    gate: Gate,
    cache: str,
) -> Pass | None:
    """How the image that ``options`` describe is written in one pass; None where it is not.

    Nothing is opened or written.  Raises UsageError for options that contradict each other, or a
    place where one pass does not make an image.
    """
    found = registry.driver(fmt)
    if found.stream is None:
        return None
    found, given, beside = await prepare(
        driver, filename, fmt, size, options, gate=gate, check_backing=False
    )
    assert found.stream is not None
    own = {name: value for name, value in given.items() if not name.startswith("backing_")}
    writer = found.stream({**own, "size": size, "file-name": filename})
    if writer is None:
        return None
    if given.get("backing_file"):
        raise UsageError("An image that is written in one pass cannot have a backing file")
    where, plain = parse(filename)
    if not plain or where["driver"] not in ("file", "memory"):
        # Its end is found by the end of the file, which a device does not have there.
        raise UsageError("An image that is written in one pass is made in a plain file")
    if where["driver"] == "file":
        beside = {**beside, "cache": cache}
    return Pass(writer, where, beside)


async def write_pass(
    driver: BaseDriver,
    plan: Pass,
    segments: AsyncIterator[Segment],
    on_made: Callable[[], None],
    on_progress: Callable[[int, bool], None] | None,
    durable: bool,
) -> None:
    """Make the file and write it; ``on_made`` is called in between.

    When it fails or is cancelled, a file that was made here is removed and one that was there
    before is left empty: nothing that looks like an image stays.  ``durable``: file and directory
    are on disk when it returns.
    """
    file, made = await create_file(Graph(driver), plan.where, plan.beside)
    try:
        on_made()
        await stream(driver, file, plan.writer, segments, on_progress)
        if durable:
            await file.flush()
    except BaseException:
        with suppress(OSError, DiskError):
            await file.truncate(0)
        await discard_disk(file)
        if made is not None:
            with suppress(OSError):
                os.unlink(made)
        raise
    await close_disk(file)


class InOnePass(Output):
    """A file that is written in one pass, whole or not at all."""

    def __init__(
        self,
        driver: BaseDriver,
        name: str,
        plan: Pass,
        rate: int,
        durable: bool,
        on_new: Callable[[str], None],
        on_made: Callable[[], None],
    ) -> None:
        self.driver, self.name, self.plan = driver, name, plan
        self.rate, self.durable = rate, durable
        self.on_new, self.on_made = on_new, on_made

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        path = str(self.plan.where.get("filename", ""))
        fresh = bool(path) and not os.path.lexists(path)
        segments = limited(self.driver, segments, self.rate)
        await write_pass(self.driver, self.plan, segments, self.on_made, moved, self.durable)
        if fresh:
            self.on_new(path)


async def limited(
    driver: BaseDriver, segments: AsyncIterator[Segment], rate: int
) -> AsyncIterator[Segment]:
    """``segments``, handed out at no more than ``rate`` bytes a second (0: no limit)."""
    started, passed = driver.now(), 0
    async for segment in segments:
        if not rate or segment.zero:
            yield segment
            continue
        for done in range(0, segment.length, STEP):
            length = min(STEP, segment.length - done)
            yield segment._replace(
                source_offset=segment.source_offset + done,
                target_offset=segment.target_offset + done,
                length=length,
            )
            passed += length
            ahead = passed / rate - (driver.now() - started)
            if ahead > 0:
                await driver.sleep(ahead)


async def salvaged(
    segments: AsyncIterator[Segment], on_lost: Callable[[int, OSError], None] | None
) -> AsyncIterator[Segment]:
    """``segments``, read as far as they can be (see :class:`Salvaged`)."""
    sources: dict[Node, Node] = {}
    async for segment in segments:
        source = sources.setdefault(segment.source, Salvaged(segment.source, on_lost))
        yield segment._replace(source=source)


class Salvaged(Node):
    """A source of which every sector that cannot be read is zero, and told to ``on_lost``."""

    def __init__(self, source: Node, on_lost: Callable[[int, OSError], None] | None) -> None:
        super().__init__(source.driver, source.driver_name)
        self.source, self.on_lost = source, on_lost

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        views = into or [memoryview(bytearray(length)) for length in lengths]
        for offset, view in zip(offsets, views, strict=True):
            try:
                await self.source.read([offset], [len(view)], [view])
            except OSError:
                await self._sectors(offset, view)
        return views

    async def _sectors(self, offset: int, view: memoryview) -> None:
        for start in range(0, len(view), SECTOR):
            part = view[start : start + SECTOR]
            try:
                await self.source.read([offset + start], [len(part)], [part])
            except OSError as error:
                part[:] = bytes(len(part))
                if self.on_lost is not None:
                    self.on_lost(offset + start, error)
