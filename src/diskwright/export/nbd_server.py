"""What serves NBD clients, and knows the disks that they may choose."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..bitmaps import DirtyBitmap
from ..engine.kernel import BaseDriver
from ..engine.node import Node
from ..wire.nbd_handshake import Export
from ..wire.nbd_server import BUFFER_SIZE
from .arena import Arena
from .budget import TOTAL_LIMIT, Budget
from .nbd_connection import Connection
from .nbd_door import Door
from .nbd_status import block_of, contexts_of

if TYPE_CHECKING:
    from .nbd_tls import ServerTls

HANDSHAKE_SECONDS = 10.0
ARENA_SIZE = 2 << 20
"""Larger read buffers are not kept, so that idle clients cost little.  Fresh memory costs more than
the reading; clients that copy disks ask for up to 2 MiB at a time."""
ARENAS = 8


class Server(Door):
    """At most ``clients`` connections at a time (0: as many as half of ``budget`` has receive
    buffers for), whose memory has one ``budget`` in bytes.  With ``tls`` nothing is said to a
    client before it has begun TLS.  ``persistent``: see :class:`.Door`.

    ``exports``, ``nodes`` and ``bitmaps`` (dirty bitmaps by their contexts), by name, may change
    while clients are connected.
    """

    def __init__(
        self,
        driver: BaseDriver,
        *,
        clients: int = 0,
        persistent: bool = True,
        budget: int = TOTAL_LIMIT,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        tls: ServerTls | None = None,
    ) -> None:
        most = max(1, budget // BUFFER_SIZE // 2)
        super().__init__(driver, min(clients or most, most), persistent)
        self.handshake_seconds = handshake_seconds
        self.tls = tls
        self.budget = Budget(budget)
        self.exports: dict[bytes, Export] = {}
        self.nodes: dict[bytes, Node] = {}
        self.bitmaps: dict[bytes, Mapping[bytes, DirtyBitmap]] = {}
        self.on_error: Callable[[BaseException], None] = lambda error: None
        """Told of failures that are not the client's and that no reply can carry."""
        self.on_left: Callable[[str], None] = lambda reason: None
        """Told why a client left that did not say so."""
        self.connections: set[Connection] = set()
        self._arenas: tuple[list[Arena], ...] = ([], [], [])  # by the form of replies

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
            min_block=block_of(node),
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
    async def serve(self, *listeners: socket.socket) -> None:
        """Serve clients of ``listeners`` until there is no more to do, then flush the disks."""
        await super().serve(*listeners)
        await self.flush()

    def stop(self) -> None:
        """Take no new clients and no new requests; what was read is still answered."""
        super().stop()
        for connection in list(self.connections):
            connection.stop()

    async def flush(self) -> None:
        """Flush every disk that clients could write to."""
        for name, node in self.nodes.items():
            if not self.exports[name].read_only:
                await node.flush()

    async def _admit(self, sock: socket.socket) -> None:
        await self._connected(Connection(self, sock))

    async def _connected(self, connection: Connection) -> None:
        if not connection.budget.take(BUFFER_SIZE):
            await connection.budget.acquire(BUFFER_SIZE)
        self.connections.add(connection)
        connection.ended.callbacks.append(lambda _: self._left(connection))
        connection.start()

    def _left(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not connection.machine.clean:
            self.on_left(connection.reason)
        self._gone(connection.negotiated)

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
