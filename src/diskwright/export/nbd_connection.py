"""One NBD client: what its socket holds is parsed, mapped, moved and answered as one batch.

The way of a batch that waits for nothing is one call from the driver's poll to the reply: no task
and no future but the one that says that the node was done at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..bitmaps import DirtyBitmap
from ..contract import FUA
from ..engine.kernel import Cancelled, Future, Task, Timer
from ..engine.node import Buffer, Node
from ..errors import DiskError
from ..protocols.outgoing import Outgoing
from ..wire import nbd_const as c
from ..wire import nbd_reply as reply
from ..wire.nbd_batch import Batch, Other, ReceiveBuffer
from ..wire.nbd_server import BUFFER_SIZE, NbdServer
from .arena import Arena
from .budget import CLIENT_LIMIT, Budget
from .nbd_requests import groups, perform, status

if TYPE_CHECKING:
    from .nbd_server import Server
    from .nbd_tls import Secured, ServerTls

READ_GROUP = 4 << 20
"""Reads of one batch are carried out in groups of about so many bytes."""
LINGER_SECONDS = 30.0
"""How long a client that leaves or is stopped may take to read its last replies."""
STALL_SECONDS = 30.0
"""How long a client may read none of its replies while others wait for the memory they take."""


class Connection:
    """Serves ``sock`` (nonblocking) until the client leaves or :meth:`stop` is called; ``ended``
    is resolved when nothing of it is left."""

    def __init__(self, export: Server, sock: socket.socket) -> None:
        self.export = export
        self.node: Node
        self.bitmaps: Mapping[bytes, DirtyBitmap]
        self.chosen: bytes | None = None
        self.driver = export.driver
        self.sock = sock
        self.fd = sock.fileno()
        self.machine = NbdServer(export.exports, ReceiveBuffer(BUFFER_SIZE), bool(export.tls))
        self.outgoing = Outgoing(self.driver, sock, lambda error: self.stop(str(error)))
        self.budget = Budget(CLIENT_LIMIT, export.budget)
        self.negotiated = False
        self.reason = ""
        self.ended: Future[None] = Future()
        self._receive: Callable[[memoryview], int] = sock.recv_into
        self._secured: Secured | None = None
        self._reading = False
        self._closer: Task[None] | None = None
        self._feeder: Task[None] | None = None  # what the client must wait for
        self._running = 0
        self._idle: Future[None] | None = None
        self._stall: Timer | None = None
        self._held = BUFFER_SIZE  # bytes of the receive buffer that the budget counts
        self.budget.take(BUFFER_SIZE)

    # -- life
    def start(self) -> None:
        """Begin."""
        self.export.budget.reclaim.add(self._give_back)
        self._timer = self.driver.later(self.export.handshake_seconds, self._too_slow)
        self._send_handshake()
        self._resume()

    def stop(self, reason: str = "stopped") -> None:
        """Read no more requests; those that were read are carried out and answered."""
        if self._closer is None:
            self.reason = reason
            self._pause()
            if self._feeder is not None:
                self._feeder.cancel()
            self._closer = self.driver.spawn(self._close(), name="nbd-close")

    async def _close(self) -> None:
        self._timer.cancel()
        timer = self.driver.later(LINGER_SECONDS, self.outgoing.abandon)
        while self._running:
            self._idle = Future()
            await self._idle
        await self.outgoing.drained()
        timer.cancel()
        if self._stall is not None:
            self._stall.cancel()
        self.export.budget.reclaim.discard(self._give_back)
        self.budget.release(self._held)
        self.driver.forget(self.fd)
        if self._secured is not None:
            self._secured.leave()
        self.sock.close()
        self.ended.set()

    def _too_slow(self) -> None:
        if not self.negotiated:
            self.stop("the handshake took too long")

    def _send_handshake(self) -> None:
        data = b"".join(self.machine.take())
        if data:
            self.outgoing.send((data,), len(data))
        if self.machine.export is not None:
            self.negotiated = True
            self.chosen = self.machine.export.name
            self.node = self.export.nodes[self.chosen]
            self.bitmaps = self.export.bitmaps[self.chosen]

    # -- receiving
    def _pause(self) -> None:
        self._reading = False
        self.driver.unwatch(self.fd)

    def _resume(self) -> None:
        if self._closer is None:
            self._reading = True
            self.driver.watch(self.fd, self._readable)
            self._look_on()

    def _look_on(self) -> None:
        """What TLS took from the socket already is not announced by it."""
        if self._secured is not None and self._reading and self._secured.pending():
            self.driver.soon(self._readable)

    async def _secure(self, tls: ServerTls) -> None:
        """Begin TLS; what was agreed on before counts no more."""
        from .nbd_tls import Secured

        await self.outgoing.drained()
        self.driver.forget(self.fd)
        secured = Secured(tls, self.sock)
        self.sock = secured.sock
        await secured.shake_hands(self.driver, self.export.handshake_seconds)
        self._secured, self._receive = secured, secured.receive
        self.outgoing = Outgoing(self.driver, self.sock, self.outgoing.on_broken)
        self.machine.secured()

    def _readable(self) -> None:
        """There is something to receive, or the client is gone."""
        if not self._reading:
            return
        machine = self.machine
        space = machine.space()
        if space is None:
            self._feed(self._grow(machine.wanted))
            return
        try:
            count = self._receive(space)
            if not count:
                self.stop("the client closed the connection")
                return
            batch = machine.received(count)
            if machine.handshake is not None:
                self._send_handshake()
                if machine.upgrade and not machine.closed and self.export.tls is not None:
                    self._feed(self._secure(self.export.tls))
                    return
            if batch is not None:
                self._begin(batch)
            if machine.closed:
                self.stop(machine.closed)
            elif self._held > BUFFER_SIZE and self.export.budget.contended:
                self._shrink()
            self._look_on()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.stop(str(error))
        except Exception as error:
            self._failed(error)

    def _feed(self, coro: Coroutine[Any, Any, None]) -> None:
        """Read on only after ``coro``."""
        self._pause()
        self._feeder = self.driver.spawn(coro, name="nbd-wait")
        self._feeder.callbacks.append(self._fed)
        self._running += 1

    def _fed(self, task: Future[None]) -> None:
        self._feeder = None
        if isinstance(task.error, OSError):
            self.stop(str(task.error))
        self._resume()
        if isinstance(task.error, Cancelled):
            task.error = None
        self._finished(task)

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

    def _give_back(self) -> None:
        """Others wait for the budget."""
        self._shrink()
        if self._stall is None and self.outgoing.waiting:
            left = self.outgoing.moved + STALL_SECONDS - self.driver.now()
            self._stall = self.driver.later(max(left, 0.0), self._look_at_stall)

    def _look_at_stall(self) -> None:
        self._stall = None
        if not (self.budget.others_wait and self.outgoing.waiting):
            return
        if self.driver.now() - self.outgoing.moved >= STALL_SECONDS:
            self.outgoing.abandon()
        else:
            self._give_back()

    def _shrink(self) -> None:
        """Give a large receive buffer back, if it is not in use."""
        machine = self.machine
        if self._held > BUFFER_SIZE and machine.idle and not machine.buffer.users:
            machine.replace(ReceiveBuffer(BUFFER_SIZE))
            held, self._held = self._held, BUFFER_SIZE
            self.budget.release(held - BUFFER_SIZE)

    # -- carrying out
    def _later(self, work: Future[Any], then: Callable[[Future[Any]], None]) -> None:
        """Call ``then`` when ``work`` has ended; the connection stays until it has."""
        self._running += 1
        work.callbacks.append(partial(self._complete, then))

    def _complete(self, then: Callable[[Future[Any]], None], work: Future[Any]) -> None:
        try:
            then(work)
        except Exception as error:
            self._failed(error)
        self._finished(work)

    def _finished(self, work: Future[Any]) -> None:
        self._running -= 1
        if not self._running and self._idle is not None:
            self._idle.set()
        if self._held > BUFFER_SIZE and self.export.budget.contended:
            self._shrink()
        if work.error is not None and not isinstance(work.error, (OSError, DiskError)):
            self._failed(work.error)

    def _failed(self, error: BaseException) -> None:
        """Not the client's fault, but it would wait in vain for an answer."""
        self.export.on_error(error)
        self.stop(repr(error))

    def _begin(self, batch: Batch) -> None:
        if batch.read_cookies:
            lengths = batch.read_lengths
            total = sum(lengths)
            if total <= READ_GROUP and len(lengths) <= reply.HEADERS and self.budget.take(total):
                self._read(batch.read_cookies, batch.read_offsets, lengths, total)
            else:
                self._feed(self._read_groups(batch))
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
            self.outgoing.send((data,), len(data))
        for other in batch.others:
            self._go(self._other(other))

    def _go(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine of our own beside what follows."""
        work = self.driver.start(coro, io=True)
        if not work.done:
            self._running += 1
            work.callbacks.append(self._finished)
        elif work.error is not None:
            raise work.error

    # -- reads
    async def _read_groups(self, batch: Batch) -> None:
        """Reads that the budget must grant group by group."""
        cookies, offsets, lengths = batch.read_cookies, batch.read_offsets, batch.read_lengths
        for at, end, total in groups(lengths, READ_GROUP, reply.HEADERS):
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
            self.outgoing.send((data,), len(data))
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
                    self.outgoing.send((data,), len(data))
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
            self.outgoing.send((data,), len(data))

    def _refuse(self, command: int, cookie: bytes, offset: int, error: BaseException) -> None:
        data = reply.failed(self.machine.mode, command, cookie, c.wire_errno(error), offset)
        self.outgoing.send((data,), len(data))
