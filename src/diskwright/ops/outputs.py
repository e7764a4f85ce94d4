"""Where a conversion goes: images, a pipe, digests.  Each takes the segments of a disk in order."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ..contract import COMPRESSED
from ..engine.copy import CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..graph.graph import chain, leaf_of, primary
from ..graph.node import Node
from ..graph.opener import close_disk, discard_disk
from ..hints import TYPE_CHECKING, Any
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .sources import SPARSE

if TYPE_CHECKING:
    from .resume import Resumption
    from .snapshots import Selector

BUFFER = 4 << 20
_PACKED = 1 << 20
"""Bytes that are compressed in one go."""
_STEP = 64 << 20
"""An image grows by multiples of so many bytes while the end of what comes is not known."""
_ENDLESS = 1 << 63

Segments = AsyncIterator[Segment]
OnMoved = Callable[[int, bool], None]
OnLost = Callable[[int, OSError], None]


class Settings(NamedTuple):
    """How to convert.

    ``options``: creation options of the target.  ``create``: make the target (otherwise it exists
    and is written into).  ``overlay``: the target has a backing file (as it also has when the
    options name one), so what the source's own top layer does not hold is left out.  ``sparse``:
    look for zeroes in blocks of so many bytes (0: allocate everything).  ``target_is_zero``: the
    caller vouches for it.  ``offload``: let the host copy between plain files.  ``rate``: bytes a
    second, 0 for no limit.  ``compress``: only into a format that can hold compressed data
    (whether it does, its options say).  ``snapshot``: copy this internal snapshot of the only
    source.  ``resume``: keep a journal beside the target, or go on by the one that is there;
    ``verify``: compare digests of the source then, not only when it was changed.
    """

    options: Mapping[str, Any] = {}
    create: bool = True
    overlay: bool = False
    sparse: int = SPARSE
    target_is_zero: bool = False
    in_order: bool = True
    workers: int = 8
    rate: int = 0
    offload: bool = False
    salvage: bool = False
    compress: bool = False
    snapshot: Selector | None = None
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    resume: bool = False
    verify: bool = False


def unseen(length: int, zero: bool) -> None:
    """What is called where nobody wants to know what was moved."""


class Count:
    """The bytes of data that were copied (``done``), and how far that is of ``total`` (0: nobody
    knows, or wants to), in which ``holes`` are counted or not."""

    def __init__(
        self, total: int, on_progress: Callable[[int, int], None] | None, holes: bool
    ) -> None:
        self.total, self.on_progress, self.holes = total, on_progress, holes
        self.done = self.passed = 0

    def begin(self, passed: int, done: int) -> None:
        """An earlier run has come so far, and copied so much."""
        self.done, self.passed = done, passed if self.holes else done

    def moved(self, length: int, zero: bool) -> None:
        """So many bytes were copied, or told to be zeroes."""
        if not zero:
            self.done += length
        if self.on_progress is not None and (self.holes or not zero):
            self.passed += length
            passed = min(self.passed, self.total) if self.total else self.passed
            self.on_progress(passed, self.total)


class Output:
    """Base of all.  ``name`` is what messages call it."""

    name = ""
    offload = False
    """Wants to be told the files that hold the data."""

    def below(self, nodes: Sequence[Node]) -> tuple[Node | None, int]:
        """The layer of the source from which nothing need be copied, and for how many bytes."""
        return None, 0

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        """Take all of a disk."""
        raise NotImplementedError

    async def finish(self) -> None:
        """Everything was taken, by all outputs: end.  Nothing is open afterwards, also when this
        fails."""

    async def discard(self) -> None:
        """Something failed: give up what is open."""


class ToImage(Output):
    """An open image.  ``zero``: it reads as zeroes already.  ``grows``: how much will come is not
    known."""

    def __init__(
        self,
        driver: BaseDriver,
        name: str,
        node: Node,
        settings: Settings,
        zero: bool,
        durable: bool,
        grows: bool,
        on_lost: OnLost | None,
    ) -> None:
        self.driver, self.name, self.node, self.settings = driver, name, node, settings
        self.zero, self.durable, self.grows = zero, durable, grows
        self.on_lost = on_lost
        self.target = node
        if settings.offload and not settings.compress:
            self.target = _plain_file(node) or node
        self.offload = self.target is not node
        self.cut: int | None = None
        """The size that the image gets at the end."""
        self.journal: Resumption | None = None

    def below(self, nodes: Sequence[Node]) -> tuple[Node | None, int]:
        """What the image's backing file stands for."""
        if not self.settings.overlay:
            return None, 0
        below = self.node.child("backing")
        return _base_of(nodes, below), below.size if below is not None else 0

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        driver, node, settings = self.driver, self.node, self.settings
        options = CopyOptions(
            sparse=settings.sparse,
            target_zero=self.zero and settings.sparse > 0,
            in_order=settings.in_order,
            workers=settings.workers,
            buffer=BUFFER,
            rate=settings.rate,
            offload=self.offload,
            salvage=settings.salvage,
        )
        if self.grows:
            segments = self._with_room(segments)
        format: Any = getattr(node, "format", None)
        if settings.compress and hasattr(format, "pack_codec"):
            unit = format.unit
            options = options._replace(flags=COMPRESSED)
        else:
            unit = getattr(node, "whole_unit", 0)
        if unit:
            from ..engine.align import whole_units

            end = _ENDLESS if self.grows else node.size
            segments = whole_units(driver, segments, unit, end)
            options = options._replace(
                sparse=unit if settings.sparse else 0, buffer=max(_PACKED, unit), units=unit
            )
        told = self.on_lost
        lost = None if told is None else (lambda offset, _, error: told(offset, error))
        covered = None
        if self.journal is not None:
            if self.zero or settings.compress:
                await self.journal.clear(node, settings)
            covered = partial(self.journal.reached, node)
        await copy(driver, self.target, segments, options, moved, lost, covered)
        if self.journal is not None:
            await self.journal.ended()

    async def _with_room(self, segments: Segments) -> Segments:
        """``segments``; the image grows where they go on behind its end."""
        end, node = 0, self.node
        async for segment in segments:
            end = segment.target_offset + segment.length
            if end > align_up(node.size, SECTOR):
                if not self.settings.create:
                    raise UsageError("output file is smaller than input file")
                await node.truncate(align_up(max(end, node.size * 5 // 4), _STEP))
                self.cut = end
            yield segment
        if self.cut is not None:
            self.cut = align_up(end, SECTOR)

    async def finish(self) -> None:
        try:
            if self.cut is not None:
                await self.node.truncate(self.cut)
            if self.durable:
                await self.node.flush()
        except BaseException:
            await self.discard()
            raise
        await close_disk(self.node)
        if self.journal is not None:
            await self.journal.journal.remove()

    async def discard(self) -> None:
        if self.journal is not None:
            await self.journal.stop(self.node)
        await discard_disk(self.node)


def _plain_file(out: Node) -> Node | None:
    """The file whose bytes are those of ``out``."""
    format = getattr(out, "format", None)
    shift: int = getattr(format, "offset", 0)
    if out.driver_name != "raw" or shift:
        return None
    below = primary(out)
    return below if below is not None and below.driver_name == "file" else None


def _base_of(nodes: Sequence[Node], below: Node | None) -> Node | None:
    """The layer of the source that the target's backing file ``below`` stands for: the same file
    if it is in the source's chain, otherwise what is directly below the source."""
    (top,) = nodes
    layers = list(chain(top))[1:]
    for layer in layers:
        if below is not None and _same_file(layer, below):
            return layer
    return layers[0] if layers else None


def _same_file(one: Node, other: Node) -> bool:
    a, b = leaf_of(one).options.get("filename"), leaf_of(other).options.get("filename")
    with suppress(OSError):
        return a is not None and b is not None and os.path.samefile(a, b)
    return False
