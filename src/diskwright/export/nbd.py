"""The NBD server on a node: listens, admits clients, stops without losing anything."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..bitmaps import DirtyBitmap
from ..engine.kernel import BaseDriver, Cancelled, Future
from ..engine.node import Node
from .budget import TOTAL_LIMIT
from .nbd_server import HANDSHAKE_SECONDS, Server

if TYPE_CHECKING:
    from .nbd_tls import ServerTls

BACKLOG = 128


class NbdExport(Server):
    """Serves ``node`` under ``name`` to at most ``clients`` at a time (0: no limit).

    Further clients wait in the listening socket's queue.  Unless ``persistent`` it ends when the
    last client that finished its handshake has left.  ``depth`` and ``bitmaps``: see
    :meth:`.Server.offer`.
    """

    def __init__(
        self,
        driver: BaseDriver,
        node: Node,
        *,
        name: bytes = b"",
        description: bytes = b"",
        read_only: bool = False,
        depth: bool = False,
        bitmaps: Mapping[bytes, DirtyBitmap] | None = None,
        clients: int = 1,
        persistent: bool = False,
        budget: int = TOTAL_LIMIT,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        tls: ServerTls | None = None,
    ) -> None:
        super().__init__(
            driver, clients=clients, budget=budget, handshake_seconds=handshake_seconds, tls=tls
        )
        self.node = node
        self.persistent = persistent
        self.description = self.offer(
            name,
            node,
            description,
            read_only or node.read_only,
            depth=depth,
            bitmaps=bitmaps,
        )

    async def serve(self, listener: socket.socket) -> None:
        """Accept clients of ``listener`` (closed at the end) until there is no more to do, then
        flush the node."""
        self.start(listener)
        try:
            while not self._finished():
                self._changed = Future()
                await self._changed
        finally:
            self.stop()
            while not self.ended:
                self._changed = Future()
                try:
                    await self._changed
                except Cancelled:
                    continue
            self.close()
        if not self.description.read_only:
            await self.node.flush()

    def _finished(self) -> bool:
        return self.stopping or (self._served and not self.persistent and not self.connections)


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
