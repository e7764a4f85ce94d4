"""Putting an image on top of another backing file."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..contract import Procedure
from ..engine.align import whole_units
from ..engine.copy import CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError, words
from ..graph import registry
from ..graph.closing import discard_disk, explain
from ..graph.display import base_of
from ..graph.named import identity_of, meaning
from ..graph.names import foreign
from ..graph.node import Node
from ..graph.opener import close_disk, open_disk
from ..graph.status import allocated_above, block_status
from ..units import align_down
from .commit import same_file
from .images import ImageSpec

WINDOW = 1 << 20


async def rebase(
    driver: BaseDriver,
    spec: ImageSpec,
    backing: str | None,
    backing_format: str | None,
    *,
    unsafe: bool = False,
    backing_cache: str = "writeback",
    compress: bool = False,
    on_open: Callable[[Node], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> None:
    """Make ``backing`` (None: nothing) the backing file of ``spec``.

    What the disk reads stays the same: where the old and the new backing file differ, the old
    content is written into the image first (compressed if so asked), and is durable before the
    header changes.  ``unsafe`` changes the header alone.  Raises OpenFailed, UsageError, OSError,
    DiskError.

    An image that records the identity of its backing file (VHDX, VMDK) records that of the new
    one.  For ``unsafe`` only the header of the new one is read; where it cannot be, the recorded
    identity stays, and ``on_warning`` is told.
    """
    if backing_format is not None:
        try:
            registry.driver(backing_format)
        except DiskError:
            raise UsageError(f"Invalid format name: '{backing_format}'") from None
    if backing is not None:
        spec = spec._replace(gate=spec.gate.allowing(backing))
    top: Any = await spec.open(driver, writable=True, backing=not unsafe)
    new: Node | None = None
    identity: str | None = None
    try:
        if on_open is not None:
            on_open(top)
        change = getattr(top.format, "change_backing", None)
        problem = f"Could not change the backing file to '{backing or ''}'"
        if change is None:
            raise NotSupported(f"{problem}: Operation not supported")
        if backing is not None and backing_format is None:
            raise UsageError(f"{problem}: backing format must be specified")
        if not unsafe:
            if compress and not hasattr(top.format, "pack_codec"):
                raise UsageError("Compression not supported for this file format")
            if compress and getattr(top.format, "encrypted", False):
                raise UsageError("Compression and encryption not supported at the same time")
            if backing is not None:
                new = await _open_new(driver, top, spec, backing, backing_format, backing_cache)
            await _keep(driver, top, new, compress, on_progress)
            if new is not None and hasattr(top.format, "parent_identity"):
                identity = identity_of(new)
        elif backing is not None and hasattr(top.format, "parent_identity"):
            identity = await _identity(driver, top, spec, backing, backing_format, on_warning)
        try:
            await top.run_procedure(_change(change, backing, backing_format, identity))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UsageError(
                    f"{problem}: No space left in the file header for the new name"
                ) from error
            if error.errno == errno.EINVAL:
                raise UsageError(f"{problem}: {words(error)}") from error
            raise
    except BaseException:
        if new is not None:
            await discard_disk(new)
        await discard_disk(top)
        raise
    if new is not None:
        await close_disk(new)
    await close_disk(top)


def _change(
    change: Callable[..., Procedure], backing: str | None, fmt: str | None, identity: str | None
) -> Procedure:
    if backing is None:
        return change(None, None)
    # A format that records no identity need not take one.
    return change(backing, fmt) if identity is None else change(backing, fmt, identity)


async def _identity(
    driver: BaseDriver,
    top: Node,
    spec: ImageSpec,
    backing: str,
    fmt: str | None,
    on_warning: Callable[[str], None] | None,
) -> str | None:
    """The identity of the new backing file, of which nothing but the header is looked at."""
    try:
        new = await _open_new(driver, top, spec, backing, fmt, "writeback", chain=False)
    except (OSError, DiskError) as error:
        if on_warning is not None:
            on_warning(f"{error}; the identity recorded of the old one stays")
        return None
    found = identity_of(new)
    await close_disk(new)
    return found


async def _open_new(
    driver: BaseDriver,
    top: Node,
    spec: ImageSpec,
    backing: str,
    fmt: str | None,
    cache: str,
    chain: bool = True,
) -> Node:
    """The new backing file; a relative name is relative to the image, as it will be read later."""
    name = spec.gate.mapped(backing)
    if name is None and foreign(backing):
        raise UsageError(
            f"Could not open new backing file '{backing}': it is a path of another machine "
            "(--map-path says where that is here)"
        )
    if name is None:
        name = meaning(top, backing)
    try:
        return await open_disk(
            driver,
            name,
            format=fmt,
            cache=cache,
            gate=spec.gate,
            backing=chain,
            secrets=spec.secrets,
        )
    except (OSError, DiskError) as error:
        raise UsageError(
            f"Could not open new backing file '{backing}': {explain(error)}"
        ) from error


async def _keep(
    driver: BaseDriver,
    top: Any,
    new: Node | None,
    compress: bool,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Write into the image what it would not read from the new backing file."""
    old = top.child("backing")
    below = None if new is None else _within(old, new)
    total = top.size
    whole = top.format.unit
    # What is not compressed may be told apart by smaller units than are allocated.
    unit = max(whole if compress else getattr(top.format, "zero_unit", whole), 512)
    window = max(WINDOW, unit)

    async def changed() -> AsyncIterator[Segment]:
        offset = 0
        while offset < total:
            _, length, same = (await allocated_above(top, old, offset, total - offset))[0]
            if not same and below is not None and old is not None and offset < old.size:
                # The new backing file is a layer of the old chain: what no layer above it holds
                # stays the same.
                length = min(length, old.size - offset)
                same = below is old
                if not same:
                    _, length, above = (await allocated_above(old, below, offset, length))[0]
                    same = not above
            if not same:
                # Both read as zeroes: passed over at once, however long.
                zeroes = min(await _zeroes(old, offset, length), await _zeroes(new, offset, length))
                if zeroes:
                    length = zeroes
                else:
                    length = min(window - offset % window, length)
                    for segment in await _differing(top, old, new, offset, length, unit):
                        yield segment
            offset += length
            if on_progress is not None:
                on_progress(offset, total)

    segments, options = changed(), CopyOptions(sparse=unit, workers=1)
    if compress:
        segments = whole_units(driver, segments, unit, total)
        options = options._replace(units=unit, buffer=window)
        from ..filters.compress import SLOT, CompressNode

        # Of a unit some subclusters may be stored: it is written, but not compressed.
        target = CompressNode(driver, top, unit)
        try:
            await copy(driver, target, segments, options)
        finally:
            target.detach(SLOT)
        return
    await copy(driver, top, segments, options)


async def _differing(
    top: Node, old: Node | None, new: Node | None, offset: int, length: int, unit: int
) -> list[Segment]:
    """The parts of a range (in units) where the two backing files differ."""
    before = await _content(old, offset, length)
    after = await _content(new, offset, length)
    out: list[Segment] = []
    position = offset
    while position < offset + length:
        end = min(align_down(position, unit) + unit, offset + length)
        part = slice(position - offset, end - offset)
        if bytes(before[part]) != bytes(after[part]):
            if out and out[-1].target_offset + out[-1].length == position:
                last = out[-1]
                out[-1] = last._replace(length=last.length + end - position)
            else:
                # The old content is what the image reads now.
                out.append(Segment(top, position, position, end - position))
        position = end
    return out


async def _zeroes(node: Node | None, offset: int, length: int) -> int:
    """How many bytes of the range, from its beginning, the map says are zeroes (also behind the
    end)."""
    if node is None or offset >= node.size:
        return length
    (first, *_) = await block_status(node, offset, min(length, node.size - offset))
    return first.length if first.zero else 0


async def _content(node: Node | None, offset: int, length: int) -> memoryview:
    """The bytes of a backing file, zeroes behind its end."""
    target = memoryview(bytearray(length))
    inside = 0 if node is None else max(0, min(length, node.size - offset))
    if node is not None and inside:
        await node.read([offset], [inside], [target[:inside]])
    return target


def _within(old: Node | None, new: Node) -> Node | None:
    """The layer of the old chain that is the same image as ``new``."""
    while old is not None:
        if old.driver_name == new.driver_name and same_file(old, base_of(new)):
            return old
        old = old.child("backing")
    return None
