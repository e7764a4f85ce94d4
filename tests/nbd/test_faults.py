"""Clients that die, stall, lie or come in crowds: what the server then holds is counted."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diskwright.engine.kernel import BaseDriver, Future
from diskwright.engine.node import Node
from diskwright.export import nbd_channel
from diskwright.export.nbd_channel import MOST_RUNNING
from diskwright.extents import Data, Extent, Zero
from diskwright.protocols.memory import MemoryNode
from diskwright.wire.nbd_const import MAX_PAYLOAD
from diskwright.wire.nbd_server import BUFFER_SIZE
from nbd import peer
from nbd.peer import Client
from nbd.serving import Serve, exported, serving, wait_for

MIB = 1 << 20


class Held(MemoryNode):
    """Writes and zeroes wait while ``held`` is set; how many did at a time.  Every second block
    is a hole."""

    held: Future[None] | None = None
    busy = most = 0

    async def _wait(self) -> None:
        self.busy += 1
        self.most = max(self.most, self.busy)
        if self.held is not None:
            await self.held
        self.busy -= 1

    async def write(self, offsets: Any, buffers: Any, flags: int = 0, tag: str = "") -> None:
        await self._wait()
        await super().write(offsets, buffers, flags)

    async def zero(self, offsets: Any, lengths: Any, flags: int = 0) -> None:
        await self._wait()
        await super().zero(offsets, lengths, flags)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return [
            Zero(4096, explicit=False) if at & 4096 else Data("", at, 4096, True)
            for at in range(offset, offset + length, 4096)
        ]


def of(size: int) -> Any:
    async def make(driver: BaseDriver) -> Node:
        return Held(driver, bytes(size))

    return make


def push(client: Client, data: bytes, enough: Callable[[], bool]) -> int:
    """Send ``data`` again and again until nothing more is taken and there is ``enough``; the bytes
    that were taken."""
    client.sock.settimeout(0.3)
    sent = 0
    view = memoryview(data)

    def is_full() -> bool:
        nonlocal sent
        try:
            while True:
                sent += client.sock.send(view[sent % len(data) :])
        except TimeoutError:
            return enough()

    wait_for(is_full, "enough to be sent")
    return sent


# -- memory
@pytest.mark.parametrize("clients", [1, 3])
def test_large_writes_behind_each_other(tmp_path: Path, clients: int) -> None:
    """Nobody waits for memory that is held by somebody who waits: here there is room for two of
    the largest writes only, and everyone sends several at once."""
    payload = bytes(MAX_PAYLOAD)
    with exported(tmp_path / "s", of(MAX_PAYLOAD), budget=66 * MIB) as server:
        export = server.export
        assert export is not None
        found: list[object] = []

        def write() -> None:
            client = Client(str(tmp_path / "s"), timeout=60)
            data = peer.request(peer.WRITE, 1, 0, data=b"x" * 5000)
            data += peer.request(peer.WRITE, 1, 0, data=payload) * 2
            client.sock.sendall(data)
            found.append([client.reply()[:2] for _ in range(3)])
            client.close()

        threads = [threading.Thread(target=write) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [[(1, 0)] * 3] * clients
        wait_for(lambda: not export.connections, "all to be gone")
        assert export.budget.used == 0 and export.budget.peak <= 66 * MIB


def test_who_does_not_send_what_it_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the memory for it as long as nobody else wants that."""
    monkeypatch.setattr(nbd_channel, "STALL_SECONDS", 0.3)
    left: list[str] = []
    with exported(tmp_path / "s", of(MAX_PAYLOAD), budget=40 * MIB) as server:
        export = server.export
        assert export is not None
        export.on_left = left.append
        liar = Client(str(tmp_path / "s"))
        liar.sock.sendall(peer.request(peer.WRITE, 1, 0, MAX_PAYLOAD))
        wait_for(lambda: liar.sock.send(b"x") and export.budget.used > MAX_PAYLOAD, "its buffer")
        time.sleep(0.5)
        assert not left
        other = Client(str(tmp_path / "s"))
        assert other.read(0, 16 * MIB) == bytes(16 * MIB)
        assert left == ["the other side does not send what it began"]
        other.close()
        liar.sock.close()


def test_what_is_asked_faster_than_it_is_done(tmp_path: Path) -> None:
    """Requests without payload take no budget, so few are begun at a time."""
    with exported(tmp_path / "s", of(MIB)) as server:
        node = server.node
        assert isinstance(node, Held)
        node.held = Future()
        client = Client(str(tmp_path / "s"))
        asked = push(client, peer.request(peer.ZERO, 1, 0, 4096) * 1000, lambda: node.busy > 0)
        busy = node.busy
        held, node.held = node.held, None
        node.driver.from_thread(held.set)
        assert asked > 1000 * 28 and busy <= MOST_RUNNING
        client.sock.settimeout(20)
        assert client.reply() == (1, 0, b"")
        client.sock.close()
        wait_for(lambda: not node.busy, "all to be done")
        assert node.most <= MOST_RUNNING


@pytest.mark.parametrize("what", ["refused", "status"])
def test_answers_that_nobody_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Replies that no budget is taken for are not piled up."""
    most = 64 << 10
    monkeypatch.setattr(nbd_channel, "MOST_OWED", most)
    monkeypatch.setattr("diskwright.export.nbd_door._SEND_BUFFER", most)
    request = {
        "refused": peer.request(99, 1, 0, 1),
        "status": peer.request(peer.STATUS, 1, 0, 2 * MIB),
    }[what]
    with exported(tmp_path / "s", of(64 * MIB)) as server:
        export, node = server.export, server.node
        assert export is not None and isinstance(node, Held)
        client = Client(str(tmp_path / "s"), allocation=True)
        (connection,) = export.connections
        push(client, request * 4000, lambda: connection._owed > most)
        other = Client(str(tmp_path / "s"))
        assert other.read(0, 5) == bytes(5)  # whatever there is to be done for the first one
        time.sleep(0.2)
        assert connection._owed < 6 * most
        client.sock.close()
        wait_for(lambda: len(export.connections) == 1, "it to be gone")
        assert connection._owed == 0
        other.close()


def test_lists_without_end(tmp_path: Path) -> None:
    with exported(tmp_path / "s", of(4096)) as server:
        export, node = server.export, server.node
        assert export is not None and node is not None
        for number in range(200):
            export.offer(b"disk %d" % number, node, b"d" * 1000, True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(20)
        sock.connect(str(tmp_path / "s"))
        sock.sendall(struct.pack(">I", 3) + peer.option(peer.LIST) * 15000)
        said = 0
        with suppress(ConnectionResetError):
            while part := sock.recv(1 << 20):
                said += len(part)
        assert 16 * MIB < said < 17 * MIB
        sock.close()


def test_a_crowd(tmp_path: Path) -> None:
    """200 clients at once, each with large reads and writes: more than 1 GiB is wanted."""
    size, crowd = 4 * MIB, 200
    with exported(tmp_path / "s", of(size), budget=104 * MIB) as server:
        export = server.export
        assert export is not None
        clients = [Client(str(tmp_path / "s"), timeout=120) for _ in range(crowd)]
        for number, client in enumerate(clients):
            if number % 2:
                client.sock.sendall(peer.request(peer.READ, 1, 0, size) * 2)
            else:
                client.sock.sendall(peer.request(peer.WRITE, 1, 0, size) + bytes(4096))
        wait_for(lambda: export.budget.contended, "the budget to be spent")
        assert export.budget.used <= 104 * MIB
        last = clients.pop()
        for client in clients:  # these go in the middle of what they began
            client.sock.close()
        wait_for(lambda: len(export.connections) == 1, "all but one to be gone")
        assert [last.reply()[1] for _ in range(2)] == [0, 0]
        assert export.budget.peak <= 104 * MIB
        last.close()
        wait_for(lambda: not export.connections, "the last one to be gone")
        assert export.budget.used == 0


def test_more_clients_than_there_is_memory_for(tmp_path: Path) -> None:
    """The further ones wait in the socket's queue."""
    with exported(tmp_path / "s", of(MIB), budget=8 * MIB) as server:
        export = server.export
        assert export is not None
        most = 4 * MIB // BUFFER_SIZE
        clients = [Client(str(tmp_path / "s")) for _ in range(most)]
        late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        late.settimeout(0.1)
        late.connect(str(tmp_path / "s"))
        with pytest.raises(TimeoutError):
            late.recv(1)
        assert len(export.connections) == most and export.budget.used == 4 * MIB
        clients[0].close()
        late.settimeout(20)
        assert late.recv(18) == peer.GREETING
        for client in (*clients[1:], late):
            client.close()


# -- descriptors
def test_connects(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of clients that come and go in every way nothing is left: neither descriptors nor memory."""
    turns = 10_000 if request.config.getoption("--long") else 1000
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with serving(image, "-t", "-e", "0") as server:
        path = str(server.socket)

        def held() -> tuple[int, int]:
            about = Path(f"/proc/{server.process.pid}")
            pages = int((about / "statm").read_text().split()[1])
            return len(list((about / "fd").iterdir())), pages * resource.getpagesize()

        def come_and_go(number: int) -> None:
            if number % 4 == 0:
                client = Client(path)
                client.sock.sendall(peer.request(peer.READ, 1, 0, 4096))
                client.close()
                return
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.connect(path)
                if number % 4 == 1:
                    sock.sendall(b"\0\0")
                elif number % 4 == 2:
                    sock.sendall(peer.opening() + peer.request(peer.WRITE, 1, 0, 9000))

        for number in range(400):
            come_and_go(number)
        wait_for(lambda: held()[0] < 20, "descriptors to be closed")
        time.sleep(0.1)
        descriptors, before = held()
        for number in range(turns):
            come_and_go(number)
        wait_for(lambda: held()[0] <= descriptors, "descriptors to be closed")
        assert held()[1] - before < 2 * MIB


# -- hostile frames over sockets
def test_frames_that_were_changed(tmp_path: Path) -> None:
    """Every client sends a few hundred requests with some bits wrong; after thousands of these
    others are served as before, and nothing was told to be the server's own fault."""
    chance = random.Random(4)
    with exported(tmp_path / "s", of(MIB)) as server:
        export = server.export
        assert export is not None
        frames = 0
        for turn in range(60):
            good = [
                peer.request(
                    chance.choice([0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 200]),
                    chance.getrandbits(64),
                    chance.choice([0, 512, MIB - 1, MIB, 1 << 63, (1 << 64) - 1]),
                    chance.choice([1, 512, 4096, 1 << 16]),
                    chance.choice([0, 0, 0, 1, 2, 4, 8, 16, 32, 0x8000]),
                )
                for _ in range(100)
            ]
            frames += len(good)
            stream = bytearray(b"".join(good))
            for _ in range(turn % 3):
                stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
            opening = peer.opening(allocation=True, extended=bool(turn % 2))
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(0.01)
                sock.connect(str(tmp_path / "s"))
                try:
                    sock.sendall(opening + stream)
                    while sock.recv(1 << 20):
                        pass
                except OSError:  # it was dropped, or has nothing more to say
                    pass
        assert frames >= 6000
        client = Client(str(tmp_path / "s"))
        client.write(0, b"still")
        assert client.read(0, 5) == b"still"
        client.close()
        wait_for(lambda: not export.connections, "all to be gone")
        assert not server.errors and export.budget.used == 0


# -- processes that are killed
def test_a_client_that_is_killed(tmp_path: Path) -> None:
    """In the middle of a write of 32 MiB and of reading as much."""
    with exported(tmp_path / "s", of(MAX_PAYLOAD)) as server:
        export = server.export
        assert export is not None
        for _ in range(3):
            child = os.fork()
            if not child:
                client = Client(str(tmp_path / "s"))
                client.sock.sendall(peer.request(peer.READ, 1, 0, MAX_PAYLOAD))
                client.sock.sendall(peer.request(peer.WRITE, 2, 0, MAX_PAYLOAD) + bytes(MIB))
                time.sleep(60)
                os._exit(1)
            wait_for(lambda: export.budget.used > MAX_PAYLOAD, "it to be at work")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            wait_for(lambda: not export.connections, "it to be gone")
            assert export.budget.used == 0
        assert not server.errors


def test_half_open_connections(tmp_path: Path) -> None:
    """Over TCP the system asks after a client that says nothing, so that a host that is gone does
    not hold its place; a client that lives and reads nothing is not dropped for that."""
    with exported(tmp_path / "s", of(MIB)) as server:
        export = server.export
        assert export is not None
        listener = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(listener.getsockname())
        export.driver.from_thread(lambda: export.start(listener))
        assert client.recv(18) == peer.GREETING
        (connection,) = export.connections
        sock = connection.sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        interval = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        probes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        assert idle + interval * probes <= 60
        assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        client.close()
        wait_for(lambda: not export.connections, "it to be gone")


def test_a_server_that_is_killed(tmp_path: Path) -> None:
    """In the middle of writes that are on their way: what was flushed is there."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    server = Serve(image, "-t")
    client = Client(str(server.socket))
    client.write(0, b"durable")
    client.flush()
    client.sock.sendall(peer.request(peer.WRITE, 1, 4096, MIB - 4096) + bytes(1000))
    server.end(signal.SIGKILL)
    with pytest.raises(OSError):
        client.reply()
    client.sock.close()
    assert image.read_bytes()[:7] == b"durable"
    server = Serve(image, "-t")
    client = Client(str(server.socket))
    assert client.read(0, 7) == b"durable"
    client.close()
    assert server.end() == (0, "")
