"""Connections to NBD servers that end, hang or lie, and what of it is told to whom."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import FUA
from diskwright.engine.kernel import BaseDriver, Cancelled, Future
from diskwright.errors import FlushFailed, NodeClosed, PeerError
from diskwright.protocols import nbd_links, nbdnode
from diskwright.protocols.nbd import open_nbd
from sansio import nbd_script as s

from .nbd_servers import Server, nbdkit
from .test_nbd import PLAIN, opened, run

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def server(tmp_path: Path, disk: Path) -> Iterator[Server]:
    """Reads of the last half take a while."""
    with nbdkit(tmp_path, "file", str(disk)) as found:
        yield found


@contextmanager
def slow(folder: Path, disk: Path, seconds: str = "300ms") -> Iterator[Server]:
    with nbdkit(
        folder, "--filter=delay", "file", str(disk), f"rdelay={seconds}", f"wdelay={seconds}"
    ) as found:
        yield found


def test_killed(driver: BaseDriver, tmp_path: Path, disk: Path) -> None:
    """What was asked fails, and what is asked later tries to connect once."""
    with slow(tmp_path, disk, "10") as server:
        node = opened(driver, server)

        async def read() -> None:
            reading = driver.start(node.read([0], [512]))
            await driver.sleep(0.05)
            server.kill()
            await reading

        with pytest.raises(PeerError, match="the connection was lost") as raised:
            run(driver, read())
        assert raised.value.peer == server.path
        with pytest.raises(PeerError, match="Failed to connect"):
            run(driver, node.read([0], [512]))
        server.command = [word for word in server.command if "delay" not in word]
        server.start()
        assert bytes(run(driver, node.read([1], [3]))[0]) == b"\1\2\3"
        run(driver, node.close())


def test_requests_wait_for_the_connection(driver: BaseDriver, tmp_path: Path, disk: Path) -> None:
    """Reads and writes that were on their way are sent again, each into its own buffer."""
    with slow(tmp_path, disk) as server:
        node = opened(driver, server, reconnect_delay=20)

        async def both() -> bytes:
            view = memoryview(bytearray(4))
            writing = driver.start(node.write([SIZE - 9], [b"written"]))
            await node.read([1], [4], [view])
            await writing
            await node.flush()
            return bytes(view)

        def restart() -> None:
            server.kill()
            server.start()

        driver.later(0.1, restart)
        assert run(driver, both()) == b"\1\2\3\4"
        run(driver, node.close())
    assert disk.read_bytes()[-9:-2] == b"written"


def test_a_flush_does_not_lie(driver: BaseDriver, server: Server) -> None:
    """A server that was started anew may not have what was answered and not flushed; without
    reconnect-delay nothing is sent to it again."""
    node = opened(driver, server)

    def read() -> bytes:
        with suppress(PeerError):  # the first one may find out that the connection is lost
            run(driver, node.read([0], [7]))
        return bytes(run(driver, node.read([0], [7]))[0])

    run(driver, node.write([0], [b"durable"]))
    run(driver, node.flush())
    server.kill()
    server.start()
    assert read() == b"durable"
    run(driver, node.flush())
    run(driver, node.write([0], [b"perhaps"]))
    server.kill()
    server.start()
    read()
    with pytest.raises(PeerError, match="not flushed, which the server may have lost"):
        run(driver, node.flush())
    with pytest.raises(FlushFailed):
        run(driver, node.flush())
    with pytest.raises(FlushFailed):
        run(driver, node.close())
    assert node.closed


def test_what_was_not_flushed_is_sent_again(driver: BaseDriver, tmp_path: Path) -> None:
    """In its order, to a server that has forgotten everything; and nothing else is."""
    with nbdkit(tmp_path, "memory", str(SIZE)) as server:
        node = opened(driver, server, reconnect_delay=20)
        run(driver, node.write([0], [b"flushed"]))
        run(driver, node.flush())

        async def change() -> None:
            await node.write([4096, 8192], [b"a" * 4096, b"b" * 4096])
            await node.zero([5000], [1000])
            await node.write([5500], [b"above"])
            await node.write([9000], [b"durable"], FUA)  # the older b's must not come back
            await node.discard([65536], [4096])

        run(driver, change())
        want = bytes(run(driver, node.read([4096], [8192]))[0])
        assert b"durable" in want and b"above" in want
        for _ in range(2):  # a loss while nothing else was asked for is like any other
            server.kill()
            server.start()
            assert bytes(run(driver, node.read([0], [7]))[0]) == bytes(7)
        run(driver, node.flush())
        assert bytes(run(driver, node.read([4096], [8192]))[0]) == want
        server.kill()
        server.start()
        assert bytes(run(driver, node.read([4096], [8192]))[0]) == bytes(8192)
        run(driver, node.close())


def test_it_cannot_be_sent_again(driver: BaseDriver, tmp_path: Path) -> None:
    """Then the next flush fails, and every later one; reading goes on."""
    with nbdkit(tmp_path, "memory", str(SIZE)) as server:
        node = opened(driver, server, reconnect_delay=20)
        run(driver, node.write([0], [b"lost"]))
        server.kill()
        server.command[4:4] = ["--filter=error"]
        server.command.append("error-pwrite=EIO")
        server.command.append("error-pwrite-rate=100%")
        server.start()
        assert bytes(run(driver, node.read([0], [4]))[0]) == bytes(4)
        with pytest.raises(PeerError, match="not flushed, which the server may have lost"):
            run(driver, node.flush())
        with pytest.raises(FlushFailed):
            run(driver, node.close())


@PLAIN
def test_how_much_is_kept(
    driver: BaseDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdnode, "LIMIT", 10_000)
    with nbdkit(tmp_path, "memory", str(SIZE)) as server:
        node = opened(driver, server, reconnect_delay=20)
        unflushed = node.links.unflushed
        assert unflushed is not None
        sizes = []
        for _ in range(6):
            run(driver, node.write([0], [bytes(4000)]))
            sizes.append(unflushed.size // 4000)
        assert sizes == [1, 2, 0, 1, 2, 0]
        run(driver, node.close())


def test_everything_in_flight(driver: BaseDriver, tmp_path: Path) -> None:
    """Requests of every kind are on their way when the server is killed."""
    late = [f"delay-{what}=300ms" for what in ("read", "write", "zero", "trim", "extents")]
    with nbdkit(tmp_path, "--filter=delay", "memory", str(SIZE), *late) as server:
        node = opened(driver, server, reconnect_delay=20)
        block = 1 << 16

        async def work() -> list[int]:
            works: list[Future[Any]] = [
                driver.start(node.write([at * block], [bytes([at]) * block])) for at in range(1, 5)
            ]
            works.append(driver.start(node.zero([6 * block], [block])))
            works.append(driver.start(node.discard([7 * block], [block])))
            works.append(driver.start(node.extents(0, SIZE)))
            works.append(driver.start(node.read([9 * block], [block])))
            works.append(driver.start(node.flush()))
            for one in works:
                await one
            await node.flush()
            found = await node.read([at * block for at in range(6)], [1] * 6)
            return [part[0] for part in found]

        def restart() -> None:
            server.kill()
            server.start()

        driver.later(0.15, restart)
        assert run(driver, work()) == [0, 1, 2, 3, 4, 0]
        run(driver, node.close())


@PLAIN
def test_a_successor_is_not_taken_for_the_same_server(
    driver: BaseDriver, tmp_path: Path, disk: Path
) -> None:
    """A further connection counts only once an older one has shown that it goes on."""
    with slow(tmp_path, disk, "200ms") as server:
        node = opened(driver, server, connections=2)
        run(driver, node.write([0], [b"perhaps"]))
        first = server.pause()
        server.start()  # under the same name

        async def read() -> None:
            works = [driver.start(node.read([at], [1])) for at in range(4)]
            driver.later(0.3, lambda: first.send_signal(signal.SIGKILL))
            for one in works:
                with suppress(PeerError):
                    await one

        run(driver, read())
        first.communicate()
        assert node.links.broken is not None
        with pytest.raises(PeerError, match="not flushed, which the server may have lost"):
            run(driver, node.flush())
        with pytest.raises(FlushFailed):
            run(driver, node.close())


@PLAIN
def test_waiting_ends(
    driver: BaseDriver, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on each request tries once."""
    node = opened(driver, server, reconnect_delay=1)
    server.kill()
    begun = time.monotonic()
    with pytest.raises(PeerError, match="Failed to connect"):
        run(driver, node.read([0], [512]))
    assert time.monotonic() - begun > 0.4
    tried = 0
    connect = nbd_links.establish

    async def counted(*arguments: Any) -> Any:
        nonlocal tried
        tried += 1
        return await connect(*arguments)

    monkeypatch.setattr(nbd_links, "establish", counted)
    with pytest.raises(PeerError, match="Failed to connect"):
        run(driver, node.read([0], [512]))
    assert tried == 1
    run(driver, node.close())


@PLAIN
def test_another_export(driver: BaseDriver, server: Server, disk: Path) -> None:
    node = opened(driver, server, reconnect_delay=1)
    server.kill()
    os.truncate(disk, SIZE // 2)
    server.start()
    with pytest.raises(PeerError, match="the export is another one"):
        run(driver, node.read([0], [512]))
    run(driver, node.close())


def test_a_server_that_comes_late(driver: BaseDriver, server: Server) -> None:
    server.kill()
    driver.later(0.2, server.start)
    node = opened(driver, server, open_timeout=20)
    run(driver, node.close())


def test_a_cancelled_read(driver: BaseDriver, server: Server) -> None:
    """It ends without an answer, its buffer is left alone, and the connection goes on."""
    node = opened(driver, server, connections=1)

    async def work() -> None:
        process = server.pause()
        view = memoryview(bytearray(b"mine" * 128))
        reading = driver.spawn(node.read([512], [512], [view]))
        await driver.sleep(0.05)
        reading.cancel()
        with pytest.raises(Cancelled):
            await reading
        process.send_signal(signal.SIGCONT)
        assert bytes((await node.read([5], [2]))[0]) == b"\5\6"
        assert bytes(view) == b"mine" * 128
        (link,) = node.links.links
        while link.trips:  # the server may have answered the later one first
            await driver.sleep(0.01)
        assert not link.load

    run(driver, work())
    run(driver, node.close())


def test_a_cancelled_write(
    driver: BaseDriver, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for, since it may still happen; of a server that hangs not for ever."""
    monkeypatch.setattr(nbd_links, "_GRACE_SECONDS", 60)
    with nbdkit(tmp_path, "--filter=delay", "file", str(disk), "wdelay=200ms") as server:
        node = opened(driver, server)

        async def write() -> bool:
            writing = driver.spawn(node.write([0], [b"x"]))
            await driver.sleep(0.05)
            writing.cancel()
            with pytest.raises(Cancelled):
                await writing
            return bool(node.links.links)

        assert run(driver, write())
        assert disk.read_bytes()[:1] == b"x"
        server.pause()
        monkeypatch.setattr(nbd_links, "_GRACE_SECONDS", 0.1)
        assert not run(driver, write())
        server.kill()
        with pytest.raises(OSError):
            run(driver, node.close())


@PLAIN
def test_a_server_that_hangs(driver: BaseDriver, server: Server) -> None:
    node = opened(driver, server, timeout=1)
    server.pause()
    with pytest.raises(PeerError, match="nothing was answered for 1 seconds"):
        run(driver, node.read([0], [512]))
    run(driver, node.close())


def test_a_forked_child_has_no_disk(driver: BaseDriver, server: Server) -> None:
    node = opened(driver, server)
    child = os.fork()
    if not child:
        try:
            run(driver, node.read([0], [1]))
        except NodeClosed:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(run(driver, node.read([3], [1]))[0]) == b"\3"
    run(driver, node.close())


# -- a server of our own making
READY = (
    s.greeting()
    + s.rep(s.EXTENDED, s.UNSUP)
    + s.rep(s.STRUCTURED, s.ACK)
    + s.rep(s.SET_META, s.ACK)
    + s.export(SIZE, s.HAS_FLAGS | s.FLUSH)
    + s.rep(s.GO, s.ACK)
)


@contextmanager
def saying(path: Path, *answers: Callable[[int], bytes]) -> Iterator[dict[str, str]]:
    """A server that gives the n-th client's first request the n-th answer, and closes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        for answer in answers:
            client, _ = listener.accept()
            with client:
                client.sendall(READY)
                data = b""
                while (at := data.rfind(b"\x25\x60\x95\x13")) < 0 or len(data) < at + 28:
                    part = client.recv(4096)
                    if not part:
                        break
                    data += part
                else:
                    (cookie,) = struct.unpack_from(">Q", data, at + 8)
                    client.sendall(answer(cookie))
                    while client.recv(4096):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield {"server.type": "unix", "server.path": str(path), "export": "disk"}
    finally:
        thread.join(20)
        listener.close()


@PLAIN
def test_a_server_that_lies(driver: BaseDriver, tmp_path: Path) -> None:
    """The error says who, and what is wrong; nothing is tried again unless it was asked for."""
    path = tmp_path / "s"
    with saying(path, lambda k: s.chunk(k, s.DATA, s.data(1 << 40, b"x"))) as options:
        node = run(driver, open_nbd(driver, dict(options)))
        with pytest.raises(PeerError) as raised:
            run(driver, node.read([0], [512]))
        run(driver, node.close())
    text = str(raised.value)
    assert "breaks the protocol: it answers a read with 1 bytes that are outside of it" in text
    assert f"NBD server at '{path}', export 'disk'" in text


def test_a_server_that_leaves(driver: BaseDriver, tmp_path: Path) -> None:
    """It says that it shuts down: the request is for the next one."""
    good = s.data(0, b"x" * 512)
    path = tmp_path / "s"
    with saying(
        path,
        lambda k: s.chunk(k, s.ERROR, s.error(108)),
        lambda k: s.chunk(k, s.DATA, good),
        lambda k: s.chunk(k, s.ERROR, s.error(28, b"it is full")),
    ) as options:
        node = run(driver, open_nbd(driver, {**options, "reconnect-delay": 9}))
        assert bytes(run(driver, node.read([0], [512]))[0]) == b"x" * 512
        run(driver, node.close())
        node = run(driver, open_nbd(driver, dict(options)))
        with pytest.raises(OSError, match="the server says: it is full") as raised:
            run(driver, node.write([0], [b"x"]))
        assert raised.value.errno == errno.ENOSPC
        node.read_only = True
        run(driver, node.close())
