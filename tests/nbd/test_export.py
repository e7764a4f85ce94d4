"""The export on real sockets and on both drivers of the kernel."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import FUA
from diskwright.engine.kernel import BaseDriver, Cancelled, Driver, Future
from diskwright.engine.node import Buffer, Node
from diskwright.export.budget import Budget
from diskwright.export.listening import listen_unix
from diskwright.protocols.file import FileNode
from diskwright.protocols.memory import MemoryNode
from nbd import peer
from nbd.peer import Client
from nbd.serving import exported, readable, wait_for

SIZE = 8 << 20
BOTH = pytest.mark.parametrize("use_asyncio", [False, True], ids=["plain", "asyncio"])


class Slow(MemoryNode):
    """Every request waits a turn (so it suspends), writes in the pool; it can fail, be held, and
    tells how much went on at a time."""

    def __init__(self, driver: BaseDriver, size: int = SIZE) -> None:
        super().__init__(driver, bytes(size))
        self.bad = range(0)
        self.busy = self.most = 0
        self.held: Future[None] | None = None
        self.log: list[str] = []

    async def _pass(self, what: str, offsets: Sequence[int]) -> None:
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.log.append(what)
        try:
            if self.held is not None:
                await self.held
            await self.driver.call(time.sleep, 0.001)
            if any(offset in self.bad for offset in offsets):
                raise OSError(errno.EIO, "bad block")
        finally:
            self.busy -= 1

    async def read(self, offsets: Any, lengths: Any, into: Any = None, tag: str = "") -> Any:
        await self._pass("read", offsets)
        return await super().read(offsets, lengths, into)

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0, tag: str = ""
    ) -> None:
        await self._pass("write fua" if flags & FUA else "write", offsets)
        await super().write(offsets, buffers, flags)

    async def flush(self) -> None:
        await self._pass("flush", ())
        await super().flush()


class Counted(MemoryNode):
    """Counts what is read from it."""

    bytes_read = 0

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
        tag: str = "read_aio",
    ) -> Sequence[Buffer]:
        self.bytes_read += sum(lengths)
        return await super().read(offsets, lengths, into, tag)


async def counted(driver: BaseDriver) -> Node:
    return Counted(driver, bytes(SIZE))


async def memory(driver: BaseDriver) -> Node:
    return MemoryNode(driver, bytes(SIZE))


async def slow(driver: BaseDriver) -> Node:
    return Slow(driver)


@BOTH
@pytest.mark.parametrize("make", [memory, slow])
@pytest.mark.parametrize("structured", [True, False])
def test_random_work(tmp_path: Path, make: Any, structured: bool, use_asyncio: bool) -> None:
    """Batches of every kind, many at a time, against a model."""
    chance = random.Random(structured + 2 * use_asyncio)
    model = bytearray(SIZE)
    with exported(tmp_path / "s", make, use_asyncio=use_asyncio):
        client = Client(str(tmp_path / "s"), structured)
        assert client.size == SIZE
        for _ in range(60):
            sent: dict[int, tuple[int, int, int, bytes]] = {}
            stream = b""
            # one round touches every block at most once, so its requests may go in any order
            blocks = chance.sample(range(SIZE >> 16), chance.randint(1, 40))
            for cookie, block in enumerate(blocks):
                offset = (block << 16) + chance.choice([0, 0, 512, 1, 4096])
                length = chance.choice([4096, 4096, 4096, 512, 1, 30000])
                command = chance.choice([peer.READ, peer.WRITE, peer.ZERO, peer.FLUSH])
                data = chance.randbytes(length) if command == peer.WRITE else b""
                if command == peer.FLUSH:
                    stream += peer.request(command, cookie)
                else:
                    flags = peer.FUA if chance.random() < 0.1 else 0
                    stream += peer.request(command, cookie, offset, length, flags, data)
                sent[cookie] = (command, offset, length, data)
            sender = threading.Thread(target=client.sock.sendall, args=(stream,))
            sender.start()
            for _ in blocks:
                if structured:
                    cookie, error, data = client.reply()
                else:
                    head = client.exactly(16)
                    error, cookie = struct.unpack(">IQ", head[4:])
                    wanted = sent[cookie]
                    data = client.exactly(wanted[2]) if wanted[0] == peer.READ else b""
                assert error == 0
                command, offset, length, written = sent.pop(cookie)
                if command == peer.READ:
                    assert data == model[offset : offset + length]
                elif command != peer.FLUSH:
                    model[offset : offset + length] = written or bytes(length)
            sender.join()
            assert not sent
        assert client.read(0, SIZE) == model
        client.close()


@BOTH
def test_batches_run_beside_each_other(tmp_path: Path, use_asyncio: bool) -> None:
    with exported(tmp_path / "s", slow, use_asyncio=use_asyncio) as server:
        client = Client(str(tmp_path / "s"))
        node = server.node
        assert isinstance(node, Slow)
        node.held = Future()
        for cookie in range(5):
            client.sock.sendall(peer.request(peer.READ, cookie, cookie << 12, 4096))
            wait_for(lambda n=cookie: node.busy == n + 1, "the batch to begin")  # type: ignore[misc]
        assert not readable(client.sock, 0.05)
        held, node.held = node.held, None
        node.driver.from_thread(held.set)
        assert sorted(client.reply()[0] for _ in range(5)) == list(range(5))
        client.close()


def test_one_bad_request_fails_alone(tmp_path: Path) -> None:
    with exported(tmp_path / "s", slow) as server:
        assert isinstance(server.node, Slow)
        server.node.bad = range(8192, 12288)
        client = Client(str(tmp_path / "s"))
        for command in (peer.READ, peer.WRITE):
            data = b"x" * 4096 if command == peer.WRITE else b""
            client.sock.sendall(
                b"".join(peer.request(command, i, i << 12, 4096, 0, data) for i in range(8))
            )
            answers = {}
            for _ in range(8):
                cookie, error, _ = client.reply()
                answers[cookie] = error
            assert answers == {i: 5 if i == 2 else 0 for i in range(8)}
        client.close()


def test_refusals_on_the_wire(tmp_path: Path) -> None:
    with exported(tmp_path / "s", memory, read_only=True):
        client = Client(str(tmp_path / "s"))
        assert client.flags & 2
        assert client.call(peer.WRITE, 0, data=b"x" * 70000) == (1, b"")
        assert client.call(peer.TRIM, 0, 512)[0] == 1
        assert client.call(peer.READ, SIZE - 1, 2)[0] == 22
        assert client.call(peer.READ, 0, (32 << 20) + 1)[0] == 22
        assert client.call(peer.STATUS, 0, 512)[0] == 22
        assert client.read(0, 512) == bytes(512)
        client.close()


def test_block_status(tmp_path: Path) -> None:
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(256 << 10)
        file.write(b"x" * (64 << 10))

    async def open_file(driver: BaseDriver) -> Node:
        return await FileNode.open(driver, str(image), writable=True)

    with exported(tmp_path / "s", open_file):
        client = Client(str(tmp_path / "s"), allocation=True)
        error, data = client.call(peer.STATUS, 0, 1 << 20)
        assert error == 0
        assert struct.unpack(">7I", data) == (1, 256 << 10, 3, 64 << 10, 0, 704 << 10, 3)
        error, data = client.call(peer.STATUS, 300 << 10, 1 << 19, peer.REQ_ONE)
        assert (error, data) == (0, struct.pack(">III", 1, 20 << 10, 0))
        client.close()


def test_cache_and_trim(tmp_path: Path) -> None:
    with exported(tmp_path / "s", memory) as server:
        client = Client(str(tmp_path / "s"))
        client.write(4096, b"x" * 8192)
        assert client.call(peer.CACHE, 0, 5 << 20) == (0, b"")
        assert client.call(peer.TRIM, 4096, 4096, peer.FUA) == (0, b"")
        assert client.read(4096, 8192) == bytes(4096) + b"x" * 4096
        assert isinstance(server.node, MemoryNode) and server.node.flushes == 1
        client.close()


def test_fua_and_flush_reach_the_node(tmp_path: Path) -> None:
    with exported(tmp_path / "s", slow) as server:
        assert isinstance(server.node, Slow)
        client = Client(str(tmp_path / "s"))
        client.write(0, b"a")
        client.write(0, b"b", peer.FUA)
        client.flush()
        assert server.node.log == ["write", "write fua", "flush"]
        client.close()


@pytest.mark.parametrize("use_asyncio", [False, True], ids=["plain", "asyncio"])
def test_syncs_between_flush_and_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_asyncio: bool
) -> None:
    """The file is synced after FLUSH was sent and before it is answered: once when there is
    something new, whichever connection wrote it."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    syncs: list[int] = []
    for name in ("fsync", "fdatasync"):
        real = getattr(os, name)

        def sync(fd: int, real: Any = real) -> None:
            real(fd)
            syncs.append(fd)

        monkeypatch.setattr(os, name, sync)

    async def open_file(driver: BaseDriver) -> Node:
        return await FileNode.open(driver, str(image), writable=True)

    with exported(tmp_path / "s", open_file, use_asyncio=use_asyncio):
        first, second = Client(str(tmp_path / "s")), Client(str(tmp_path / "s"))
        assert first.flags & 1 << 8  # multi-conn
        for writer, flusher in ((first, first), (first, second), (second, first)):
            writer.write(4096, os.urandom(4096))
            before = len(syncs)
            flusher.flush()
            assert len(syncs) == before + 1
        writer.write(0, b"x" * 512, peer.FUA)
        assert len(syncs) == before + 2
        first.close()
        second.close()


# -- admission, leaving, stopping
def test_further_clients_wait(tmp_path: Path) -> None:
    with exported(tmp_path / "s", memory, clients=1):
        first = Client(str(tmp_path / "s"))
        assert not first.flags & 1 << 8  # who is alone needs no second connection
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(str(tmp_path / "s"))
        assert not readable(waiting, 0.2)
        first.close()
        assert readable(waiting, 10)
        assert waiting.recv(18) == peer.GREETING
        waiting.close()


def test_ends_with_the_last_client_that_negotiated(tmp_path: Path) -> None:
    with exported(tmp_path / "s", memory, persistent=False) as server:
        assert server.export is not None
        looker = socket.socket(socket.AF_UNIX)
        looker.connect(str(tmp_path / "s"))
        assert looker.recv(18)
        looker.close()
        first, second = Client(str(tmp_path / "s")), Client(str(tmp_path / "s"))
        first.close()
        assert second.read(0, 512) == bytes(512)
        assert not server.export.stopping
        second.close()
        wait_for(lambda: server.export is not None and server.export.stopping, "the end")


@BOTH
def test_slow_handshakes_are_cut_off(tmp_path: Path, use_asyncio: bool) -> None:
    with exported(
        tmp_path / "s", memory, use_asyncio=use_asyncio, clients=1, handshake_seconds=0.2
    ):
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(str(tmp_path / "s"))
        silent.settimeout(10)
        assert silent.recv(18) == peer.GREETING
        silent.sendall(b"\0\0")
        assert silent.recv(1) == b""
        silent.close()
        client = Client(str(tmp_path / "s"))  # whose turn it is now
        time.sleep(0.3)
        assert client.read(0, 1) == b"\0"
        client.close()


def test_clients_that_vanish(tmp_path: Path) -> None:
    with exported(tmp_path / "s", slow) as server:
        for _ in range(10):
            client = Client(str(tmp_path / "s"))
            client.sock.sendall(peer.request(peer.READ, 1, 0, 4 << 20) * 8)
            client.sock.sendall(peer.request(peer.WRITE, 1, 0, data=b"x" * 100000)[:50000])
            client.sock.close()
        export = server.export
        assert export is not None
        wait_for(lambda: not export.connections, "all to be gone")
        assert export.budget.used == 0
        Client(str(tmp_path / "s")).close()


@BOTH
def test_a_graceful_stop_answers_what_was_read(tmp_path: Path, use_asyncio: bool) -> None:
    with exported(tmp_path / "s", slow, use_asyncio=use_asyncio) as server:
        node, export = server.node, server.export
        assert isinstance(node, Slow) and export is not None
        client = Client(str(tmp_path / "s"))
        node.held = Future()
        client.sock.sendall(
            b"".join(peer.request(peer.WRITE, i, i << 16, data=b"y" * 4096) for i in range(4))
        )
        wait_for(lambda: node.busy > 0, "the writes to begin")
        node.driver.from_thread(export.stop)
        assert not readable(client.sock, 0.05)
        held, node.held = node.held, None
        node.driver.from_thread(held.set)
        assert {client.reply()[:2] for _ in range(4)} == {(i, 0) for i in range(4)}
        assert client.sock.recv(1) == b""
        client.sock.close()
        wait_for(lambda: node.flushes > 0, "the last flush")
        assert all(node.data[i << 16 : (i << 16) + 4096] == b"y" * 4096 for i in range(4))


def test_a_client_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    with exported(tmp_path / "s", counted) as server:
        export, node = server.export, server.node
        assert export is not None and isinstance(node, Counted)
        greedy, other = Client(str(tmp_path / "s")), Client(str(tmp_path / "s"))
        greedy.sock.setblocking(False)
        request = peer.request(peer.READ, 1, 0, SIZE) * 100
        try:
            while True:
                greedy.sock.send(request)
        except BlockingIOError:
            pass
        for _ in range(20):
            assert other.read(4096, 4096) == bytes(4096)
        assert export.budget.used <= (64 << 20) + (1 << 20)
        before = node.bytes_read
        greedy.sock.close()
        wait_for(lambda: len(export.connections) == 1, "it to be gone")
        # what else it had asked for, hundreds of GiB, is not read any more
        assert node.bytes_read - before <= 64 << 20
        other.close()


def test_a_client_that_never_reads_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nobody wants its memory it may take its time."""
    monkeypatch.setattr("diskwright.export.nbd_channel.STALL_SECONDS", 0.3)
    left: list[str] = []
    with exported(tmp_path / "s", memory, budget=12 << 20) as server:
        export = server.export
        assert export is not None
        export.on_left = left.append
        greedy = Client(str(tmp_path / "s"))
        greedy.sock.sendall(peer.request(peer.READ, 1, 0, SIZE) * 4)
        wait_for(lambda: export.budget.used >= SIZE, "its reads to begin")
        time.sleep(0.5)
        assert not left
        other = Client(str(tmp_path / "s"))
        assert other.read(0, SIZE) == bytes(SIZE)
        assert left == ["the other side does not read what is sent"]
        other.close()
        greedy.sock.close()


# -- the name of the socket
def test_the_socket_appears_when_it_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    seen: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if path.exists():
                probe = socket.socket(socket.AF_UNIX)
                try:
                    probe.connect(str(path))
                except OSError as error:
                    seen.append(str(error))
                probe.close()

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        listener = listen_unix(str(path))
        path.unlink()
        listener.close()
    stop.set()
    watcher.join()
    assert [text for text in seen if "refused" in text and not stop] == []
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = listen_unix(str(path))
    with pytest.raises(FileExistsError):
        listen_unix(str(path))
    listener.close()
    listen_unix(str(path)).close()  # left behind by a server that was killed
    path.unlink()
    path.write_text("a file of somebody's")
    with pytest.raises(OSError):
        listen_unix(str(path))
    assert path.read_text() == "a file of somebody's"
    assert os.listdir(tmp_path) == ["s"]


# -- the budget
def test_budget_is_granted_in_order() -> None:
    driver = Driver()
    total = Budget(100)
    one, two = Budget(60, total), Budget(60, total)
    order: list[str] = []

    async def want(name: str, budget: Budget, count: int) -> None:
        await budget.acquire(count)
        order.append(name)

    async def main() -> None:
        assert one.take(50) and not one.take(20) and two.take(50)
        tasks = [driver.spawn(want("a", one, 30)), driver.spawn(want("b", two, 5))]
        await driver.turn()
        await driver.turn()
        assert order == [] and total.contended is True
        one.release(50)
        await tasks[0]
        await tasks[1]
        assert order == ["a", "b"] and total.used == 85
        lost = driver.spawn(want("c", two, 60))
        await driver.turn()
        await driver.turn()
        lost.cancel()
        with pytest.raises(Cancelled):
            await lost
        assert not two.contended and not total.contended
        two.release(55)
        one.release(30)
        assert (one.used, two.used, total.used) == (0, 0, 0)
        assert one.take(1000) and total.used == 1000  # alone, whatever its size
        one.release(1000)

    driver.run(main())
    driver.close()
