"""What listens for NBD clients, admits them, and knows the disks that they may choose."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..bitmaps import DirtyBitmap
from ..engine.kernel import BaseDriver, Cancelled, Future, Task
from ..engine.node import Node
from ..wire.nbd_handshake import Export
from .arena import Arena
from .budget import TOTAL_LIMIT, Budget
from .nbd_connection import Connection
from .nbd_status import contexts_of

if TYPE_CHECKING:
    from .nbd_tls import ServerTls

HANDSHAKE_SECONDS = 10.0
ARENA_SIZE = 1 << 20
"""Larger read buffers are not kept, so that idle clients cost nothing."""
ARENAS = 8
_SEND_BUFFER = 4 << 20  # the kernel lowers it to what it allows


class Server:
    """At most ``clients`` connections at a time (0: no limit), whose memory has one ``budget``.
    With ``tls`` nothing is said to a client before it has begun TLS.

    ``exports``, ``nodes`` and ``bitmaps`` (dirty bitmaps by their contexts), by name, may change
    while clients are connected.
    """

    def __init__(
        self,
        driver: BaseDriver,
        *,
        clients: int = 0,
        budget: int = TOTAL_LIMIT,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        tls: ServerTls | None = None,
    ) -> None:
        self.driver = driver
        self.clients = clients
        self.handshake_seconds = handshake_seconds
        self.tls = tls
        self.budget = Budget(budget)
        self.exports: dict[bytes, Export] = {}
        self.nodes: dict[bytes, Node] = {}
        self.bitmaps: dict[bytes, Mapping[bytes, DirtyBitmap]] = {}
        self.on_error: Callable[[BaseException], None] = lambda error: None
        """Told of failures that are not the client's and that no reply can carry."""
        self.on_left: Callable[[str], None] = lambda reason: None
        """Told why a client left."""
        self.connections: set[Connection] = set()
        self.stopping = False
        self._listener: socket.socket | None = None
        self._accepting: Task[None] | None = None
        self._changed: Future[None] | None = None
        self._room: Future[None] | None = None
        self._arenas: tuple[list[Arena], ...] = ([], [], [])  # by the form of replies
        self._served = False

    # -- exports
    def offer(
        self,
        name: bytes,
        node: Node,
        description: bytes,
        read_only: bool,
        *,
        depth: bool = False,
        bitmaps: Mapping[bytes, DirtyBitmap] | None = None,
    ) -> Export:
        """Let clients choose ``node`` under ``name``; again, to tell a new size.

        ``depth``: they may ask in which layer a range is; ``bitmaps``: what these call dirty.
        """
        found = Export(
            name,
            node.size,
            read_only,
            description,
            multi_conn=self.clients != 1,
            contexts=contexts_of(depth, bitmaps or {}),
        )
        self.exports[name], self.nodes[name], self.bitmaps[name] = found, node, bitmaps or {}
        return found

    def withdraw(self, name: bytes) -> None:
        """Let no more clients choose it; those that did go on."""
        del self.exports[name], self.nodes[name], self.bitmaps[name]

    def users(self, name: bytes) -> list[Connection]:
        """The clients that have chosen the export ``name``."""
        return [one for one in self.connections if one.chosen == name]

    # -- life
    def start(self, listener: socket.socket) -> None:
        """Accept clients of ``listener``."""
        self._listener = listener
        listener.setblocking(False)
        self._accepting = self.driver.spawn(self._accept(listener), name="nbd-accept")

    def stop(self) -> None:
        """Take no new clients and no new requests; what was read is still answered."""
        self.stopping = True
        if self._accepting is not None:
            self._accepting.cancel()
        for connection in list(self.connections):
            connection.stop()
        self._notify()

    @property
    def ended(self) -> bool:
        """Nothing is left after :meth:`stop`."""
        return not self.connections and (self._accepting is None or self._accepting.done)

    def close(self) -> None:
        """Close the listening socket, once all has ended."""
        if self._listener is not None:
            self.driver.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    async def shut_down(self) -> None:
        """Stop, wait for all to end, and close."""
        self.stop()
        while not self.ended:
            self._changed = Future()
            await self._changed
        self.close()

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
    def arena(self, mode: int) -> Arena:
        """Read buffers, used before if possible."""
        kept = self._arenas[mode]
        return kept.pop() if kept else Arena(mode)

    def keep(self, arena: Arena) -> None:
        """They are free again."""
        kept = self._arenas[arena.headers.mode]
        if arena.size <= ARENA_SIZE and len(kept) < ARENAS:
            kept.append(arena)
