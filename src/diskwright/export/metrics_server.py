"""An HTTP server for metrics alone, on the driver that serves the disks."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..graph.backend import Backend
from ..wire.http import HttpServer, Request, response
from .listening import listen_tcp, listen_unix
from .metrics import SIZE, TYPE, Family, clients, exported, metadata, process, requests, text
from .nbd_door import Door
from .nbd_server import Server

CLIENTS = 16
"""Clients at a time; further ones wait until one of these is answered."""
REQUEST_SECONDS = 10.0
"""How long a client may take, from its coming until it has read its answer."""
_ADDRESS = re.compile(r"(?:(\[[^\[\]/]+\]|[^\[\]:/]*):)?(\d{1,5})")
_READ = 4 << 10


class MetricsServer(Door):
    """Answers ``GET /metrics`` with what ``gather`` tells at that moment."""

    def __init__(self, driver: BaseDriver, gather: Callable[[], Iterable[Family]]) -> None:
        super().__init__(driver, CLIENTS)
        self._gather = gather
        self._clients: set[socket.socket] = set()
        self._path = ""

    def listen(self, address: str) -> list[socket.socket]:
        """Listen on ``HOST:PORT``, ``PORT`` (of this machine alone) or ``unix:PATH``.  Raises
        UsageError."""
        try:
            if address.startswith("unix:"):
                listeners = [listen_unix(address[5:])]
                self._path = address[5:]
            else:
                match = _ADDRESS.fullmatch(address)
                if match is None or int(match[2]) > 65535:
                    raise UsageError(
                        f"--metrics expects HOST:PORT, PORT or unix:PATH, not '{address}'"
                    )
                host = (match[1] or "").strip("[]") or "localhost"
                listeners = listen_tcp(host, match[2])
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"Failed to listen on {address}: {why}") from error
        self.start(*listeners)
        return listeners

    async def close(self) -> None:
        """Answer nobody any more."""
        self.stop()
        for sock in list(self._clients):
            self._give_up(sock)
        await self.shut_down()
        if self._path:
            with suppress(FileNotFoundError):
                os.unlink(self._path)

    async def _gathered(self) -> Iterable[Family]:
        return self._gather()

    async def _admit(self, sock: socket.socket) -> None:
        _ = self.driver.spawn(self._client(sock), name="metrics")

    def _give_up(self, sock: socket.socket) -> None:
        """Have its task end."""
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        self.driver.forget(sock.fileno())  # whoever waits for it hears of an error

    async def _client(self, sock: socket.socket) -> None:
        self._clients.add(sock)
        timer = self.driver.later(REQUEST_SECONDS, lambda: self._give_up(sock))
        try:
            await self._answer(sock)
        except OSError:
            pass  # the client is gone, or too slow
        finally:
            timer.cancel()
            self._clients.discard(sock)
            self.driver.forget(sock.fileno())
            sock.close()
            self._gone(True)

    async def _answer(self, sock: socket.socket) -> None:
        machine = HttpServer()
        request = None
        while request is None:
            try:
                data = sock.recv(_READ)
            except (BlockingIOError, InterruptedError):
                await self.driver.readable(sock.fileno())
                continue
            if not data:
                return
            request = machine.receive(data)
        left = memoryview(await self._response(request))
        while left:
            try:
                left = left[sock.send(left) :]
            except (BlockingIOError, InterruptedError):
                await self.driver.writable(sock.fileno())
        sock.shutdown(socket.SHUT_WR)
        # To close with bytes unread would take the answer away from the client.
        for _ in range(16):
            try:
                if not sock.recv(_READ):
                    return
            except (BlockingIOError, InterruptedError):
                await self.driver.readable(sock.fileno())

    async def _response(self, request: Request) -> bytes:
        if request.status != 200:
            return response(request, b"")
        if request.path == "/metrics":
            return response(request, text(await self._gathered()), TYPE)
        if request.path == "/":
            return response(request, b"diskwright: /metrics\n")
        return response(request._replace(status=404), b"")


def of_server(server: Server) -> Iterator[Family]:
    """What tells of the exports of ``server``, whose requests are counted where a disk was offered
    as a :class:`.Backend`, and of the process."""
    yield from clients(len(server.connections), server.admitted)
    yield from of_exports(server)


def of_exports(server: Server) -> Iterator[Family]:
    """The same without who came to the server."""
    names = {name: name.decode("utf-8", "replace") for name in server.exports}
    disks = {name: node for name, node in server.nodes.items() if isinstance(node, Backend)}
    yield from requests(
        "export",
        [({"export": names[n], "node": d.node.name}, d.stats) for n, d in disks.items()],
    )
    nodes = [disk.node for disk in disks.values()]
    labels = [({"node": node.name, "driver": node.driver_name}, node.size) for node in nodes]
    yield Family("diskwright_node_size_bytes", "gauge", SIZE, list(labels))
    yield from exported(server, names)
    if nodes:
        yield from metadata(nodes[0].graph.tables)
    yield from process()
