"""What both Python APIs offer of dirty bitmaps: ``disk.bitmaps``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine import bitmaps as at
from ..graph.node import Node
from . import bitmap as ops
from .bitmap import BitmapInfo, engine_of

Ranges = list[tuple[int, int]]
"""(offset, length) in bytes."""


class Bitmaps:
    """The dirty bitmaps of an open disk, by their names.  A persistent one is stored when the disk
    is closed, or by :meth:`store`.  Raises BitmapError for what cannot be done to a bitmap."""

    def __init__(self, node: Callable[[], Node], call: Any) -> None:
        self._node = node
        self._call = call
        """Runs a coroutine on the disk's driver."""

    def list(self) -> list[BitmapInfo]:
        """All of them, in the order in which they were made."""
        return ops.listed(self._node())

    def add(
        self,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = True,
        enabled: bool = True,
    ) -> None:
        """A new one, which calls dirty what is written from now on.  ``granularity``: bytes per
        bit, a power of two from 512 to 2 GiB (None: a cluster of 4 to 64 KiB)."""
        node = self._node()
        self._call(
            lambda: ops.add(node, name, granularity, persistent=persistent, enabled=enabled)
        )

    def remove(self, name: str) -> None:
        """Forget one; the only thing that an inconsistent one is good for."""
        engine = engine_of(self._node())
        self._call(lambda: at.remove(engine, name))

    def clear(self, name: str) -> None:
        """Call nothing dirty any more."""
        engine = engine_of(self._node())
        self._call(lambda: at.clear(engine, name))

    def enable(self, name: str) -> None:
        """Follow writes."""
        engine = engine_of(self._node())
        self._call(lambda: at.switch(engine, name, True))

    def disable(self, name: str) -> None:
        """Stay as it is."""
        engine = engine_of(self._node())
        self._call(lambda: at.switch(engine, name, False))

    def merge(self, name: str, *sources: str, other: Bitmaps | None = None) -> None:
        """Add what is dirty in ``sources``, bitmaps of this disk or of ``other``."""
        taken = other or self
        there, node = taken._node(), self._node()
        found = [taken._call(lambda one=source: ops.load(there, one)) for source in sources]
        self._call(lambda: ops.merge(node, name, found))

    def dirty(self, name: str, offset: int = 0, length: int | None = None) -> Ranges:
        """The dirty ranges of a part of the disk, as (offset, length) in bytes."""
        node = self._node()
        found: Ranges = self._call(lambda: ops.dirty(node, name, offset, length))
        return found

    def store(self) -> None:
        """Bring persistent ones to the image now."""
        engine = engine_of(self._node())
        self._call(lambda: at.store(engine))


class AsyncBitmaps:
    """The dirty bitmaps of an open disk; see :class:`Bitmaps`."""

    def __init__(self, node: Callable[[], Node], call: Any) -> None:
        self._node = node
        self._call = call
        """Runs a coroutine on the disk's driver."""

    def list(self) -> list[BitmapInfo]:
        """All of them, in the order in which they were made."""
        return ops.listed(self._node())

    async def add(
        self,
        name: str,
        granularity: int | None = None,
        *,
        persistent: bool = True,
        enabled: bool = True,
    ) -> None:
        """A new one."""
        node = self._node()
        await self._call(
            ops.add(node, name, granularity, persistent=persistent, enabled=enabled)
        )

    async def remove(self, name: str) -> None:
        """Forget one."""
        await self._call(at.remove(engine_of(self._node()), name))

    async def clear(self, name: str) -> None:
        """Call nothing dirty any more."""
        await self._call(at.clear(engine_of(self._node()), name))

    async def enable(self, name: str) -> None:
        """Follow writes."""
        await self._call(at.switch(engine_of(self._node()), name, True))

    async def disable(self, name: str) -> None:
        """Stay as it is."""
        await self._call(at.switch(engine_of(self._node()), name, False))

    async def merge(self, name: str, *sources: str, other: AsyncBitmaps | None = None) -> None:
        """Add what is dirty in ``sources``, bitmaps of this disk or of ``other``."""
        taken = other or self
        found = [await taken._call(ops.load(taken._node(), source)) for source in sources]
        await self._call(ops.merge(self._node(), name, found))

    async def dirty(self, name: str, offset: int = 0, length: int | None = None) -> Ranges:
        """The dirty ranges of a part of the disk, as (offset, length) in bytes."""
        found: Ranges = await self._call(ops.dirty(self._node(), name, offset, length))
        return found

    async def store(self) -> None:
        """Bring persistent ones to the image now."""
        await self._call(at.store(engine_of(self._node())))
