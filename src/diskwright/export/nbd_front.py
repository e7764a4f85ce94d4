"""One door for the exports of several processes.

Clients are greeted here.  When a client has chosen its export, its socket goes to the worker that
has the disk, with what was agreed on; what the client sends from then on is read by the worker
alone, because no byte behind the choice is taken from the socket here.

Between front and worker there is a stream socket.  To the worker: messages of 4 bytes of length and
``marshal`` of (name, form of replies, contexts), each with one descriptor.  To the front: one such
message of a list of exports (or the text of an error), then one byte for each client that has left.
"""

from __future__ import annotations

import marshal
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..engine.futures import Condition
from ..engine.kernel import BaseDriver, Cancelled, Task
from ..errors import UsageError
from ..protocols.nbd_connect import patiently
from ..records import NamedTuple
from ..wire.nbd_handshake import Export, Handshake
from .nbd_connection import Connection
from .nbd_door import Door
from .nbd_server import HANDSHAKE_SECONDS, Server

assert sys.platform != "win32"  # sockets cannot be handed over there

_LENGTH = struct.Struct(">I")
_CLIENT_FLAGS = 4
_OPTION = struct.Struct(">12xI")
_PART = 64 << 10
_DESCRIPTORS = 64
"""Most that come with one part."""


class Worker(NamedTuple):
    """A process that serves, and what it can be reached by."""

    pid: int
    channel: socket.socket


class _Home:
    """A worker as the front sees it: what it serves, and how many clients it was given."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.clients = 0
        self.gone = False
        self._busy = False
        self._free = Condition()

    async def hand(self, driver: BaseDriver, message: bytes, sock: socket.socket) -> None:
        """Give it a client."""
        while self._busy:
            await self._free.wait()
        self._busy = True
        channel = self.worker.channel
        data = _LENGTH.pack(len(message)) + message
        try:
            sent = 0
            while sent < len(data):
                try:
                    if sent:
                        sent += channel.send(data[sent:])
                    else:
                        sent = socket.send_fds(channel, [data], [sock.fileno()])
                except BlockingIOError:
                    await driver.writable(channel.fileno())
        finally:
            self._busy = False
            self._free.notify()


class Front(Door):
    """Greets clients and hands them to ``workers``, which have said that they are ready.

    A worker that ends takes its exports and their clients with it; ``on_lost`` is told the process
    id and the status of one that failed.  When the last one has gone the front stops.
    """

    def __init__(
        self,
        driver: BaseDriver,
        workers: Sequence[Worker],
        *,
        clients: int = 0,
        persistent: bool = True,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        super().__init__(driver, clients, persistent)
        self.handshake_seconds = handshake_seconds
        self.on_lost: Callable[[int, int], None] = lambda pid, status: None
        self.exports: dict[bytes, Export] = {}
        self._homes = [_Home(worker) for worker in workers]
        self._of: dict[bytes, _Home] = {}
        self._watching: list[Task[None]] = []
        self._greeting: set[Task[None]] = set()

    async def ready(self) -> None:
        """Wait until every worker has said what it serves.  Raises UsageError for one that cannot
        serve, when all have ended."""
        try:
            for home in self._homes:
                home.worker.channel.setblocking(False)
                told = marshal.loads(await self._message(home))
                if isinstance(told, str):
                    raise UsageError(told)
                for row in told:
                    export = Export(*row)
                    self.exports[export.name], self._of[export.name] = export, home
        except BaseException:
            for home in self._homes:
                self.driver.forget(home.worker.channel.fileno())
                home.worker.channel.close()
            for home in self._homes:
                os.waitpid(home.worker.pid, 0)
            raise
        self._watching = [
            self.driver.spawn(self._watch(home), name="worker") for home in self._homes
        ]

    def stop(self) -> None:
        """Let nobody in any more; workers answer what they were asked, and end."""
        super().stop()
        for task in list(self._greeting):
            task.cancel()
        for home in self._homes:
            if not home.gone:
                with suppress(OSError):  # it has just ended by itself
                    home.worker.channel.shutdown(socket.SHUT_WR)

    async def shut_down(self) -> None:
        """Stop, and wait until all workers have ended."""
        await super().shut_down()
        for task in self._watching:
            await task

    # -- workers
    async def _message(self, home: _Home) -> bytes:
        head = await self._exactly(home, _LENGTH.size)
        return await self._exactly(home, _LENGTH.unpack(head)[0])

    async def _exactly(self, home: _Home, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = await self._receive(home, count - len(data))
            if not part:
                raise UsageError(f"the worker {home.worker.pid} died before it was ready")
            data += part
        return bytes(data)

    async def _receive(self, home: _Home, count: int) -> bytes:
        channel = home.worker.channel
        while True:
            try:
                return channel.recv(count)
            except BlockingIOError:
                await self.driver.readable(channel.fileno())
            except ConnectionError:
                return b""

    async def _watch(self, home: _Home) -> None:
        """Hear of clients that have left, until the worker ends."""
        while left := await self._receive(home, _PART):
            home.clients -= len(left)
            for _ in left:
                self._gone(True)
        home.gone = True
        self.driver.forget(home.worker.channel.fileno())
        home.worker.channel.close()
        _, status = os.waitpid(home.worker.pid, 0)
        for name in [name for name, its in self._of.items() if its is home]:
            del self.exports[name], self._of[name]
        if status:
            self.on_lost(home.worker.pid, os.waitstatus_to_exitcode(status))
        for _ in range(home.clients):
            self._gone(True)
        if all(each.gone for each in self._homes) and not self.stopping:
            self.stop()

    # -- clients
    async def _admit(self, sock: socket.socket) -> None:
        task = self.driver.spawn(self._greet(sock), name="nbd-greet")
        self._greeting.add(task)
        task.callbacks.append(lambda _: self._greeting.discard(task))

    async def _greet(self, sock: socket.socket) -> None:
        handed = False
        try:
            greeting = _Greeting(self.driver, sock, self.exports, self.handshake_seconds)
            name, agreed = await greeting.carried_out()
            home = self._of[name]
            await home.hand(self.driver, agreed, sock)
            home.clients += 1
            handed = True
        except (OSError, KeyError, Cancelled):
            pass  # it is nobody's client
        finally:
            self.driver.forget(sock.fileno())
            sock.close()
            if not handed:
                self._gone(False)


class _Greeting:
    """The handshake of one client, which takes no byte more than belongs to it."""

    def __init__(
        self,
        driver: BaseDriver,
        sock: socket.socket,
        exports: Mapping[bytes, Export],
        seconds: float,
    ) -> None:
        self._driver, self._sock = driver, sock
        self._handshake = Handshake(exports)
        self._deadline = driver.now() + seconds
        self._rest = b""

    async def carried_out(self) -> tuple[bytes, bytes]:
        """The export that the client has chosen, and what its worker must know.  Raises OSError."""
        handshake = self._handshake
        await self._send()
        await self._take(_CLIENT_FLAGS)
        while handshake.export is None:
            head = await self._take(_OPTION.size)
            left = _OPTION.unpack(head)[0]
            while left:
                left -= len(await self._take(min(left, _PART)))
            await self._send()
        told = (handshake.export.name, handshake.mode, dict(handshake.contexts))
        return handshake.export.name, marshal.dumps(told)

    async def _send(self) -> None:
        out = memoryview(b"".join(self._handshake.out))
        self._handshake.out.clear()
        driver, sock = self._driver, self._sock
        while out:
            out = out[await patiently(driver, sock, 1, self._deadline, sock.send, out) :]
        if self._handshake.closed:
            raise ConnectionAbortedError(self._handshake.closed)

    async def _take(self, count: int) -> bytes:
        """Let the handshake have ``count`` bytes; returns them."""
        data = b""
        while len(data) < count:
            part = await patiently(
                self._driver, self._sock, 0, self._deadline, self._sock.recv, count - len(data)
            )
            if not part:
                raise ConnectionResetError
            data += part
        rest = self._rest + data
        self._rest = rest[self._handshake.parse(memoryview(rest), 0, len(rest)) :]
        if self._handshake.closed:
            await self._send()
        return data


class WorkerServer(Server):
    """Serves the clients that come through ``channel``, until the front closes it.  ``clients`` is
    how many the front lets in."""

    def __init__(
        self, driver: BaseDriver, channel: socket.socket, clients: int, budget: int
    ) -> None:
        super().__init__(driver, clients=clients, budget=budget)
        self._channel = channel
        self._left_untold = 0
        channel.setblocking(False)

    async def tell(self, what: Any) -> None:
        """The first message to the front: the exports, or why there are none."""
        body = marshal.dumps(what)
        data = memoryview(_LENGTH.pack(len(body)) + body)
        while data:
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                await self.driver.writable(self._channel.fileno())
            except ConnectionError:
                return  # the front has gone, as is noticed at once

    async def serve_handed(self) -> None:
        """Tell the front what there is, and serve until the end; then flush the disks."""
        await self.tell([tuple(export) for export in self.exports.values()])
        receiving = self.driver.spawn(self._receive(), name="handed")
        receiving.callbacks.append(lambda _: self.stop())
        try:
            await self.serve()
        finally:
            receiving.cancel()
            await receiving

    async def _receive(self) -> None:
        data, descriptors = b"", list[int]()
        try:
            while True:
                try:
                    part, more, _, _ = socket.recv_fds(self._channel, _PART, _DESCRIPTORS)
                except BlockingIOError:
                    await self.driver.readable(self._channel.fileno())
                    continue
                descriptors += more
                if not part:
                    return
                data += part
                while len(data) >= _LENGTH.size:
                    end = _LENGTH.size + _LENGTH.unpack_from(data)[0]
                    if len(data) < end:
                        break
                    told = marshal.loads(data[_LENGTH.size : end])
                    data = data[end:]
                    await self._adopt(socket.socket(fileno=descriptors.pop(0)), *told)
        except (Cancelled, ConnectionError):
            pass
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    async def _adopt(
        self, sock: socket.socket, name: bytes, mode: int, contexts: Mapping[int, bytes]
    ) -> None:
        sock.setblocking(False)
        self._inside += 1
        connection = Connection(self, sock)
        connection.machine.begin(self.exports[name], mode, contexts)
        try:
            await self._connected(connection)
        except Cancelled:
            sock.close()
            self._gone(False)
            raise

    def _gone(self, served: bool) -> None:
        super()._gone(served)
        self._left_untold += 1
        self._tell_left()

    def _tell_left(self) -> None:
        try:
            self._left_untold -= self._channel.send(bytes(self._left_untold))
        except BlockingIOError:
            self.driver.later(0.1, self._tell_left)
        except OSError:
            pass  # the front has gone
