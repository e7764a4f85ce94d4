"""The socket of one NBD client: what comes is received within the byte budget and parsed, what is
answered leaves, and it ends when nothing is left to be done.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from ..engine.kernel import Cancelled, Future, Task, Timer
from ..errors import DiskError
from ..protocols.outgoing import Outgoing
from ..wire.nbd_batch import Batch, ReceiveBuffer
from ..wire.nbd_server import BUFFER_SIZE, NbdServer
from .budget import CLIENT_LIMIT, Budget

if TYPE_CHECKING:
    from .nbd_server import Server
    from .nbd_tls import Secured, ServerTls

LINGER_SECONDS = 30.0
"""How long a client that leaves or is stopped may take to read its last replies."""
STALL_SECONDS = 30.0
"""How long a client may move nothing while others wait for the memory that it takes."""
MOST_RUNNING = 32
"""Works of one client (each for a whole batch, where that is possible) that go on at a time."""
MOST_OWED = 1 << 20
"""Bytes of replies beside the data of reads that may wait for a client to read them."""


def _ignore(error: Exception) -> None:
    """Nothing is sent any more."""


class Channel:
    """Receives from ``sock`` (nonblocking) until the client leaves or :meth:`stop` is called;
    ``ended`` is resolved when nothing of it is left."""

    def __init__(self, export: Server, sock: socket.socket) -> None:
        self.export = export
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
        self._eased: Future[None] | None = None
        self._owed = 0
        self._stall: Timer | None = None
        self._heard = 0.0  # when a part of a large message came last
        self._held = BUFFER_SIZE  # bytes of the receive buffer that the budget counts

    def _begin(self, batch: Batch) -> None:
        """Carry out what was received."""
        raise NotImplementedError

    # -- life
    def start(self) -> None:
        """Begin, once :data:`BUFFER_SIZE` bytes of ``budget`` were taken for it."""
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
        # The collector runs seldom in a server: nothing large and no circle is left to it.
        self.machine.buffer = ReceiveBuffer(0)
        self.outgoing.on_broken = _ignore
        self.ended.set()

    def _too_slow(self) -> None:
        if not self.negotiated:
            self.stop("the handshake took too long")

    def _send_handshake(self) -> None:
        data = b"".join(self.machine.take())
        if data:
            self._answer(data)
        self.negotiated = self.machine.export is not None

    def _answer(self, data: bytes) -> None:
        """Send what no budget was taken for."""
        if not self.outgoing.send((data,), len(data)):
            self._owed += len(data)
            self.outgoing.then(partial(self._answered, len(data)))

    def _answered(self, count: int) -> None:
        self._owed -= count

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
        self.go_on(secured)
        self.machine.secured()

    def go_on(self, secured: Secured) -> None:
        """Receive and send over ``secured`` from now on."""
        self.sock, self._secured, self._receive = secured.sock, secured, secured.receive
        self.outgoing = Outgoing(self.driver, self.sock, self.outgoing.on_broken)

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
            if self._held > BUFFER_SIZE:
                self._heard = self.driver.now()
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
            if (self._running or self._owed) and self._loaded() and self._feeder is None:
                self._feed(self._ease())
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

    # -- memory
    def _loaded(self) -> bool:
        """Enough goes on for this client, or it does not read what was answered."""
        return self._running >= MOST_RUNNING or self._owed > MOST_OWED

    async def _ease(self) -> None:
        """Until that is over."""
        while self._running > MOST_RUNNING:  # this is one of them
            self._eased = Future()
            await self._eased
        if self._owed > MOST_OWED:
            await self.outgoing.drained()

    async def _grow(self, size: int) -> None:
        """Go on in a receive buffer of ``size`` bytes, once the budget allows it, or in the one
        that there is, once that can be used again."""
        machine = self.machine
        if not self.budget.take(size):
            before = machine.buffer
            if before.users:
                before.freed = self._freed
            else:
                self._freed()
            try:
                await self.budget.acquire(size)
            finally:
                before.freed = None
        old, held = machine.replace(ReceiveBuffer(size)), self._held
        self._held, self._heard = size, self.driver.now()
        if old.users:
            old.freed = partial(self.budget.release, held)
        else:
            self.budget.release(held)

    def _freed(self) -> None:
        """The receive buffer is not in use any more while another one is waited for: clients must
        not wait for each other's."""
        if self._feeder is None:
            return
        machine = self.machine
        if machine.space() is not None:
            self._feeder.cancel()
        elif self._held > max(machine.left, BUFFER_SIZE):
            self._take_smaller(max(machine.left, BUFFER_SIZE))

    def _give_back(self) -> None:
        """Others wait for the budget."""
        self._shrink()
        if self._stall is None:
            since = self._still()
            left = 0.0 if since is None else since - self.driver.now()
            self._stall = self.driver.later(max(left + STALL_SECONDS, 0.0), self._look_at_stall)

    def _still(self) -> float | None:
        """Since when the client has moved nothing of what takes memory; None: that is not so."""
        if self.outgoing.waiting:
            return self.outgoing.moved
        if self._held > BUFFER_SIZE and self._reading and not self.machine.idle:
            return self._heard
        return None

    def _look_at_stall(self) -> None:
        self._stall = None
        if not self.budget.others_wait or self._closer is not None:
            return
        since = self._still()
        if since is None or self.driver.now() - since < STALL_SECONDS:
            self._give_back()
        elif self.outgoing.waiting:
            self.outgoing.abandon()
        else:
            self.stop("the other side does not send what it began")

    def _shrink(self) -> None:
        """Give a large receive buffer back, if it is not in use."""
        machine = self.machine
        if self._held > BUFFER_SIZE and machine.idle and not machine.buffer.users:
            self._take_smaller(BUFFER_SIZE)

    def _take_smaller(self, size: int) -> None:
        self.machine.replace(ReceiveBuffer(size))
        held, self._held = self._held, size
        self.budget.release(held - size)

    # -- works that go on
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

    def _go(self, coro: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine of our own beside what follows."""
        work = self.driver.start(coro, io=True)
        if not work.done:
            self._running += 1
            work.callbacks.append(self._finished)
        elif work.error is not None:
            raise work.error

    def _finished(self, work: Future[Any]) -> None:
        self._running -= 1
        if not self._running and self._idle is not None:
            self._idle.set()
        if self._eased is not None:
            self._eased.set()
            self._eased = None
        if self._held > BUFFER_SIZE and self.export.budget.contended:
            self._shrink()
        if work.error is not None and not isinstance(work.error, (OSError, DiskError)):
            self._failed(work.error)

    def _failed(self, error: BaseException) -> None:
        """Not the client's fault, but it would wait in vain for an answer."""
        self.export.on_error(error)
        self.stop(repr(error))
