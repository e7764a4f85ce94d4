"""Writing what an overlay holds into a layer below it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from ..engine.copy import CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import DiskError, UsageError
from ..graph.closing import discard_disk
from ..graph.display import base_of
from ..graph.named import identity_of
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
    second, 0 for no limit.  Raises OpenFailed, UsageError, OSError, DiskError.

    The order, for a crash at any moment: everything is durable in ``base`` first, and until the
    overlay is emptied it holds the same.  Where the layer above ``base`` has recorded the identity
    that ``base`` had (VHDX, VMDK), it records the new one next: the identity changes with the first
    write, so nobody knows it sooner.  A crash before that leaves a chain that refuses to open,
    with content that is still right; ``rebase -u`` to the same backing file records the identity,
    and the commit can be done again.  Only then is the overlay emptied.  A commit that fails or is
    cancelled records the identity as well, so that it can simply be done again.
    """
    if base is not None:
        spec = spec._replace(gate=spec.gate.allowing(base))
    top: Any = await spec.open(driver, writable=True)
    link: _Link | None = None
    try:
        if on_open is not None:
            on_open(top)
        target = layer(top, spec.name, base)
        link = _Link(top, target)
        await link.make_writable()
        await reopen(target, writable=True)
        if target.size < top.size:
            await target.truncate(top.size)
        await _move(driver, top, target, rate, on_progress)
        await target.flush()
        await link.renew()
        if not keep and base is None:
            make_empty = getattr(top.format, "make_empty", None)
            if make_empty is not None:
                try:
                    await top.run_procedure(make_empty())
                except (OSError, DiskError) as error:
                    why = error.strerror if isinstance(error, OSError) else None
                    raise NotEmptied(f"Failed to empty {spec.name}: {why or error}") from error
    except BaseException:
        if link is not None:
            with suppress(OSError, DiskError):
                await target.flush()
                await link.renew()
        await discard_disk(top)
        raise
    await close_disk(top)


class _Link:
    """What the layer directly above the base records of it."""

    def __init__(self, top: Node, base: Node) -> None:
        child: Any = top
        while (below := child.child("backing")) is not base:
            child = below
        self.top, self.child, self.base = top, child, base
        format = getattr(child, "format", None)
        self.recorded: str | None = getattr(format, "parent_identity", None)
        self.name = getattr(format, "backing_file", None)
        self.format = getattr(format, "backing_format", None)

    async def make_writable(self) -> None:
        """Before anything is moved: a layer that cannot be written to could not follow."""
        if self.recorded is not None and self.child is not self.top:
            await reopen(self.child, writable=True)

    async def renew(self) -> None:
        """Record the identity that the base has now."""
        now = identity_of(self.base)
        if self.recorded is not None and now is not None and now != self.recorded:
            change = self.child.format.change_backing(self.name, self.format, now)
            await self.child.run_procedure(change)


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
