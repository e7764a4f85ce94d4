"""The NBD server on a node: listens, admits clients, stops without losing anything."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Callable

from ..engine.kernel import BaseDriver, Cancelled, Future, Task
from ..engine.node import Node
from ..wire.nbd_handshake import Export
from .arena import Arena
from .budget import TOTAL_LIMIT, Budget
from .nbd_connection import Connection

HANDSHAKE_SECONDS = 10.0
BACKLOG = 128
ARENA_SIZE = 1 << 20
"""Larger read buffers are not kept, so that idle clients cost nothing."""
ARENAS = 8
_SEND_BUFFER = 4 << 20  # the kernel lowers it to what it allows


class NbdExport:
    """Serves ``node`` under ``name`` to at most ``clients`` at a time (0: no limit).

    Further clients wait in the listening socket's queue.  Unless ``persistent`` it ends when the
    last client that finished its handshake has left.
    """

    def __init__(
        self,
        driver: BaseDriver,
        node: Node,
        *,
        name: bytes = b"",
        description: bytes = b"",
        read_only: bool = False,
        clients: int = 1,
        persistent: bool = False,
        budget: int = TOTAL_LIMIT,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self.driver = driver
        self.node = node
        self.clients = clients
        self.persistent = persistent
        self.handshake_seconds = handshake_seconds
        self.budget = Budget(budget)
        self.on_error: Callable[[BaseException], None] = lambda error: None
        """Told of failures that are not the client's and that no reply can carry."""
        self.description = Export(
            name,
            node.size,
            read_only or node.read_only,
            description,
            multi_conn=clients != 1,
        )
        self.on_left: Callable[[str], None] = lambda reason: None
        """Told why a client left."""
        self.connections: set[Connection] = set()
        self.stopping = False
        self._listener: socket.socket | None = None
        self._accepting: Task[None] | None = None
        self._changed: Future[None] | None = None
        self._room: Future[None] | None = None
        self._arenas: dict[bool, list[Arena]] = {False: [], True: []}
        self._served = False

    async def serve(self, listener: socket.socket) -> None:
        """Accept clients of ``listener`` (closed at the end) until there is no more to do, then
        flush the node."""
        self._listener = listener
        listener.setblocking(False)
        self._accepting = self.driver.spawn(self._accept(listener), name="nbd-accept")
        try:
            while not self._finished():
                self._changed = Future()
                await self._changed
        finally:
            self.stop()
            while self.connections or not self._accepting.done:
                self._changed = Future()
                try:
                    await self._changed
                except Cancelled:
                    continue
            self.driver.forget(listener.fileno())
            listener.close()
        if not self.description.read_only:
            await self.node.flush()

    def stop(self) -> None:
        """Take no new clients and no new requests; what was read is still answered."""
        self.stopping = True
        if self._accepting is not None:
            self._accepting.cancel()
        for connection in list(self.connections):
            connection.stop()
        self._notify()

    def _finished(self) -> bool:
        return self.stopping or (self._served and not self.persistent and not self.connections)

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()

    async def _accept(self, listener: socket.socket) -> None:
        try:
            while True:
                while self.clients and len(self.connections) >= self.clients:
                    self._room = Future()
                    await self._room
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                    await self.driver.readable(listener.fileno())
                    continue
                except OSError:  # no descriptors left: wait until a client has gone
                    await self.driver.sleep(0.1)
                    continue
                self._admit(sock)
        except Cancelled:
            pass
        finally:
            self.driver.soon(self._notify)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sys.platform != "win32" and sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(self, sock)
        self.connections.add(connection)
        connection.ended.callbacks.append(lambda _: self._left(connection))
        connection.start()

    def _left(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.on_left(connection.reason)
        self._served = self._served or connection.negotiated
        if self._room is not None:
            self._room.set()
        self._notify()

    # -- buffers that all clients use again
    def arena(self, structured: bool) -> Arena:
        """Read buffers, used before if possible."""
        kept = self._arenas[structured]
        return kept.pop() if kept else Arena(structured)

    def keep(self, arena: Arena) -> None:
        """They are free again."""
        kept = self._arenas[arena.headers.structured]
        if arena.size <= ARENA_SIZE and len(kept) < ARENAS:
            kept.append(arena)


if sys.platform == "win32":

    def listen_unix(path: str) -> socket.socket:
        """Python has no unix sockets there: raises OSError (``EAFNOSUPPORT``)."""
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

else:

    def listen_unix(path: str) -> socket.socket:
        """A listening socket that appears under ``path`` only once it can be connected to.

        A socket that is there already and that nobody listens to is replaced, any other file is not
        (``EADDRINUSE``).
        """
        temporary = os.path.join(os.path.dirname(path), f".nbd{os.getpid():x}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(temporary)
            try:
                listener.listen(BACKLOG)
                _take_name(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except BaseException:
            listener.close()
            raise
        return listener

    def _take_name(temporary: str, path: str) -> None:
        try:
            os.link(temporary, path)  # unlike a rename this cannot take a name away from anybody
        except FileExistsError:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.rename(temporary, path)
                    return
            raise
        os.unlink(temporary)


def listen_tcp(address: str, port: int | str) -> socket.socket:
    """A listening TCP socket on ``address`` (a name or a number; empty for all) and ``port`` (a
    number or a service's name)."""
    found = socket.getaddrinfo(
        address or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, proto, _, where = found[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
