"""One NBD client: what its socket holds is parsed, mapped, moved and answered as one batch."""

from __future__ import annotations

import socket
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..contract import FUA, MAY_UNMAP
from ..engine.kernel import Cancelled, Future, Task
from ..engine.node import Buffer, Node
from ..errors import DiskError
from ..wire import nbd_const as c
from ..wire import nbd_reply as reply
from ..wire.nbd_batch import Batch, Other, ReceiveBuffer
from ..wire.nbd_server import BUFFER_SIZE, NbdServer
from .arena import Arena
from .budget import CLIENT_LIMIT, Budget
from .nbd_status import allocation
from .outgoing import Outgoing

if TYPE_CHECKING:
    from .nbd import NbdExport

READ_CHUNK = 4 << 20
"""Reads of one batch are carried out in groups of about so many bytes."""
LINGER_SECONDS = 30.0
"""How long a client that leaves or is stopped may take to read its last replies."""
_CACHE_PIECE = 1 << 20


class Connection:
    """Serves ``sock`` (nonblocking) until the client leaves or :meth:`stop` is called."""

    def __init__(self, export: NbdExport, sock: socket.socket) -> None:
        self.export = export
        self.node: Node = export.node
        self.driver = export.driver
        self.sock = sock
        self.fd = sock.fileno()
        self.machine = NbdServer([export.description], ReceiveBuffer(BUFFER_SIZE))
        self.outgoing = Outgoing(self.driver, sock)
        self.budget = Budget(self.driver, CLIENT_LIMIT, export.budget)
        self.negotiated = False
        self.reason = ""
        self._running = 0
        self._idle: Future[None] | None = None
        self._task: Task[None] | None = None
        self._stopping = False
        self._held = BUFFER_SIZE  # bytes of the receive buffer that the budget counts
        self.budget.take(BUFFER_SIZE)

    # -- life
    def start(self) -> Future[None]:
        """Begin; the future ends with the connection."""
        task = self.driver.spawn(self._run(), name="nbd-client")
        self._task = task
        return task

    def stop(self) -> None:
        """Read no more requests; those that were read are carried out and answered."""
        self._stopping = True
        if self._task is not None and not self._task.done:
            self._task.cancel()

    async def _run(self) -> None:
        timer = self.driver.later(self.export.handshake_seconds, self._too_slow)
        self.export.budget.reclaim.add(self._shrink)
        self._send_handshake()
        try:
            await self._receive()
        except Cancelled:
            self.reason = self.reason or "stopped"
        except OSError as error:
            self.reason = str(error)
        finally:
            timer.cancel()
            timer = self.driver.later(LINGER_SECONDS, self.outgoing.abandon)
            while True:
                try:
                    await self._quiet()
                    await self.outgoing.drained()
                    break
                except Cancelled:  # asked to stop while it already ends
                    continue
            timer.cancel()
            self.export.budget.reclaim.discard(self._shrink)
            self.budget.release(self._held)
            self.driver.forget(self.fd)
            self.sock.close()

    def _too_slow(self) -> None:
        if not self.negotiated:
            self.reason = "handshake took too long"
            self.stop()

    def _send_handshake(self) -> None:
        out = self.machine.take()
        if out:
            data = b"".join(out)
            self.outgoing.send([data], len(data))

    # -- receiving
    async def _receive(self) -> None:
        machine, sock, driver, fd = self.machine, self.sock, self.driver, self.fd
        outgoing = self.outgoing
        receive = sock.recv_into
        while True:
            space = machine.space()
            if space is None:
                await self._grow(machine.wanted)
                continue
            room = len(space)
            try:
                count = receive(space)
            except (BlockingIOError, InterruptedError):
                await driver.readable(fd)
                continue
            if not count:
                self.reason = "the client closed the connection"
                return
            batch = machine.received(count)
            if machine.handshake is not None:
                self._send_handshake()
                self.negotiated = machine.export is not None
            if batch is not None:
                if batch.others or batch.refusals or batch.write_cookies:
                    await self._begin(batch)
                else:
                    await self._begin_reads(
                        batch.read_cookies, batch.read_offsets, batch.read_lengths
                    )
            if machine.closed:
                self.reason = machine.closed
                return
            if outgoing.broken is not None:
                self.reason = str(outgoing.broken)
                return
            if self._held > BUFFER_SIZE and self.export.budget.contended:
                self._shrink()
            if count < room:  # the socket is empty
                await driver.readable(fd)

    async def _grow(self, size: int) -> None:
        """Go on in a receive buffer of ``size`` bytes, once the budget allows it."""
        if not self.budget.take(size):
            await self.budget.acquire(size)
        old = self.machine.replace(ReceiveBuffer(size))
        held, self._held = self._held, size
        if old.users:
            old.freed = partial(self.budget.release, held)
        else:
            self.budget.release(held)

    def _shrink(self) -> None:
        """Give a large receive buffer back, if it is not in use (others wait for the budget)."""
        machine = self.machine
        if self._held > BUFFER_SIZE and machine.idle and not machine.buffer.users:
            machine.replace(ReceiveBuffer(BUFFER_SIZE))
            held, self._held = self._held, BUFFER_SIZE
            self.budget.release(held - BUFFER_SIZE)

    # -- carrying out
    def _go(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run it beside what follows; :meth:`_quiet` waits for it."""
        future = self.driver.start(coro, io=True)
        if future.done:
            if future.error is not None:
                raise future.error
            return
        self._running += 1
        future.callbacks.append(self._ended)

    def _ended(self, future: Future[None]) -> None:
        self._running -= 1
        if future.error is not None:  # its client will never be answered
            self.export.on_error(future.error)
            self.reason = self.reason or str(future.error)
            self.stop()
        if not self._running and self._idle is not None:
            self._idle.set()
        if self.export.budget.contended:
            self._shrink()

    async def _quiet(self) -> None:
        while self._running:
            self._idle = Future()
            await self._idle

    async def _begin(self, batch: Batch) -> None:
        """Start everything of a batch that is not only reads."""
        if batch.refusals:
            data = b"".join(reply.refused(self.machine.structured, r) for r in batch.refusals)
            self.outgoing.send([data], len(data))
        if batch.write_cookies:
            self._go(self._write(batch))
        if batch.read_cookies:
            await self._begin_reads(batch.read_cookies, batch.read_offsets, batch.read_lengths)
        for other in batch.others:
            self._go(self._other(other))

    async def _begin_reads(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Start the reads, in groups that the budget grants one after the other."""
        total = sum(lengths)
        if total <= READ_CHUNK and len(cookies) <= reply.HEADERS:
            if not self.budget.take(total):
                await self.budget.acquire(total)
            self._go(self._read(cookies, offsets, lengths, total))
            return
        at, count = 0, len(cookies)
        while at < count:
            end, total = at + 1, lengths[at]
            while end < count and end - at < reply.HEADERS and total + lengths[end] <= READ_CHUNK:
                total += lengths[end]
                end += 1
            if not self.budget.take(total):
                await self.budget.acquire(total)
            self._go(self._read(cookies[at:end], offsets[at:end], lengths[at:end], total))
            at = end

    async def _read(
        self, cookies: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int], total: int
    ) -> None:
        arena = self.export.arena(self.machine.structured)
        try:
            data = await self.node.read(offsets, lengths, arena.views(lengths, total))
        except (OSError, DiskError) as error:
            self._read_done(arena, total)
            if len(cookies) == 1:
                self._fail(c.CMD_READ, cookies[0], error)
                return
            for row in zip(cookies, offsets, lengths, strict=True):  # which of them was it?
                if not self.budget.take(row[2]):
                    await self.budget.acquire(row[2])
                await self._read((row[0],), (row[1],), (row[2],), row[2])
            return
        buffers: list[Buffer] = [b""] * (2 * len(cookies))
        buffers[0::2] = arena.headers.fill(cookies, offsets, lengths)
        buffers[1::2] = data
        size = total + len(cookies) * arena.header_size
        self.outgoing.send(buffers, size, partial(self._read_done, arena, total))

    def _read_done(self, arena: Arena, total: int) -> None:
        self.export.keep(arena)
        self.budget.release(total)

    async def _write(self, batch: Batch) -> None:
        flags = FUA if batch.fua else 0
        cookies, offsets, payloads = batch.write_cookies, batch.write_offsets, batch.payloads
        try:
            await self.node.write(offsets, payloads, flags)
        except (OSError, DiskError) as error:
            if len(cookies) == 1:
                self._fail(c.CMD_WRITE, cookies[0], error)
            else:
                for cookie, offset, payload in zip(cookies, offsets, payloads, strict=True):
                    await self._simply(
                        c.CMD_WRITE, cookie, self.node.write([offset], [payload], flags)
                    )
            batch.release()
            return
        except BaseException:
            batch.release()
            raise
        batch.release()
        data = reply.done(cookies)
        self.outgoing.send((data,), len(data))

    async def _other(self, other: Other) -> None:
        command, flags, cookie, offset, length = other
        node = self.node
        fua = flags & c.CMD_FLAG_FUA
        if command == c.CMD_FLUSH:
            await self._simply(command, cookie, node.flush())
        elif command == c.CMD_TRIM:
            await self._simply(command, cookie, self._trim(offset, length, bool(fua)))
        elif command == c.CMD_WRITE_ZEROES:
            mode = (FUA if fua else 0) | (0 if flags & c.CMD_FLAG_NO_HOLE else MAY_UNMAP)
            await self._simply(command, cookie, node.zero([offset], [length], mode))
        elif command == c.CMD_CACHE:
            await self._simply(command, cookie, self._cache(offset, length))
        else:
            try:
                found = await allocation(node, offset, length, bool(flags & c.CMD_FLAG_REQ_ONE))
            except (OSError, DiskError) as error:
                self._fail(command, cookie, error)
                return
            data = reply.block_status(cookie, found)
            self.outgoing.send([data], len(data))

    async def _trim(self, offset: int, length: int, fua: bool) -> None:
        await self.node.discard([offset], [length])
        if fua:
            await self.node.flush()

    async def _cache(self, offset: int, length: int) -> None:
        """Read it, so that the host has it; in pieces, and no further once we stop."""
        end = offset + length
        while offset < end and not self._stopping and self.outgoing.broken is None:
            piece = min(_CACHE_PIECE, end - offset)
            await self.node.read([offset], [piece])
            offset += piece
            await self.driver.turn()

    async def _simply(
        self, command: int, cookie: bytes, request: Coroutine[Any, Any, None]
    ) -> None:
        """Answer one request that has no data to return."""
        try:
            await request
        except (OSError, DiskError) as error:
            self._fail(command, cookie, error)
            return
        data = reply.done((cookie,))
        self.outgoing.send([data], len(data))

    def _fail(self, command: int, cookie: bytes, error: Exception) -> None:
        number = c.wire_errno(error)
        data = reply.failed(self.machine.structured, command, cookie, number)
        self.outgoing.send([data], len(data))
