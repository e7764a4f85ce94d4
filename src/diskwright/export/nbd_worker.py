"""The server of a worker process, whose clients come from a :class:`.Front`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from ..engine.kernel import BaseDriver, Cancelled, Task
from ..wire.nbd_handshake import Export
from .metrics import Family
from .nbd_connection import Connection
from .nbd_door import prepare
from .nbd_greeting import Agreed, Greeting
from .nbd_messages import Messages
from .nbd_server import Server


class WorkerServer(Server):
    """Serves the clients that come through ``channel``, until the front closes it; see
    :mod:`.nbd_front`.  ``clients`` is how many the front lets in; ``options`` are the server's.

    ``gather`` tells its metrics.
    """

    def __init__(
        self, driver: BaseDriver, channel: socket.socket, clients: int, **options: Any
    ) -> None:
        super().__init__(driver, clients=clients, **options)
        self.gather: Callable[[], Iterable[Family]] = lambda: ()
        self._messages = Messages(driver, channel)
        self._choices: Mapping[bytes, Export] = {}
        """What clients that are greeted here may choose: the exports of all workers."""
        self._coming: set[Task[None]] = set()
        self._relayed: set[Connection] = set()
        self._relays: set[Any] = set()

    async def fail(self, why: str) -> None:
        """Tell the front why there are no exports."""
        await self._say("failed", why)

    async def serve_handed(self) -> None:
        """Tell the front what there is, and serve until the end; then flush the disks."""
        await self._say("exports", [tuple(export) for export in self.exports.values()])
        listening = self.driver.spawn(self._listen(), name="front")
        listening.callbacks.append(lambda _: self.stop())
        try:
            await self.serve()
        finally:
            listening.cancel()
            await listening
            self._messages.close()

    def stop(self) -> None:
        """Take no new clients and no new requests; what was read is still answered."""
        super().stop()
        for task in list(self._coming):
            task.cancel()
        for relay in list(self._relays):
            relay.stop()

    @property
    def _busy(self) -> bool:
        return super()._busy or bool(self._coming or self._relays)

    # -- the front
    async def _say(self, *message: Any, sock: socket.socket | None = None) -> None:
        with suppress(OSError):  # the front has gone, as is noticed at once
            await self._messages.send(message, sock)

    async def _listen(self) -> None:
        with suppress(Cancelled):
            while received := await self._messages.receive():
                (kind, *rest), sock = received
                if kind == "exports":
                    self._choices = {row[0]: Export(*row) for row in rest[0]}
                elif kind == "metrics":
                    told = [tuple(family) for family in self.gather()]
                    _ = self.driver.spawn(self._say("metrics", told), name="metrics")
                elif sock is not None:
                    coming = (
                        self._greet(sock, *rest)
                        if kind == "greet"
                        else self._adopt(sock, Agreed(*rest), relayed=kind == "relayed")
                    )
                    task = self.driver.spawn(coming, name="nbd-greet")
                    self._coming.add(task)
                    task.callbacks.append(partial(self._came, task))

    def _came(self, task: Task[None], _: Any) -> None:
        self._coming.discard(task)
        self._notify()

    def _tell_left(self, served: bool) -> None:
        _ = self.driver.spawn(self._say("left", served), name="left")

    # -- clients
    async def _greet(self, sock: socket.socket, peer: int | str) -> None:
        greeting = Greeting(self.driver, sock, self._choices, self.handshake_seconds, self.tls)
        try:
            agreed = await greeting.carried_out()
        except (OSError, Cancelled) as error:
            if isinstance(error, OSError) and not greeting.aborted:
                self.on_left(str(error))
            greeting.close()
            self._tell_left(False)
            return
        if agreed.name in self.exports:
            await self._adopt(greeting.sock, agreed, greeting)
        else:
            await self._relay(greeting, peer, agreed)

    async def _adopt(
        self,
        sock: socket.socket,
        agreed: Agreed,
        greeting: Greeting | None = None,
        relayed: bool = False,
    ) -> None:
        """Serve a client that was greeted."""
        connection = Connection(self, sock)
        if greeting is not None and greeting.secured is not None:
            connection.go_on(greeting.secured)
        connection.machine.begin(self.exports[agreed.name], agreed.mode, agreed.contexts)
        if relayed:
            self._relayed.add(connection)
        entered = False
        try:
            await self._wait_for_room()
            self._inside += 1
            entered = True
            await self._connected(connection)
        except Cancelled:
            self.driver.forget(sock.fileno())
            sock.close()
            if not relayed:
                self._tell_left(False)
            self._relayed.discard(connection)
            if entered:
                self._gone(False)

    def _left(self, connection: Connection) -> None:
        super()._left(connection)
        if connection in self._relayed:
            self._relayed.discard(connection)
        else:
            self._tell_left(connection.negotiated)

    async def _relay(self, greeting: Greeting, peer: int | str, agreed: Agreed) -> None:
        """Carry a client's bytes to and from the worker that has the export."""
        from .nbd_relay import Relay

        ours, theirs = socket.socketpair()
        prepare(ours)
        prepare(theirs)
        with theirs:
            await self._say("relay", peer, *agreed, sock=theirs)
        assert greeting.secured is not None
        relay = Relay(self.driver, greeting.secured, ours)
        self._relays.add(relay)

        def ended(_: object) -> None:
            self._relays.discard(relay)
            self._tell_left(True)
            self._notify()

        relay.ended.callbacks.append(ended)
