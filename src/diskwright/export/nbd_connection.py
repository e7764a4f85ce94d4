"""What one NBD client asks: batches of requests, mapped, moved and answered together.

The way of a batch that waits for nothing is one call from the driver's poll to the reply: no task
and no future but the one that says that the node was done at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ..bitmaps import DirtyBitmap
from ..contract import FUA
from ..engine.kernel import Future
from ..engine.node import Buffer, Node
from ..errors import DiskError
from ..wire import nbd_const as c
from ..wire import nbd_reply as reply
from ..wire.nbd_batch import Batch, Other
from .arena import Arena
from .nbd_channel import Channel
from .nbd_requests import groups, perform, status

if TYPE_CHECKING:
    import socket

    from .nbd_server import Server

READ_GROUP = 1 << 20
"""Reads of one batch are carried out in groups of about so many bytes: their buffers are kept, and
soon used again."""
FEW = 4
"""Requests without payload of one batch that begin before other clients have their turn."""


class Connection(Channel):
    """Serves one client; ``chosen`` is the name of its export, once it has one."""

    def __init__(self, export: Server, sock: socket.socket) -> None:
        super().__init__(export, sock)
        self.node: Node
        self.bitmaps: Mapping[bytes, DirtyBitmap]
        self.chosen: bytes | None = None

    def _send_handshake(self) -> None:
        super()._send_handshake()
        if self.machine.export is not None:
            self.chosen = self.machine.export.name
            self.node = self.export.nodes[self.chosen]
            self.bitmaps = self.export.bitmaps[self.chosen]

    def _begin(self, batch: Batch) -> None:
        reads_wait = False
        if batch.read_cookies:
            lengths = batch.read_lengths
            total = sum(lengths)
            if total <= READ_GROUP and len(lengths) <= reply.HEADERS and self.budget.take(total):
                self._read(batch.read_cookies, batch.read_offsets, lengths, total)
            else:
                reads_wait = True
        if batch.write_cookies:
            work = self.driver.start(
                self.node.write(batch.write_offsets, batch.payloads, FUA if batch.fua else 0),
                io=True,
            )
            if work.done:
                self._written(batch, work)
            else:
                self._later(work, partial(self._written, batch))
        if batch.refusals:
            data = b"".join(reply.refused(self.machine.mode, r) for r in batch.refusals)
            self._answer(data)
        if reads_wait or len(batch.others) > FEW:
            self._feed(self._begin_rest(batch, reads_wait))
        else:
            for other in batch.others:
                self._go(self._other(other))

    async def _begin_rest(self, batch: Batch, reads: bool) -> None:
        """What may take more memory or time than there is: one after the other."""
        if reads:
            await self._read_groups(batch)
        for other in batch.others:
            if self._loaded():
                await self._ease()
            if self.outgoing.broken is not None:
                break
            self._go(self._other(other))
            await self.driver.turn()

    # -- reads
    async def _read_groups(self, batch: Batch) -> None:
        """Reads that the budget must grant group by group."""
        cookies, offsets, lengths = batch.read_cookies, batch.read_offsets, batch.read_lengths
        for at, end, total in groups(lengths, READ_GROUP, reply.HEADERS):
            if self._loaded():
                await self._ease()
            if self.outgoing.broken is not None:
                break
            if not self.budget.take(total):
                await self.budget.acquire(total)
            self._read(cookies[at:end], offsets[at:end], lengths[at:end], total)

    def _read(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int], total: int
    ) -> None:
        """One group; ``total`` bytes of budget were taken."""
        arena = self.export.arena(self.machine.mode)
        work = self.driver.start(
            self.node.read(offsets, lengths, arena.views(lengths, total)), io=True
        )
        if work.done:
            self._have_read(cookies, offsets, lengths, total, arena, work)
        else:
            self._later(work, partial(self._have_read, cookies, offsets, lengths, total, arena))

    def _have_read(
        self,
        cookies: Sequence[bytes],
        offsets: Sequence[int],
        lengths: Sequence[int],
        total: int,
        arena: Arena,
        work: Future[Sequence[Buffer]],
    ) -> None:
        if work.error is not None:
            self.export.keep(arena)
            self.budget.release(total)
            if not isinstance(work.error, (OSError, DiskError)):
                self._failed(work.error)
            elif len(cookies) == 1:
                self._refuse(c.CMD_READ, cookies[0], offsets[0], work.error)
            else:  # which of them was it?
                self._go(self._read_singly(cookies, offsets, lengths))
            return
        count = len(cookies)
        buffers: list[Buffer] = [b""] * (2 * count)
        buffers[0::2] = arena.headers.fill(cookies, offsets, lengths)
        buffers[1::2] = work.value or ()
        size = total + count * arena.header_size
        if self.outgoing.send(buffers, size):
            self._sent(arena, total)
        else:
            self.outgoing.then(partial(self._sent, arena, total))

    def _sent(self, arena: Arena, total: int) -> None:
        self.export.keep(arena)
        self.budget.release(total)

    async def _read_singly(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        for cookie, offset, length in zip(cookies, offsets, lengths, strict=True):
            if not self.budget.take(length):
                await self.budget.acquire(length)
            self._read((cookie,), (offset,), (length,), length)

    # -- everything else
    def _written(self, batch: Batch, work: Future[None]) -> None:
        cookies, offsets = batch.write_cookies, batch.write_offsets
        if work.error is None:
            batch.release()
            data = reply.done(cookies, self.machine.mode, offsets)
            self._answer(data)
        elif len(cookies) > 1 and isinstance(work.error, (OSError, DiskError)):
            self._go(self._write_singly(batch))
        else:
            batch.release()
            self._refuse(c.CMD_WRITE, cookies[0], offsets[0], work.error)

    async def _write_singly(self, batch: Batch) -> None:
        try:
            for cookie, offset, payload in zip(
                batch.write_cookies, batch.write_offsets, batch.payloads, strict=True
            ):
                try:
                    await self.node.write([offset], [payload], FUA if batch.fua else 0)
                except (OSError, DiskError) as error:
                    self._refuse(c.CMD_WRITE, cookie, offset, error)
                else:
                    data = reply.done((cookie,), self.machine.mode, (offset,))
                    self._answer(data)
        finally:
            batch.release()

    async def _other(self, other: Other) -> None:
        machine = self.machine
        try:
            if other.command == c.CMD_BLOCK_STATUS:
                asked = machine.mode, machine.contexts, self.bitmaps
                data = await status(self.node, other, *asked)
            else:
                await perform(self.node, other, lambda: self._closer is not None)
                data = reply.done((other.cookie,), machine.mode, (other.offset,))
        except (OSError, DiskError) as error:
            self._refuse(other.command, other.cookie, other.offset, error)
        else:
            self._answer(data)

    def _refuse(self, command: int, cookie: bytes, offset: int, error: BaseException) -> None:
        data = reply.failed(self.machine.mode, command, cookie, c.wire_errno(error), offset)
        self._answer(data)
