"""Monitors in this process: order, out-of-band commands, clients that are slow or hostile."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from diskwright.engine.kernel import Future
from diskwright.monitor import all_commands, session
from diskwright.monitor.commands import COMMANDS, command
from diskwright.monitor.daemon import Daemon
from diskwright.monitor.session import QUEUE, Monitor
from monitor.inside import Peer, with_peers
from monitor.running import needs_unix

pytestmark = needs_unix
all_commands()


@pytest.fixture
def gate() -> Iterator[list[Future[None]]]:
    """Commands ``x-wait``, which waits, and ``x-now``, which may be out of band."""
    waiting: list[Future[None]] = []

    @command("x-wait")
    async def x_wait(monitor: Monitor, number: int) -> int:
        """Wait."""
        future: Future[None] = Future()
        waiting.append(future)
        await future
        return number

    @command("x-now", oob=True)
    def x_now(monitor: Monitor) -> None:
        """Do not wait."""

    yield waiting
    for name in ("x-wait", "x-now"):
        del COMMANDS[name]


def test_out_of_band_passes_what_waits(gate: list[Future[None]]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.hear()
        await peer.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert await peer.hear() == {"return": {}}
        for number in range(3):
            await peer.send({"execute": "x-wait", "arguments": {"number": number}, "id": number})
        await peer.send({"exec-oob": "x-now", "id": "oob"})
        assert await peer.hear() == {"return": {}, "id": "oob"}
        for number in range(3):
            while not gate:
                await daemon.driver.turn()
            gate.pop().set()
            assert await peer.hear() == {"return": number, "id": number}

    with_peers(talk)


def test_no_more_is_read_than_may_wait(gate: list[Future[None]]) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.hear()
        await peer.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert await peer.hear() == {"return": {}}
        (monitor,) = daemon.monitors
        for number in range(30):
            await peer.send({"execute": "x-wait", "arguments": {"number": number}})
        for number in range(30):
            while not gate:
                await daemon.driver.turn()
            assert len(monitor._queue) <= QUEUE
            gate.pop().set()
            assert await peer.hear() == {"return": number}

    with_peers(talk)


def test_monitors_take_turns_and_negotiate_for_themselves(gate: list[Future[None]]) -> None:
    async def talk(daemon: Daemon, one: Peer, other: Peer) -> None:
        for peer in (one, other):
            await peer.hear()
        await one.send({"execute": "qmp_capabilities"})
        assert await one.hear() == {"return": {}}
        await one.send({"execute": "x-wait", "arguments": {"number": 1}})
        while not gate:
            await daemon.driver.turn()
        await other.send({"execute": "query-version"})
        gate.pop().set()
        assert await one.hear() == {"return": 1}
        refused = await other.hear()
        assert refused is not None and refused["error"]["class"] == "CommandNotFound"

    with_peers(talk, 2)


def test_many_commands_at_once_and_a_client_that_leaves() -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.hear()
        await peer.send({"execute": "qmp_capabilities"})
        assert await peer.hear() == {"return": {}}
        count = 300
        sent = b"".join(
            b'{"execute":"query-commands","id":%d}\n}' % number for number in range(count)
        )
        sending = daemon.driver.spawn(peer.send(sent))
        for number in range(count):
            answer = await peer.hear()
            assert answer is not None and answer["id"] == number
            stray = await peer.hear()
            assert stray is not None and "JSON parse error" in stray["error"]["desc"]
        await sending
        await peer.send(b'{"execute":"query-commands"')
        peer.sock.shutdown(socket.SHUT_WR)
        assert await peer.hear() is None
        while daemon.monitors:
            await daemon.driver.turn()

    with_peers(talk)


def test_a_client_that_reads_nothing_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 200_000
    monkeypatch.setattr(session, "UNREAD", limit)

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.hear()
        await peer.send({"execute": "qmp_capabilities"})
        assert await peer.hear() == {"return": {}}
        (monitor,) = daemon.monitors
        count = 30
        sending = daemon.driver.spawn(peer.send(b'{"execute":"query-qmp-schema"}' * count))
        most = 0
        for _ in range(5_000):
            await daemon.driver.turn()
            if most == len(monitor._out) > limit:
                break
            most = len(monitor._out)
        assert limit < most < limit + (1 << 17)
        for _ in range(count):
            answer = await peer.hear()
            assert answer is not None and "return" in answer
        await sending

    with_peers(talk)
