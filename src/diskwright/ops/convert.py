"""Copying disks into new or existing images of any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..engine.copy import CopyFailed
from ..engine.kernel import BaseDriver
from ..errors import DiskError, UsageError
from ..graph.creating import remove
from ..graph.node import Node
from ..graph.perms import CONSISTENT_READ, WRITE_UNCHANGED
from ..hints import TYPE_CHECKING
from ..units import SECTOR, align_up
from .images import ImageSpec, close_all
from .making import (
    Making,
    TargetFailed,
    backing_of,
    check_together,
    opened_with,
    typed_names,
)
from .outputs import BUFFER, Count, OnMoved, Output, Segments, Settings, ToImage, unseen
from .sources import SPARSE, Sources

if TYPE_CHECKING:
    from ..engine.held import Taker
    from .digest import Digests
    from .pipes import FromPipe, Pipe, Spool
    from .resume import Resumed, Resumption
    from .snapshots import Selector

ONE_SOURCE = (
    "Having a backing file for the target makes no sense when concatenating multiple input images"
)
# What others may do to a source meanwhile: a target in several files must not empty it either.
_UNCHANGED = frozenset({CONSISTENT_READ, WRITE_UNCHANGED})


class SnapshotFailed(DiskError):
    """The snapshot that was to be copied cannot be shown."""


async def convert(
    driver: BaseDriver,
    sources: Sequence[ImageSpec | Pipe],
    target: ImageSpec | Pipe,
    settings: Settings,
    *,
    also: Sequence[ImageSpec] = (),
    digests: Sequence[str] = (),
    on_sources: Callable[[], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_lost: Callable[[int, OSError], None] | None = None,
    on_unknown: Callable[[int, OSError], None] | None = None,
    on_one_pass: Callable[[], None] | None = None,
    on_skipped_bitmap: Callable[[str], None] | None = None,
    on_digests: Callable[[Digests], None] | None = None,
    on_spool: Callable[[str], None] | None = None,
    on_resumed: Callable[[Resumed], None] | None = None,
    estimate: bool = False,
) -> int:
    """Copy ``sources``, one behind the other, to ``target``; returns the bytes of data copied.

    ``target.format`` is the format to make or to open.  Unless the target's cache mode is
    ``unsafe``, file and directory are durable when this returns.  Raises OpenFailed, TargetFailed,
    CopyFailed, UsageError; a target that was not there before is taken back then.  ``on_sources``
    is called when the sources are open, ``on_one_pass`` when the target is one that is written in
    one pass: it is whole at the end or not there, also when this is cancelled.
    With ``estimate`` progress counts holes as well, for which nobody has to look through the
    source first.  ``on_resumed`` is told what of an earlier run is used again.
    While salvaging, ``on_lost`` is told each sector that could not be read, ``on_unknown`` each of
    which nobody could say what it is.

    ``also`` are further targets, made with the default options of their formats, ``digests`` the
    algorithms of which ``on_digests`` is told the result; the source is read once for all of them.
    A pipe can be the only source, or the target; ``on_spool`` is told of a file that is needed
    because something does not go through it in order.
    """
    settings = settings._replace(overlay=settings.overlay or bool(backing_of(settings)))
    nodes: list[Node] = []
    outputs: list[Output] = []
    making: Making | None = None
    spool: Spool | None = None
    pipe: FromPipe | None = None
    resumption: Resumption | None = None
    try:
        if not all(isinstance(spec, ImageSpec) for spec in (*sources, target)):
            from .pipes import Spool

            spool = Spool(on_spool)
            sources, pipe = await spool.sources(driver, sources, (target, *also), settings)
        for spec in sources:
            assert isinstance(spec, ImageSpec)
            nodes.append(await spec.open(driver, shared=_UNCHANGED))
        if settings.snapshot is not None:
            await _show(nodes, settings.snapshot)
        if on_sources is not None:
            on_sources()
        if settings.bitmaps:
            from .convert_bitmaps import check_source, check_target, copy_bitmaps

            check_source(nodes, settings.skip_broken_bitmaps)
            check_target(target.format or "qcow2")
        if settings.overlay and len(nodes) != 1:
            raise UsageError(ONE_SOURCE)
        if also or digests:
            check_together(settings, [target, *also])
        size = pipe.size if pipe is not None else sum(align_up(n.size, SECTOR) for n in nodes)
        making = Making(driver, nodes, size, on_lost, on_one_pass or _nothing, spool)
        making.on_progress, making.estimate = on_progress, estimate
        if settings.resume:
            from .resume import begin, only_target

            only = only_target(target, also, digests, pipe is not None)
            target = only._replace(gate=only.gate.allowing(*typed_names(settings)))
            resumption = making.resumption = await begin(
                driver, nodes, target, size or 0, settings, opened_with(target, settings),
                on_resumed, on_progress,
            )  # fmt: skip
            if resumption is None:
                return 0
        outputs.append(await making.output(target, settings))
        for other in also:
            plain = Settings(sparse=settings.sparse, workers=settings.workers)
            outputs.append(await making.output(other, plain))
        first = outputs[0]
        if settings.bitmaps:
            if not isinstance(first, ToImage):
                raise UsageError("Bitmaps can only be copied into an image that is made in place")
            check_target(first.node.driver_name, first.node)
        unknown = on_unknown if settings.salvage else None
        base, covered = first.below(nodes)
        source = pipe or Sources(nodes, settings.sparse, base, covered, first.offload, unknown)
        looked = (on_progress is not None and not estimate) or unknown is not None
        count = making.count
        if count is None:
            data = await source.data() if looked else 0
            count = Count(size or 0 if estimate else data, on_progress, estimate)
        already = 0
        if resumption is not None and isinstance(source, Sources):
            begun, already, _ = resumption.start
            count.begin(begun, already)
            segments = source.segments(begun)
        else:
            segments = source.segments()
        if settings.salvage and (also or digests or not isinstance(first, ToImage)):
            from .streaming import salvaged

            segments = salvaged(segments, on_lost)
        if digests:
            from .digest import Digesting

            digesting = Digesting(driver, digests, size)
            outputs.append(digesting)
        await _feed(driver, segments, outputs, count.moved)
        if settings.bitmaps and isinstance(first, ToImage):
            await copy_bitmaps(nodes[0], first.node, on_skipped_bitmap)
        while outputs:
            await outputs.pop(0).finish()
        if digests and on_digests is not None:
            on_digests(digesting.result()._replace(filename=target.name))
        return count.done - already
    except BaseException as error:
        for output in outputs:
            await output.discard()
        kept = resumption is not None and resumption.made
        if making is not None and isinstance(error, OSError | DiskError) and not kept:
            for path in making.new:
                remove(path)
            if resumption is not None:
                await resumption.journal.remove()
        raise
    finally:
        if resumption is not None:
            await resumption.journal.close()
        if pipe is not None:
            pipe.close()
        await close_all(nodes)
        if spool is not None:
            spool.close()


def _nothing() -> None:
    """Nobody wants to know."""


async def _show(nodes: list[Node], wanted: Selector) -> None:
    """Let the only source be a snapshot of itself."""
    from .snapshots import show

    if len(nodes) > 1:
        raise UsageError("No support for concatenating multiple snapshot")
    try:
        await show(nodes[0], wanted)
    except DiskError as error:
        raise SnapshotFailed(f"Failed to load snapshot: {error}") from error


async def _feed(
    driver: BaseDriver, segments: Segments, outputs: Sequence[Output], moved: OnMoved
) -> None:
    """Let all outputs take ``segments``; the first tells what was ``moved``.  Where there are
    several, errors name theirs."""
    if len(outputs) == 1:
        await outputs[0].take(segments, moved)
        return
    from ..engine.held import share

    def taker(output: Output) -> Taker:
        async def take(segments: Segments) -> None:
            try:
                await output.take(segments, moved if output is outputs[0] else unseen)
            except CopyFailed as error:
                if error.side == "write":
                    error.name = output.name
                raise

        return take

    await share(driver, segments, [taker(output) for output in outputs])


__all__ = ["BUFFER", "SPARSE", "CopyFailed", "Settings", "TargetFailed", "convert"]
