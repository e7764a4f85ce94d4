"""Copying disks into a new or existing image of any format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..contract import COMPRESSED
from ..engine.align import whole_units
from ..engine.copy import CopyFailed, CopyOptions, copy
from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageInUse, UsageError
from ..graph import registry
from ..graph.creating import remove
from ..graph.graph import chain, leaf_of, primary
from ..graph.node import Node
from ..graph.opener import close_disk, discard_disk
from ..graph.perms import CONSISTENT_READ, WRITE_UNCHANGED
from ..units import SECTOR, align_up
from .create import create
from .fresh import fresh_is_zero
from .images import ImageSpec, OpenFailed, close_all
from .itself import refuse_itself
from .sources import SPARSE, Sources
from .streaming import Pass, limited, one_pass, salvaged, write_pass

if TYPE_CHECKING:
    from .snapshots import Selector

BUFFER = 4 << 20
_PACKED = 1 << 20
"""Bytes that are compressed in one go."""
ONE_SOURCE = (
    "Having a backing file for the target makes no sense when concatenating multiple input images"
)
# What others may do to a source meanwhile: a target in several files must not empty it either.
_UNCHANGED = frozenset({CONSISTENT_READ, WRITE_UNCHANGED})


class TargetFailed(DiskError):
    """The target could not be made; ``cause`` says why."""

    def __init__(self, name: str, fmt: str, cause: OSError | DiskError) -> None:
        self.name, self.fmt, self.cause = name, fmt, cause
        super().__init__(f"{name}: error while converting {fmt}: {cause}")


class SnapshotFailed(DiskError):
    """The snapshot that was to be copied cannot be shown."""


class Settings(NamedTuple):
    """How to convert.

    ``options``: creation options of the target.  ``create``: make the target (otherwise it exists
    and is written into).  ``overlay``: the target has a backing file (as it also has when the
    options name one), so what the source's own top layer does not hold is left out.  ``sparse``:
    look for zeroes in blocks of so many bytes (0: allocate everything).  ``target_is_zero``: the
    caller vouches for it.  ``offload``: let the host copy between plain files.  ``rate``: bytes a
    second, 0 for no limit.  ``compress``: only into a format that can hold compressed data
    (whether it does, its options say).  ``snapshot``: copy this internal snapshot of the only
    source.
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


async def convert(
    driver: BaseDriver,
    sources: Sequence[ImageSpec],
    target: ImageSpec,
    settings: Settings,
    *,
    on_sources: Callable[[], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_lost: Callable[[int, OSError], None] | None = None,
    on_unknown: Callable[[int, OSError], None] | None = None,
    on_one_pass: Callable[[], None] | None = None,
    on_skipped_bitmap: Callable[[str], None] | None = None,
) -> int:
    """Copy ``sources``, one behind the other, to ``target``; returns the bytes of data copied.

    ``target.format`` is the format to make or to open.  Unless the target's cache mode is
    ``unsafe``, file and directory are durable when this returns.  Raises OpenFailed, TargetFailed,
    CopyFailed, UsageError; a target that was not there before is taken back then.  ``on_sources``
    is called when the sources are open, ``on_one_pass`` when the target is one that is written in
    one pass: it is whole at the end or not there, also when this is cancelled.
    While salvaging, ``on_lost`` is told each sector that could not be read, ``on_unknown`` each of
    which nobody could say what it is.
    """
    nodes: list[Node] = []
    new: list[str] = []
    try:
        for spec in sources:
            nodes.append(await spec.open(driver, shared=_UNCHANGED))
        if settings.snapshot is not None:
            await _show(nodes, settings.snapshot)
        if on_sources is not None:
            on_sources()
        if settings.bitmaps:
            from .convert_bitmaps import check_source, check_target, copy_bitmaps

            check_source(nodes, settings.skip_broken_bitmaps)
            check_target(target.format or "qcow2")
        total = sum(align_up(node.size, SECTOR) for node in nodes)
        tell = _Told(on_progress, on_lost, on_unknown)
        below = _below(settings)
        if below or settings.overlay:
            settings = settings._replace(overlay=True)
            if len(nodes) > 1:
                raise UsageError(ONE_SOURCE)
        if settings.create:
            plan, others = await _make(driver, nodes, target, total, settings, new.append)
            # What the caller named, and what was just made, needs nobody's leave to be opened.
            target = target._replace(gate=target.gate.allowing(*others, *below))
            if plan is not None:
                durable = target.cache != "unsafe"
                made = on_one_pass or (lambda: None)
                return await _one_pass(driver, nodes, plan, settings, tell, made, durable)
        elif isinstance(target.reference, str):
            try:
                refuse_itself(nodes, target.reference, target.name)
            except ImageInUse as error:
                raise OpenFailed(target.name, error) from error
        # A target that was just made encrypted is opened by the secret that it was made with.
        keys = {k: v for k, v in settings.options.items() if k.endswith("key-secret")}
        given = {**keys, **_level(target, settings)} if settings.create else {}
        out = await target.open(driver, writable=True, options=given or None)
        try:
            if not settings.create and out.size < total:
                raise UsageError("output file is smaller than input file")
            if settings.compress:
                _check_units(out)
            if settings.bitmaps:
                check_target(out.driver_name, out)
            done = await _copy(driver, nodes, out, settings, tell)
            if settings.bitmaps:
                await copy_bitmaps(nodes[0], out, on_skipped_bitmap)
            if target.cache != "unsafe":
                await out.flush()
        except BaseException:
            await discard_disk(out)
            raise
        await close_disk(out)
        return done
    except (OSError, DiskError):
        for path in new:
            remove(path)
        raise
    finally:
        await close_all(nodes)


def _below(settings: Settings) -> tuple[str, ...]:
    """The backing file that the options of a new target name."""
    named = [settings.options.get(name) for name in ("backing_file", "parent")]
    return tuple(str(name) for name in named if name) if settings.create else ()


def _level(target: ImageSpec, settings: Settings) -> dict[str, Any]:
    """The level of compression that was asked for, as an option of opening: no image records it."""
    level = settings.options.get("compression_level")
    if level is None or target.format is None:
        return {}
    names = {option.name for option in registry.driver(target.format).options}
    return {"compression-level": level} if "compression-level" in names else {}


class _Told(NamedTuple):
    """Whom to tell what."""

    on_progress: Callable[[int, int], None] | None
    on_lost: Callable[[int, OSError], None] | None
    on_unknown: Callable[[int, OSError], None] | None


async def _make(
    driver: BaseDriver,
    nodes: list[Node],
    target: ImageSpec,
    total: int,
    settings: Settings,
    on_new: Callable[[str], None],
) -> tuple[Pass | None, tuple[str, ...]]:
    """Make the target; one that is written in one pass is only planned.  Also returns the names of
    further files that were made."""
    assert target.format is not None and isinstance(target.reference, str)
    name, fmt = target.reference, target.format
    options = {key: value for key, value in settings.options.items() if key != "size"}
    if settings.compress:
        _check_compression(fmt)
        if any(key.startswith("encrypt") and value for key, value in options.items()):
            raise UsageError("Compression and encryption not supported at the same time")
    try:
        refuse_itself(nodes, name, name)
        plan = await one_pass(driver, name, fmt, total, options, target.gate, target.cache)
        if plan is not None:
            return plan, ()
        return None, await create(
            driver,
            name,
            fmt,
            total,
            options,
            gate=target.gate,
            look_at_backing=False,
            on_new=on_new,
            secrets=target.secrets,
        )
    except (OSError, DiskError) as error:
        raise TargetFailed(target.name, fmt, error) from error


def _check_compression(fmt: str) -> None:
    """Raise unless compressed data may be asked of the format."""
    found = registry.driver(fmt)
    if found.stream is None and "compress" not in found.capabilities:
        raise UsageError("Compression not supported for this file format")


def _check_units(out: Node) -> None:
    """Raise for a target whose format could hold compressed data, but not this image."""
    _check_compression(out.driver_name)
    if not getattr(getattr(out, "format", None), "cluster_size", 0):
        raise UsageError("invalid cluster size")


async def _show(nodes: list[Node], wanted: Selector) -> None:
    """Let the only source be a snapshot of itself."""
    from .snapshots import show

    if len(nodes) > 1:
        raise UsageError("No support for concatenating multiple snapshot")
    try:
        await show(nodes[0], wanted)
    except DiskError as error:
        raise SnapshotFailed(f"Failed to load snapshot: {error}") from error


async def _copy(
    driver: BaseDriver, nodes: list[Node], out: Node, settings: Settings, tell: _Told
) -> int:
    zero = settings.target_is_zero or (
        settings.create and not settings.overlay and await fresh_is_zero(out, settings.options)
    )
    target = out
    if settings.offload and not settings.compress:
        target = _plain_file(out) or out
    base, covered = None, 0
    if settings.overlay:
        below = out.child("backing")
        base, covered = _base_of(nodes, below), below.size if below is not None else 0
    unknown = tell.on_unknown if settings.salvage else None
    source = Sources(nodes, settings.sparse, base, covered, target is not out, unknown)
    count = await _Count.of(source, tell)
    segments = source.segments()
    options = CopyOptions(
        sparse=settings.sparse,
        target_zero=zero and settings.sparse > 0,
        in_order=settings.in_order,
        workers=settings.workers,
        buffer=BUFFER,
        rate=settings.rate,
        offload=target is not out,
        salvage=settings.salvage,
    )
    format: Any = getattr(out, "format", None)
    if settings.compress and hasattr(format, "pack_codec"):
        unit = format.unit
        segments = whole_units(driver, segments, unit, out.size)
        options = options._replace(
            sparse=unit if settings.sparse else 0,
            buffer=max(_PACKED, unit),
            flags=COMPRESSED,
            units=unit,
        )
    elif unit := getattr(out, "whole_unit", 0):
        segments = whole_units(driver, segments, unit, out.size)
        options = options._replace(
            sparse=unit if settings.sparse else 0, buffer=max(_PACKED, unit), units=unit
        )
    on_lost = tell.on_lost
    lost = None if on_lost is None else (lambda offset, _, error: on_lost(offset, error))
    await copy(driver, target, segments, options, count.moved, lost)
    return count.done


async def _one_pass(
    driver: BaseDriver,
    nodes: list[Node],
    plan: Pass,
    settings: Settings,
    tell: _Told,
    on_made: Callable[[], None],
    durable: bool,
) -> int:
    unknown = tell.on_unknown if settings.salvage else None
    source = Sources(nodes, settings.sparse, None, 0, False, unknown)
    count = await _Count.of(source, tell)
    segments = limited(driver, source.segments(), settings.rate)
    if settings.salvage:
        segments = salvaged(segments, tell.on_lost)
    await write_pass(driver, plan, segments, on_made, count.moved, durable)
    return count.done


class _Count:
    """The bytes of data that were copied, of ``total`` (0: nobody wants to know)."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self.total, self.on_progress = total, on_progress
        self.done = 0

    @classmethod
    async def of(cls, source: Sources, tell: _Told) -> _Count:
        """Look through the source first, where somebody is to be told how far it is, or (while
        salvaging) of which parts nobody can say what they are."""
        told = tell.on_progress
        looked = told is not None or source.on_unknown is not None
        return cls(await source.data() if looked else 0, told)

    def moved(self, length: int, zero: bool) -> None:
        """So many bytes were copied, or told to be zeroes."""
        if not zero:
            self.done += length
            if self.on_progress is not None:
                self.on_progress(min(self.done, self.total), self.total)


def _plain_file(out: Node) -> Node | None:
    """The file whose bytes are those of ``out``."""
    format = getattr(out, "format", None)
    shift: int = getattr(format, "offset", 0)
    if out.driver_name != "raw" or shift:
        return None
    below = primary(out)
    return below if below is not None and below.driver_name == "file" else None


def _base_of(nodes: list[Node], below: Node | None) -> Node | None:
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
    try:
        return a is not None and b is not None and os.path.samefile(a, b)
    except OSError:
        return False


__all__ = ["BUFFER", "SPARSE", "CopyFailed", "Settings", "TargetFailed", "convert"]
