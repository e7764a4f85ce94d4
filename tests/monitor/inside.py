"""A daemon and its clients in one driver of this process."""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from diskwright.engine.kernel import Driver
from diskwright.monitor.chardev import Chardev, run
from diskwright.monitor.daemon import Daemon


class Peer:
    """A client in the same driver."""

    def __init__(self, driver: Driver, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.driver, self.sock, self.buffer = driver, sock, b""
        self.events: list[dict[str, Any]] = []

    async def send(self, data: bytes | dict[str, Any]) -> None:
        if isinstance(data, dict):
            data = json.dumps(data).encode()
        while data:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                await self.driver.writable(self.sock.fileno())

    async def hear(self) -> dict[str, Any] | None:
        while b"\n" not in self.buffer:
            try:
                found = self.sock.recv(1 << 16)
            except BlockingIOError:
                await self.driver.readable(self.sock.fileno())
                continue
            if not found:
                return None
            self.buffer += found
        line, self.buffer = self.buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer


    async def ask(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply to a command; the events before it are kept."""
        await self.send({"execute": name, "arguments": arguments or {}})
        while True:
            found = await self.hear()
            assert found is not None
            if "event" not in found:
                return found
            self.events.append(found)

    async def do(self, name: str, /, **arguments: Any) -> Any:
        """The result of a command whose members have hyphens."""
        found = await self.ask(name, {k.replace("_", "-"): part for k, part in arguments.items()})
        assert "return" in found, found
        return found["return"]

    async def told(self, name: str = "JOB_STATUS_CHANGE", **data: Any) -> dict[str, Any]:
        """Wait for an event that has ``data`` in it, unless it has come already."""
        at = 0
        while True:
            while at < len(self.events):
                one = self.events[at]
                if one["event"] == name and data.items() <= one["data"].items():
                    return one
                at += 1
            found = await self.hear()
            assert found is not None
            self.events.append(found)

    async def meet(self) -> None:
        """The beginning of a session."""
        await self.hear()
        await self.do("qmp_capabilities")

    def take(self) -> list[str]:
        """The events so far: of a job's states their names alone."""
        found = [one["data"].get("status", one["event"]) for one in self.events]
        self.events.clear()
        return found


def with_peers(talk: Callable[..., Awaitable[None]], count: int = 1) -> None:
    """Run ``talk(daemon, peer, ...)`` beside a daemon with ``count`` monitors."""
    driver = Driver()
    pairs = [socket.socketpair() for _ in range(count)]

    async def main() -> None:
        daemon = Daemon(driver)
        tasks = [
            driver.spawn(run(daemon, Chardev(str(i), client=theirs), False))
            for i, (_, theirs) in enumerate(pairs)
        ]
        peers = [Peer(driver, ours) for ours, _ in pairs]
        try:
            await talk(daemon, *peers)
        finally:
            daemon.stop()
            await daemon.until_stopped()
            for task in tasks:
                task.cancel()
                await task
            for peer in peers:
                driver.forget(peer.sock.fileno())

    try:
        driver.run(main())
    finally:
        driver.close()
        for pair in pairs:
            for sock in pair:
                sock.close()
