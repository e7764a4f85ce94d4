"""An image through a pipe whose tables stand before its data: the source is read twice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..abilities import Survey
from ..engine.stream import stream
from ..errors import DiskError, ImageError, NotSupported
from ..graph import registry
from ..graph.create import prepare
from ..graph.graph import walk
from ..graph.node import Node
from ..protocols.filenode import FileNode
from .outputs import Count, OnMoved, Segments, Settings, unseen
from .pipes import Pipe, ToPipe
from .sources import Sources

if TYPE_CHECKING:
    from .making import Making

_Times = list[tuple[int, int, int]]


class InOrder(ToPipe):
    """A pipe for an image that must know before its first byte what it will hold."""

    def __init__(self, making: Making, pipe: Pipe, rate: int) -> None:
        super().__init__(making.driver, pipe, making.size, None, rate)
        self.making = making
        self.times = _times(making.nodes)

    async def look(self, survey: Survey, sparse: int) -> bool:
        """Show the source to ``survey``; False where it cannot keep so much in mind."""
        making = self.making
        source = Sources(making.nodes, sparse, None, 0, False)
        total = 0
        if making.on_progress is not None:
            total = making.size or 0 if making.estimate else await source.data()
        count = Count(2 * total, making.on_progress, making.estimate)
        try:
            # Nothing comes out of it that could be sent.
            await stream(self.driver, self.outlet, survey, source.segments(), count.moved)
        except NotSupported:
            return False
        self.writer, count.done, making.count = survey.writer(), 0, count
        return True

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        await super().take(segments, moved)
        if _times(self.making.nodes) != self.times:
            raise ImageError("The source was changed while it was read")


async def in_order(making: Making, pipe: Pipe, settings: Settings) -> InOrder | None:
    """The image, after a first look at the source; None where that does not suffice.

    Raises CopyFailed, and TargetFailed for options that are wrong."""
    from .making import TargetFailed, check_compression

    if settings.overlay or settings.salvage or settings.bitmaps or not settings.sparse:
        return None
    fmt = pipe.format or ""
    found = registry.driver(fmt)
    assert found.survey is not None
    if settings.compress:
        check_compression(fmt)
    options = {name: value for name, value in settings.options.items() if name != "size"}
    try:
        _, given, _ = await prepare(making.driver, f"disk.{fmt}", fmt, making.size, options)
        survey = found.survey(given, settings.compress)
    except (OSError, DiskError) as error:
        raise TargetFailed(pipe.name, fmt, error) from error
    if survey is None:
        return None
    out = InOrder(making, pipe, settings.rate)
    try:
        if await out.look(survey, settings.sparse):
            return out
    except BaseException:
        await out.discard()
        raise
    await out.discard()
    return None


def _times(nodes: list[Node]) -> _Times:
    """Length and last change of each file of the disks (a device tells none)."""
    files = {node for top in nodes for node in walk(top) if isinstance(node, FileNode)}
    facts = [os.fstat(file.fileno()) for file in files if file.device.kind == "file"]
    return sorted((found.st_ino, found.st_size, found.st_mtime_ns) for found in facts)
