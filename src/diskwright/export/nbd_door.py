"""The door of an NBD server: lets clients of listening sockets in, and knows when to close."""

from __future__ import annotations

import socket
import sys

from ..engine.kernel import BaseDriver, Cancelled, Future, Task
from ..protocols.nbd_connect import tune

_SEND_BUFFER = 4 << 20  # the kernel lowers it to what it allows


class Door:
    """At most ``clients`` at a time (0: no limit); further ones wait in the sockets' queues.

    :meth:`serve` ends after :meth:`stop`; unless ``persistent`` also when the last client that
    finished its handshake has left.
    """

    def __init__(self, driver: BaseDriver, clients: int = 0, persistent: bool = True) -> None:
        self.driver = driver
        self.clients = clients
        self.persistent = persistent
        self.keep_alive = True
        """Whether silent TCP connections are probed."""
        self.stopping = False
        self.admitted = 0
        """How many clients have come."""
        self._inside = 0
        self._served = False
        self._listeners: list[socket.socket] = []
        self._accepting: list[Task[None]] = []
        self._changed: Future[None] | None = None
        self._room: Future[None] | None = None

    def start(self, *listeners: socket.socket) -> None:
        """Let clients of ``listeners`` in."""
        for listener in listeners:
            listener.setblocking(False)
            self._listeners.append(listener)
            self._accepting.append(self.driver.spawn(self._accept(listener), name="nbd-accept"))

    async def serve(self, *listeners: socket.socket) -> None:
        """Let clients of ``listeners`` in until there is no more to do; they are closed then."""
        self.start(*listeners)
        try:
            while not (self.stopping or self._done):
                await self._change()
        finally:
            await self.shut_down()

    def stop(self) -> None:
        """Let nobody in any more."""
        self.stopping = True
        for task in self._accepting:
            task.cancel()
        self._notify()

    async def shut_down(self) -> None:
        """Stop, wait for all to end, and close."""
        self.stop()
        while self._busy:
            try:
                await self._change()
            except Cancelled:
                continue
        for listener in self._listeners:
            self.driver.forget(listener.fileno())
            listener.close()
        self._listeners.clear()

    @property
    def _busy(self) -> bool:
        """Something goes on that the end waits for."""
        return bool(self._inside) or not all(task.done for task in self._accepting)

    @property
    def _done(self) -> bool:
        return self._served and not self.persistent and not self._inside

    async def _wait_for_room(self) -> None:
        while self.clients and self._inside >= self.clients:
            if self._room is None:
                self._room = Future()
            await self._room

    async def _admit(self, sock: socket.socket) -> None:
        """A client has come; :meth:`_gone` is called when it has left.  The next one is let in
        after this."""
        raise NotImplementedError

    def _gone(self, served: bool) -> None:
        """A client has left, which had finished its handshake or not."""
        self._inside -= 1
        self._served = self._served or served
        if self._room is not None:
            self._room.set()
            self._room = None
        self._notify()

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = Future()
        await self._changed

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                await self._wait_for_room()
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    await self.driver.readable(listener.fileno())
                    continue
                except OSError:  # no descriptors left: wait until a client has gone
                    await self.driver.sleep(0.1)
                    continue
                prepare(sock, self.keep_alive)
                self._inside += 1
                self.admitted += 1
                try:
                    await self._admit(sock)
                except Cancelled:
                    sock.close()
                    self._gone(False)
                    raise
        except Cancelled:
            pass
        finally:
            self.driver.soon(self._notify)


def prepare(sock: socket.socket, keep_alive: bool = True) -> None:
    """Set up a connection."""
    sock.setblocking(False)
    if sys.platform != "win32" and sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    else:
        tune(sock, keep_alive)
