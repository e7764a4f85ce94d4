"""Bytes between a client's TLS connection and the process that has its export."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from ..engine.kernel import BaseDriver, Future
from ..protocols.outgoing import Outgoing
from .nbd_channel import LINGER_SECONDS
from .nbd_tls import Secured

SIZE = 64 << 10
"""Bytes that are on their way at most, in each of the two directions."""


class Relay:
    """Carries bytes between ``secured`` and ``inside`` until the other end of ``inside`` is closed
    or the client is gone, and closes both; then ``ended`` is resolved.

    A client that sends no more is still answered.
    """

    def __init__(self, driver: BaseDriver, secured: Secured, inside: socket.socket) -> None:
        self._driver, self._secured, self._inside = driver, secured, inside
        self.ended: Future[None] = Future()
        to_client = Outgoing(driver, secured.sock, lambda error: self._end())
        to_worker = Outgoing(driver, inside, lambda error: self._end())
        # What TLS took from the socket already is not announced by it.
        self._ways = (
            _Way(driver, secured.sock, secured.receive, to_worker, secured.pending),
            _Way(driver, inside, inside.recv_into, to_client, lambda: 0),
        )
        self._ways[0].start(self._no_more_requests)
        self._ways[1].start(self._no_more_replies)

    def stop(self) -> None:
        """Wait no longer than :data:`.LINGER_SECONDS` for the end."""
        self._driver.later(LINGER_SECONDS, self._end)

    def _no_more_requests(self) -> None:
        with suppress(OSError):
            self._inside.shutdown(socket.SHUT_WR)

    def _no_more_replies(self) -> None:
        self._secured.leave()
        self._end()

    def _end(self) -> None:
        if self.ended.done:
            return
        self.ended.set()
        for way, sock in zip(self._ways, (self._secured.sock, self._inside), strict=True):
            way.over = True
            self._driver.forget(sock.fileno())
            sock.close()


class _Way:
    """One direction: nothing more is taken from ``source`` before ``out`` has sent what was."""

    def __init__(
        self,
        driver: BaseDriver,
        source: socket.socket,
        receive: Callable[[memoryview], int],
        out: Outgoing,
        pending: Callable[[], int],
    ) -> None:
        self._driver, self._out, self._receive, self._pending = driver, out, receive, pending
        self.over = False
        self._fd = source.fileno()
        self._view = memoryview(bytearray(SIZE))

    def start(self, at_end: Callable[[], None]) -> None:
        """Begin; ``at_end`` is called when there is no more and all was sent."""
        self._at_end = at_end
        self._resume()

    def _resume(self) -> None:
        if not self.over:
            self._driver.watch(self._fd, self._readable)
            self._look_on()

    def _look_on(self) -> None:
        if self._pending():
            self._driver.soon(self._readable)

    def _readable(self) -> None:
        if self.over or self._out.waiting:
            return
        try:
            count = self._receive(self._view)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            self._driver.unwatch(self._fd)
            self._at_end()
        elif self._out.send((self._view[:count],), count):
            self._look_on()
        else:
            self._driver.unwatch(self._fd)
            self._out.then(self._resume)
