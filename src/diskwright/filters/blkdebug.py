"""Filter ``blkdebug``: fails or stops requests by rules, and pretends to be a pickier device.

Its parents announce what their metadata machines are about to do (:meth:`BlkdebugNode.event`);
what the node itself does with a request (``pwritev_rmw_head`` ... ``pwritev_done``,
``flush_to_disk``) it announces to itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Sequence

from ..contract import NO_FALLBACK, Limits
from ..declare import Driver, Option
from ..engine.kernel import BaseDriver, Future, gather
from ..errors import NodeClosed, UsageError
from ..extents import Extent, Opaque
from ..graph.node import Buffer, Node
from ..hints import Any
from ..protocols.bounce import Bounce
from ..units import align_down, align_up
from .blkdebug_config import make_rules, option_sections, read_config
from .blkdebug_limits import Busy, apart, by_unit, cut, limits_of
from .blkdebug_rules import Machine

SLOT = "image"
_ZERO_STEP = 1 << 20


class BlkdebugNode(Node):
    """One child in the slot ``image``.

    ``limits``: what it asks of requests (bytes).  Requests are cut and bounced to fit, as for a
    device that has these limits.  ``on_message`` is told of stopped and resumed requests.
    """

    wants_events = True

    def __init__(self, driver: BaseDriver, child: Node, machine: Machine, limits: Limits) -> None:
        super().__init__(driver, "blkdebug")
        self.machine = machine
        self.on_message: Callable[[str], None] | None = None
        self._own = limits
        self._unflushed = False
        self._busy = Busy()
        self.closed = False
        self._bounce = Bounce(limits.alignment, self._read_aligned, self._write_aligned)
        self.attach(SLOT, child)

    @property
    def image(self) -> Node:
        """The child."""
        return self.children[SLOT].child

    @property
    def size(self) -> int:
        return self.children[SLOT].child.size if SLOT in self.children else 0

    @size.setter
    def size(self, value: int) -> None:
        """Ignored at construction; it is the child's."""

    def child_changed(self, slot: str) -> None:
        child = self.child(SLOT)
        if child is not None:
            self.limits = self._own.merged(child.limits)
            self.read_only = self.read_only or child.read_only
        self.changed()

    # -- events
    def event(self, tag: str) -> Future[None] | None:
        stops = self.machine.event(tag)
        self._tell()
        if not stops:
            return None
        if len(stops) == 1:
            return stops[0]
        return self.driver.start(self._pass(stops))

    async def _pass(self, stops: list[Future[None]]) -> None:
        for stop in stops:
            await stop

    async def _announce(self, tag: str) -> None:
        stop = self.event(tag)
        if stop is not None:
            await stop

    def _tell(self) -> None:
        messages = self.machine.messages
        if messages:
            told = list(messages)
            messages.clear()
            if self.on_message is not None:
                for message in told:
                    self.on_message(message)

    def set_break(self, event: str, tag: str) -> bool:
        """Stop the next request that comes to ``event``; False for an unknown event."""
        return self.machine.add_break(event, tag)

    def remove_break(self, tag: str) -> bool:
        """Remove a breakpoint and let its requests go on; False when there was none."""
        done = self.machine.remove_break(tag)
        self._tell()
        return done

    def resume(self, tag: str) -> bool:
        """Let a stopped request go on; False when none stands at ``tag``."""
        done = self.machine.resume(tag)
        self._tell()
        return done

    async def wait_break(self, tag: str) -> None:
        """Wait until a request stands at ``tag``."""
        await self.machine.stopped(tag)

    def release(self) -> None:
        """Forget all breakpoints and let every stopped request go on."""
        self.machine.release()
        self._tell()

    async def _check(self, iotype: str, offset: int = 0, length: int = 0) -> None:
        rule = self.machine.failing(iotype, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            await self.driver.turn()
        if rule.errno:
            raise OSError(rule.errno, os.strerror(rule.errno))

    # -- requests
    def _check_open(self, write: bool) -> None:
        if self.closed:
            raise NodeClosed(f"node '{self.name}' is closed")
        if write and self.read_only:
            raise PermissionError(errno.EPERM, "Operation not permitted: node is read-only")

    async def _each(self, work: list[Callable[[], Awaitable[None]]], apart: bool) -> None:
        """Requests of one batch are independent unless they overlap (then the later wins)."""

        async def run(one: Callable[[], Awaitable[None]]) -> None:
            await one()

        if len(work) > 1 and apart:
            await gather(self.driver, [run(one) for one in work])
            return
        for one in work:
            await one()

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        self._check_open(False)
        if len(offsets) == 1:
            return await self._bounce.read(offsets, lengths, into)
        views = into if into is not None else [memoryview(bytearray(n)) for n in lengths]
        await gather(
            self.driver,
            [
                self._bounce.read([o], [n], [view])
                for o, n, view in zip(offsets, lengths, views, strict=True)
            ],
        )
        return views

    async def _read_aligned(
        self, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Sequence[Buffer]:
        out: list[Buffer] = []
        for offset, length in zip(offsets, lengths, strict=True):
            parts: list[Buffer] = []
            for start, count in cut(offset, length, self.limits.max_transfer):
                await self._check("read", start, count)
                parts += await self.image.read([start], [count])
            out.append(parts[0] if len(parts) == 1 else b"".join(parts))
        return out

    async def _write_aligned(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        for offset, buffer in zip(offsets, buffers, strict=True):
            await self._announce("pwritev")
            await self._put(offset, memoryview(buffer), flags)
            await self._announce("pwritev_done")

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        self._check_open(True)
        spans = [(o, o + len(b)) for o, b in zip(offsets, buffers, strict=True)]
        await self._each(
            [
                lambda o=o, b=b: self._write_one(o, b, flags)  # type: ignore[misc]
                for o, b in zip(offsets, buffers, strict=True)
            ],
            apart(spans),
        )

    async def _write_one(self, offset: int, buffer: Buffer, flags: int) -> None:
        """One write; its ragged ends are read first, while it has its units alone.

        :meth:`Bounce.write` does the same without announcing each step, hence not called here.
        """
        bounce = self._bounce
        if not len(buffer):
            return
        ragged = not bounce.aligned([offset], [len(buffer)])
        mine = await self._busy.take(*bounce.widen(offset, len(buffer)), ragged)
        try:
            if ragged:
                offset, buffer = await self._fill_up(offset, buffer)
            await self._write_aligned([offset], [buffer], flags)
        finally:
            self._busy.drop(mine)

    async def _fill_up(self, offset: int, buffer: Buffer) -> tuple[int, Buffer]:
        """Widen a write to whole units (not beyond the end of the disk, unless it goes there)."""
        unit = self._own.alignment
        end = offset + len(buffer)
        start, stop = align_down(offset, unit), align_up(end, unit)
        stop = min(stop, max(end, self.size))
        whole = bytearray(stop - start)
        if start < offset:
            await self._announce("pwritev_rmw_head")
            (head,) = await self._read_aligned([start], [unit])
            whole[: offset - start] = memoryview(head)[: offset - start]
            if end < stop <= start + unit:  # the same unit
                whole[end - start :] = memoryview(head)[end - start : stop - start]
            await self._announce("pwritev_rmw_after_head")
        if end < stop:
            await self._announce("pwritev_rmw_tail")
            if stop > start + unit or start == offset:
                last = align_down(end, unit)
                (tail,) = await self._read_aligned([last], [unit])
                whole[end - start :] = memoryview(tail)[end - last : stop - last]
            await self._announce("pwritev_rmw_after_tail")
        whole[offset - start : end - start] = buffer
        return start, whole

    async def _put(self, offset: int, data: memoryview, flags: int) -> None:
        for start, count in cut(offset, len(data), self.limits.max_transfer):
            await self._check("write", start, count)
            self._unflushed = True
            await self.image.write([start], [data[start - offset :][:count]], flags)

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self._check_open(True)
        spans = [(o, o + n) for o, n in zip(offsets, lengths, strict=True)]
        await self._each(
            [lambda s=s, e=e: self._zero_one(s, e, flags) for s, e in spans],  # type: ignore[misc]
            apart(spans),
        )

    async def _zero_one(self, start: int, end: int, flags: int) -> None:
        """Ragged ends are written; the rest in pieces that suit the limits of zeroing."""
        unit = self._own.alignment
        first, last = align_up(start, unit), align_down(end, unit)
        if first >= last:
            await self._write_one(start, bytes(end - start), flags & ~NO_FALLBACK)
            return
        if start < first:
            await self._write_one(start, bytes(first - start), flags & ~NO_FALLBACK)
        mine = await self._busy.take(first, last, False)
        try:
            await self._announce("pwritev_zero")
            await self._zero_whole(first, last, flags)
            await self._announce("pwritev_done")
        finally:
            self._busy.drop(mine)
        if last < end:
            await self._write_one(last, bytes(end - last), flags & ~NO_FALLBACK)

    async def _zero_whole(self, start: int, end: int, flags: int) -> None:
        unit = max(self._own.alignment, self._own.zero_alignment)
        for at, length, whole in by_unit(start, end, unit, self.limits.max_zero):
            if whole:
                await self._check("write-zeroes", at, length)
                self._unflushed = True
                await self.image.zero([at], [length], flags)
                continue
            if flags & NO_FALLBACK:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            block = memoryview(bytes(min(length, _ZERO_STEP)))
            for part, count in cut(at, length, len(block)):
                await self._put(part, block[:count], 0)

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._check_open(True)
        await self._each(
            [
                lambda o=o, n=n: self._discard_one(o, o + n)  # type: ignore[misc]
                for o, n in zip(offsets, lengths, strict=True)
            ],
            True,
        )

    async def _discard_one(self, start: int, end: int) -> None:
        """Ends that are less than the alignment are dropped, since it is advisory; those that
        only do not suit discarding are passed on apart."""
        alignment = self._own.alignment
        start, end = align_up(start, alignment), align_down(end, alignment)
        unit = max(alignment, self._own.discard_alignment)
        for at, length, _ in by_unit(start, end, unit, self.limits.max_discard):
            await self._check("discard", at, length)
            self._unflushed = True
            await self.image.discard([at], [length])

    async def flush(self) -> None:
        self._check_open(False)
        await self._announce("flush_to_os")
        if not self._unflushed:
            return
        await self._announce("flush_to_disk")
        self._unflushed = False
        try:
            await self._check("flush")
            await self.image.flush()
        except BaseException:
            self._unflushed = True
            raise

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self._check_open(False)
        await self._check("block-status", offset, length)
        return [Opaque(SLOT, offset, length)] if length else []

    async def reads_zero(self, offset: int, length: int) -> bool:
        await self._check("block-status", offset, length)
        return await self.image.reads_zero(offset, length)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        self._check_open(True)
        self._unflushed = True
        await self.image.truncate(size, preallocation)
        self.changed()

    async def close(self) -> None:
        self.release()
        self.closed = True


async def open_blkdebug(
    driver: BaseDriver,
    options: dict[str, Any],
    open_child: Callable[[Any], Awaitable[Node]],
) -> BlkdebugNode:
    """Open by options, as declared in :data:`DRIVER`; ``image`` describes the child."""
    sections = read_config(options["config"]) if options.get("config") else []
    for group in ("inject-error", "set-state"):
        sections += option_sections(group, options.get(group))
    machine = Machine(*make_rules(sections))
    limits = limits_of(options)
    if options.get("image") is None:
        raise UsageError('A block device must be specified for "image"')
    node = BlkdebugNode(driver, await open_child(options["image"]), machine, limits)
    node.options = dict(options)
    return node


DRIVER = Driver(
    "blkdebug",
    "filter",
    options=(
        Option("image", "str", "the node below"),
        Option("config", "str", "file with rules"),
        Option("inject-error", "list", "rules that fail requests"),
        Option("set-state", "list", "rules that change the state"),
        Option("align", "size", "alignment that requests must have, in bytes"),
        Option("max-transfer", "size", "longest read or write in bytes"),
        Option("opt-write-zero", "size", "alignment of write-zeroes in bytes"),
        Option("max-write-zero", "size", "longest write-zeroes in bytes"),
        Option("opt-discard", "size", "alignment of discards in bytes"),
        Option("max-discard", "size", "longest discard in bytes"),
    ),
    open=open_blkdebug,
)
