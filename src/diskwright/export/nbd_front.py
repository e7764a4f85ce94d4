"""One door for the exports of several processes.

Clients are greeted here.  When a client has chosen its export, its socket goes to the worker that
has the disk, with what was agreed on; what the client sends from then on is read by the worker
alone, because no byte behind the choice is taken from the socket here.

The state of a TLS connection cannot be handed over.  With TLS a client's socket goes to the worker
that has the fewest clients before a word was said; that one greets it, and if another worker has
the export it carries bytes between the two (:mod:`.nbd_relay`).  What the same process or host
connects next is taken straight there: it is likely to want the same.

Messages to a worker: ``exports`` (all that clients may choose), ``greet`` (a client, and who it
is), ``client`` (one that was greeted), ``relayed`` (another worker's end of a relay), ``metrics``.
Messages from it: ``exports`` (its own) or ``failed`` first, then ``left`` for each client that has
left, ``relay`` (whose it is, and an end, for the worker that has the export), ``metrics``.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..engine.kernel import BaseDriver, Cancelled, Future, Task
from ..errors import UsageError
from ..records import NamedTuple
from ..wire.nbd_handshake import Export
from .metrics import Family
from .nbd_door import Door
from .nbd_greeting import Greeting
from .nbd_messages import Messages
from .nbd_server import HANDSHAKE_SECONDS

_PEERS = 1024
"""How many are remembered, by what they asked for last."""
_CREDENTIALS = struct.Struct("3i")


def _peer(sock: socket.socket) -> int | str:
    """Who the other side is, as far as the system tells: a process or a host."""
    with suppress(OSError):
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            return str(sock.getpeername()[0])
        if sys.platform == "linux":
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            return int(_CREDENTIALS.unpack(data)[0])
    return 0


class Worker(NamedTuple):
    """A process that serves, and what it can be reached by."""

    pid: int
    channel: socket.socket


class _Home:
    """A worker as the front sees it: what it can be told, and how many clients it was given."""

    def __init__(self, driver: BaseDriver, worker: Worker) -> None:
        self.pid = worker.pid
        self.messages = Messages(driver, worker.channel)
        self.clients = 0
        self.gone = False
        self.asked: Future[list[Family]] | None = None
        """Its metrics, for which it was asked; an error when it ends."""


class Front(Door):
    """Greets clients and hands them to ``workers``, which have said that they are ready; if
    ``secure``, workers greet them.

    A worker that ends takes its exports and its clients with it; ``on_lost`` is told the process
    id and the status of one that failed.  When the last one has gone the front stops.  ``on_left``
    is told why a client left before it had chosen.
    """

    def __init__(
        self,
        driver: BaseDriver,
        workers: Sequence[Worker],
        *,
        clients: int = 0,
        persistent: bool = True,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        secure: bool = False,
    ) -> None:
        super().__init__(driver, clients, persistent)
        self.handshake_seconds = handshake_seconds
        self.secure = secure
        self.on_lost: Callable[[int, int], None] = lambda pid, status: None
        self.on_left: Callable[[str], None] = lambda reason: None
        self.exports: dict[bytes, Export] = {}
        self._homes = [_Home(driver, worker) for worker in workers]
        self._of: dict[bytes, _Home] = {}
        self._watching: list[Task[None]] = []
        self._handing: set[Task[None]] = set()
        self._likely: dict[int | str, _Home] = {}
        """Which worker's export a peer was relayed to last."""

    async def ready(self) -> None:
        """Wait until every worker has said what it serves.  Raises UsageError for one that cannot
        serve, when all have ended."""
        try:
            for home in self._homes:
                message, _ = await home.messages.receive() or (("failed", ""), None)
                if message[0] == "failed":
                    why = message[1] or f"the worker {home.pid} died before it was ready"
                    raise UsageError(why)
                for row in message[1]:
                    export = Export(*row)
                    self.exports[export.name], self._of[export.name] = export, home
        except BaseException:
            for home in self._homes:
                home.messages.close()
            for home in self._homes:
                os.waitpid(home.pid, 0)
            raise
        self._watching = [
            self.driver.spawn(self._watch(home), name="worker") for home in self._homes
        ]
        await self._tell_exports()

    def stop(self) -> None:
        """Let nobody in any more; workers answer what they were asked, and end."""
        super().stop()
        for task in list(self._handing):
            task.cancel()
        for home in self._homes:
            if not home.gone:
                home.messages.finish()

    async def shut_down(self) -> None:
        """Stop, and wait until all workers have ended."""
        await super().shut_down()
        for task in self._watching:
            await task

    @property
    def connected(self) -> int:
        """How many clients there are."""
        return self._inside

    # -- workers
    def signal(self, number: int) -> None:
        """Send a signal to all workers."""
        for home in self._homes:
            if not home.gone:
                os.kill(home.pid, number)

    async def metrics(self, seconds: float) -> list[list[Family] | None]:
        """What each worker tells of itself; None for one that has gone, or does not answer within
        ``seconds``."""
        over: Future[None] = Future()
        timer = self.driver.later(seconds, over.set)
        answers = [self._ask(home) for home in self._homes]

        def look(_: Future[Any]) -> None:
            if all(answer.done for answer in answers):
                over.set()

        for answer in answers:
            answer.callbacks.append(look)
        look(over)
        try:
            await over
        finally:
            timer.cancel()
            for answer in answers:
                if not answer.done:
                    answer.callbacks.remove(look)
        return [one.value if one.done else None for one in answers]

    def _ask(self, home: _Home) -> Future[list[Family]]:
        """One question at a time is with a worker, however many ask."""
        asked = home.asked
        if asked is None:
            asked = home.asked = Future()
            if home.gone:
                asked.set(error=ConnectionResetError())
            else:
                _ = self.driver.spawn(self._send(home, ("metrics",)), name="metrics")
        return asked

    async def _send(self, home: _Home, message: tuple[Any, ...]) -> None:
        with suppress(OSError):  # it has just ended, as :meth:`_watch` will notice
            await home.messages.send(message)

    async def _tell_exports(self) -> None:
        """Tell workers that greet clients what these may choose."""
        rows = [tuple(export) for export in self.exports.values()]
        for home in self._homes:
            if self.secure and not home.gone:
                await self._send(home, ("exports", rows))

    async def _watch(self, home: _Home) -> None:
        """Hear what a worker says, until it ends."""
        while received := await home.messages.receive():
            (kind, *rest), sock = received
            if kind == "left":
                home.clients -= 1
                self._gone(*rest)
            elif kind == "metrics" and home.asked is not None:
                asked, home.asked = home.asked, None
                asked.set([Family(*family) for family in rest[0]])
            elif kind == "relay" and sock is not None:
                self._spawn(self._pass_on(sock, *rest))
        home.gone = True
        home.messages.close()
        _, status = os.waitpid(home.pid, 0)
        for name in [name for name, its in self._of.items() if its is home]:
            del self.exports[name], self._of[name]
        if status:
            self.on_lost(home.pid, os.waitstatus_to_exitcode(status))
        if home.asked is not None:
            home.asked.set(error=ConnectionResetError())
        for _ in range(home.clients):
            self._gone(True)
        if all(each.gone for each in self._homes) and not self.stopping:
            self.stop()
        await self._tell_exports()

    # -- clients
    def _spawn(self, coro: Any) -> None:
        task = self.driver.spawn(coro, name="nbd-greet")
        self._handing.add(task)
        task.callbacks.append(lambda _: self._handing.discard(task))

    async def _admit(self, sock: socket.socket) -> None:
        self._spawn(self._hand_over(sock) if self.secure else self._greet(sock))

    async def _greet(self, sock: socket.socket) -> None:
        greeting = Greeting(self.driver, sock, self.exports, self.handshake_seconds)
        try:
            agreed = await greeting.carried_out()
        except OSError as error:
            if not greeting.aborted:
                self.on_left(str(error))
            agreed = None
        except Cancelled:
            agreed = None
        home = None if agreed is None else self._of.get(agreed.name)
        await self._hand(home, ("client", *(agreed or ())), sock)

    async def _hand_over(self, sock: socket.socket) -> None:
        homes = [home for home in self._homes if not home.gone]
        peer = _peer(sock)
        likely = self._likely.get(peer)
        fewest = min(homes, key=lambda home: home.clients, default=None)
        await self._hand(likely if likely in homes else fewest, ("greet", peer), sock)

    async def _hand(
        self, home: _Home | None, message: tuple[Any, ...], sock: socket.socket
    ) -> None:
        """Give a worker a client, which is nobody's without one."""
        handed = False
        try:
            if home is not None:
                await home.messages.send(message, sock)
                home.clients += 1
                handed = True
        except (OSError, Cancelled):
            pass
        finally:
            self.driver.forget(sock.fileno())
            sock.close()
            if not handed:
                self._gone(False)

    async def _pass_on(self, sock: socket.socket, peer: int | str, *agreed: Any) -> None:
        """Give the worker that has an export the end of a relay, which counts as no client."""
        home = self._of.get(agreed[0])
        with suppress(OSError, Cancelled), sock:  # closed here, it is the other end's end
            if home is not None:
                self._likely.pop(peer, None)
                self._likely[peer] = home
                if len(self._likely) > _PEERS:
                    del self._likely[next(iter(self._likely))]
                await home.messages.send(("relayed", *agreed), sock)
