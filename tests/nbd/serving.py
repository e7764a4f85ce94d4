"""Servers for the tests: the command as a process of its own, and exports on both drivers."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diskwright
from diskwright.engine.aio_driver import AsyncioDriver
from diskwright.engine.kernel import BaseDriver, Driver
from diskwright.engine.node import Node
from diskwright.export.listening import listen_unix
from diskwright.export.nbd_server import Server

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(diskwright.__file__).parent.parent))


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 100) -> None:
    """Poll; a machine under load may take long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"timeout: {what}"
        time.sleep(0.01)


class Serve:
    """``diskwright serve`` on ``image``; the socket is in the image's directory."""

    def __init__(
        self, image: Path, *options: str, format: str = "raw", python: str = sys.executable
    ) -> None:
        self.socket = image.parent / f"{image.name}.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        left_behind = self.socket.exists()  # by a server that was killed
        command = [python, "-m", "diskwright", "serve", "-k", str(self.socket)]
        self.process = subprocess.Popen(
            [*command, "-f", format, *options, str(image)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

        def listens() -> bool:
            if self.process.poll() is not None or not left_behind:
                return self.process.returncode is not None or self.socket.exists()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                return probe.connect_ex(str(self.socket)) == 0

        wait_for(listens, "serve to listen")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it; its status, and all that it wrote."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Wait for it to end by itself."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, (out + err).decode()

    def peak_bytes(self) -> int:
        """The most memory that was resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) << 10


@contextmanager
def serving(image: Path, *options: str, format: str = "raw") -> Iterator[Serve]:
    """A server that ends with status 0 and without a word."""
    server = Serve(image, *options, format=format)
    try:
        yield server
        status, text = server.end()
        assert (status, text) == (0, "")
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


class Exported:
    """An export in a thread of this process."""

    def __init__(self) -> None:
        self.export: Server | None = None
        self.node: Node | None = None
        self.errors: list[BaseException] = []
        self.ready = threading.Event()


@contextmanager
def exported(
    path: Path,
    make: Callable[[BaseDriver], Awaitable[Node]],
    *,
    use_asyncio: bool = False,
    read_only: bool = False,
    **options: Any,
) -> Iterator[Exported]:
    """Serve the node that ``make(driver)`` gives on the socket ``path``."""
    state = Exported()

    async def main(driver: BaseDriver) -> None:
        node = state.node = await make(driver)
        export = state.export = Server(driver, **options)
        export.offer(b"", node, b"", read_only or node.read_only)
        export.on_error = state.errors.append
        listener = listen_unix(str(path))
        state.ready.set()
        try:
            await export.serve(listener)
        finally:
            await node.close()

    def plain() -> None:
        driver = Driver()
        try:
            driver.run(main(driver))
        finally:
            driver.close()

    def bridged() -> None:
        async def inside() -> None:
            driver = AsyncioDriver()
            try:
                await driver.bridge(main(driver))
            finally:
                driver.stop_pool()

        asyncio.run(inside())

    def run() -> None:
        try:
            (bridged if use_asyncio else plain)()
        except BaseException as error:
            state.errors.append(error)
        finally:
            state.ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert state.ready.wait(30)
    try:
        if state.errors:
            raise state.errors[0]
        yield state
    finally:
        if state.export is not None and thread.is_alive():
            state.export.driver.from_thread(state.export.stop)
        thread.join(60)
        assert not thread.is_alive()
    if state.errors:
        raise state.errors[0]


def readable(sock: Any, seconds: float) -> bool:
    """Whether something comes within that time."""
    return bool(select.select([sock], [], [], seconds)[0])
