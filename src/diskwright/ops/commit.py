"""Writing what an overlay holds into a layer below it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from typing import Any

from ..engine.copy import CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import DiskError, UsageError
from ..graph.closing import discard_disk
from ..graph.display import base_of
from ..graph.node import Node
from ..graph.opener import close_disk
from ..graph.reopen import reopen
from ..graph.status import block_status
from .images import ImageSpec


class NotEmptied(DiskError):
    """Everything was written into the base, but the overlay still holds it, too."""


async def commit(
    driver: BaseDriver,
    spec: ImageSpec,
    *,
    base: str | None = None,
    keep: bool = False,
    rate: int = 0,
    on_open: Callable[[Node], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write what ``spec`` and the layers above ``base`` hold into ``base``, which grows if it is
    smaller; by default the backing file itself.

    The overlay is emptied then, unless ``keep`` is set or ``base`` was named.  ``rate``: bytes a
    second, 0 for no limit.  Everything is durable in ``base`` before the overlay is emptied, so a
    crash at any moment leaves the overlay's content readable through it.  Raises OpenFailed,
    UsageError, OSError, DiskError.
    """
    if base is not None:
        spec = spec._replace(gate=spec.gate.allowing(base))
    top: Any = await spec.open(driver, writable=True)
    try:
        if on_open is not None:
            on_open(top)
        target = layer(top, spec.name, base)
        await reopen(target, writable=True)
        if target.size < top.size:
            await target.truncate(top.size)
        await _move(driver, top, target, rate, on_progress)
        await target.flush()
        if not keep and base is None:
            make_empty = getattr(top.format, "make_empty", None)
            if make_empty is not None:
                try:
                    await top.run_procedure(make_empty())
                except (OSError, DiskError) as error:
                    why = error.strerror if isinstance(error, OSError) else None
                    raise NotEmptied(f"Failed to empty {spec.name}: {why or error}") from error
    except BaseException:
        await discard_disk(top)
        raise
    await close_disk(top)


def layer(top: Node, name: str, base: str | None) -> Node:
    """The layer below ``top`` that ``base`` names, or its backing file.  Raises UsageError."""
    below = top.child("backing")
    if below is None:
        raise UsageError("Image does not have a backing file")
    if base is None:
        return below
    found: Node | None = below
    while found is not None:
        if same_file(found, base):
            return found
        found = found.child("backing")
    raise UsageError(f"Did not find '{base}' in the backing chain of '{name}'")


def same_file(node: Node, name: str) -> bool:
    """Whether the image in ``node`` is the file ``name``."""
    own = base_of(node)
    if own == name:
        return True
    try:
        return os.path.samefile(own, name)
    except (OSError, ValueError):
        return False


async def _move(
    driver: BaseDriver,
    top: Node,
    target: Node,
    rate: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    total = top.size
    passed = 0

    async def held() -> AsyncIterator[Segment]:
        nonlocal passed
        offset = 0
        while offset < total:
            for part in await block_status(top, offset, total - offset, base=target):
                if part.present:
                    yield Segment(top, part.start, part.start, part.length, part.zero)
                else:
                    advance(part.length)
                offset = part.start + part.length

    def advance(length: int, zero: bool = False) -> None:
        nonlocal passed
        passed += length
        if on_progress is not None:
            on_progress(passed, total)

    await copy(driver, target, held(), CopyOptions(sparse=0, rate=rate), advance)
