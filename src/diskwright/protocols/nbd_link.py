"""One connection to an NBD server: flights out by one system call, answers in as they come."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial

from ..engine.kernel import BaseDriver, Future, Timer
from ..errors import PeerError
from ..wire.nbd_client import NbdClient
from ..wire.nbd_flight import Flight
from ..wire.nbd_negotiation import readable
from .nbd_connect import Established, tls_wants
from .outgoing import Outgoing

_ROUNDS = 16
"""Receives in one turn, before others have theirs."""
_LINGER_SECONDS = 5.0
"""How long the last request may take to leave."""


class Trip(Flight):
    """A flight that somebody waits for.

    ``done`` is resolved when it is answered and nothing of it is on its way any more, so that its
    buffers are its owner's again; with an error when the connection was lost before."""

    __slots__ = ("done", "sent")

    def reset(self) -> None:
        """To be sent, for the first time or once more."""
        super().reset()
        self.done: Future[None] = Future()
        self.sent = False


class Link:
    """An established connection.  ``lost`` is why it ended, once it has; ``on_lost`` is told."""

    def __init__(
        self,
        driver: BaseDriver,
        established: Established,
        peer: str,
        timeout: float,
        on_lost: Callable[[Link], None],
    ) -> None:
        self.driver = driver
        self.sock, self.agreed = established.sock, established.agreed
        self.peer, self.timeout, self.on_lost = peer, timeout, on_lost
        self.export = readable(established.negotiation.export)
        self.machine = NbdClient(self.agreed)
        self.trips: set[Trip] = set()
        self.lost: PeerError | None = None
        self.load = 0
        """Bytes that are asked for and not answered."""
        self._fd = self.sock.fileno()
        self._outgoing = Outgoing(driver, self.sock, self._broken)
        self._gathers = sys.platform != "win32" and not self.agreed.tls
        self._receive = _gatherer(self.sock) if self._gathers else self._take
        self._moved = driver.now()
        self._watchdog: Timer | None = None
        driver.watch(self._fd, self._readable)

    # -- requests
    def submit(self, trip: Trip) -> None:
        """Send ``trip``."""
        if self.lost is not None:
            trip.done.set(error=self.lost)
            return
        if not self.trips:
            self._moved = self.driver.now()
        self.trips.add(trip)
        self.load += sum(trip.lengths)
        buffers = self.machine.request(trip)
        if self._outgoing.send(buffers, sum(map(len, buffers))):
            trip.sent = True
        else:
            self._outgoing.then(partial(self._sent, trip))
        if self.timeout and self._watchdog is None and self.trips:
            self._watchdog = self.driver.later(self.timeout, self._watch)

    def abandon(self, trip: Trip) -> None:
        """Nobody waits for a read any more: its answer goes nowhere."""
        if trip in self.trips:
            self.machine.detach(trip)

    def _sent(self, trip: Trip) -> None:
        trip.sent = True
        if not trip.left:
            self._ended(trip)

    def _ended(self, trip: Trip) -> None:
        if trip in self.trips:
            self.trips.remove(trip)
            self.load -= sum(trip.lengths)
        trip.done.set()

    # -- answers
    def _readable(self) -> None:
        machine = self.machine
        try:
            for _ in range(_ROUNDS):
                space = machine.space()
                count = self._receive(space)
                if not count:
                    self.lose("closed by the server", errno.ECONNRESET)
                    return
                for flight in machine.received(count):
                    assert isinstance(flight, Trip)
                    if flight.sent:
                        self._ended(flight)
                if self._gathers and count < sum(map(len, space)):
                    break
            else:
                # More may wait, which TLS has taken from the socket already.
                self.driver.soon(self._more)
        except (BlockingIOError, InterruptedError):
            pass
        except PeerError as error:
            self.lose(error.detail, error.errno or errno.EPROTO)
        except OSError as error:
            if tls_wants(error) < 0:
                self.lose(error.strerror or str(error), error.errno or errno.ECONNRESET)
        self._moved = self.driver.now()

    def _take(self, views: Sequence[memoryview]) -> int:
        return self.sock.recv_into(views[0])

    def _more(self) -> None:
        if self.lost is None:
            self._readable()

    def _watch(self) -> None:
        """Whether the server has been silent for too long."""
        self._watchdog = None
        if self.lost is None and self.trips:
            left = self._moved + self.timeout - self.driver.now()
            if left <= 0:
                self.lose(f"nothing was answered for {self.timeout:g} seconds", errno.ETIMEDOUT)
            else:
                self._watchdog = self.driver.later(left, self._watch)

    # -- the end
    def _broken(self, error: Exception) -> None:
        number = error.errno if isinstance(error, OSError) else None
        self.lose(getattr(error, "strerror", None) or str(error), number or errno.ECONNRESET)

    def part(self, why: str, number: int) -> None:
        """End it as :meth:`lose` does, with a word to the server if that needs no waiting."""
        if self.lost is None:
            leaving = self.machine.leaving()
            self._outgoing.send((leaving,), len(leaving))
            self.lose(why, number)

    def lose(self, why: str, number: int) -> None:
        """End it: what was not answered never will be."""
        if self.lost is not None:
            return
        self.lost = self._gone(f"the connection was lost: {why}", number)
        self._shut()
        self.on_lost(self)
        self._give_up()

    def _gone(self, why: str, number: int) -> PeerError:
        return PeerError(why, number, peer=self.peer, export=self.export)

    def _shut(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._outgoing.abandon()
        self.driver.unwatch(self._fd)
        self.driver.forget(self._fd)
        self.sock.close()

    async def close(self) -> None:
        """Take leave of the server."""
        if self.lost is not None:
            return
        leaving = self.machine.leaving()
        self._outgoing.send((leaving,), len(leaving))
        timer = self.driver.later(_LINGER_SECONDS, self._outgoing.abandon)
        try:
            await self._outgoing.drained()
        finally:
            timer.cancel()
            if self.lost is None:
                self.lost = self._gone("the connection was closed", errno.ESHUTDOWN)
                self._shut()
                self._give_up()

    def _give_up(self) -> None:
        """Tell all who wait that nothing comes any more."""
        trips, self.trips = self.trips, set()
        for trip in trips:
            trip.done.set(error=self.lost)

    def drop(self) -> None:
        """In a forked child: its copy of the socket goes, nothing is said to the server."""
        self.lost = self._gone("the process was forked", errno.ESHUTDOWN)
        self.sock.close()


if sys.platform == "win32":

    def _gatherer(sock: socket.socket) -> Callable[[Sequence[memoryview]], int]:
        """There is no call that scatters what it receives."""
        raise NotImplementedError

else:

    def _gatherer(sock: socket.socket) -> Callable[[Sequence[memoryview]], int]:
        """Receives into views, one after the other."""
        return lambda views: sock.recvmsg_into(views)[0]
