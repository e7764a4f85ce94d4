"""Daemons of ours and of QEMU's, and a plain client."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "src"
OURS = [sys.executable, "-m", "diskwright", "daemon"]
THEIRS = ["qemu-storage-daemon"]

needs_qsd = pytest.mark.skipif(
    not shutil.which("qemu-storage-daemon"), reason="qemu-storage-daemon is not installed"
)
needs_unix = pytest.mark.skipif(sys.platform == "win32", reason="no unix sockets")


class Client:
    """Sends commands and keeps what comes back."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(20)
        self.sock = sock
        self.file = sock.makefile("rwb", 0)
        self.events: list[dict[str, Any]] = []
        self.greeting = self.read()

    def read(self) -> dict[str, Any]:
        line = self.file.readline()
        assert line, "the daemon closed the connection"
        found: dict[str, Any] = json.loads(line)
        return found

    def send(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        """The reply to a command."""
        command: dict[str, Any] = {"execute": name}
        if arguments is not None:
            command["arguments"] = arguments
        self.file.write(json.dumps(command).encode() + b"\n")
        while True:
            found = self.read()
            if "event" not in found:
                return found
            self.events.append(found)

    def do(self, name: str, **arguments: Any) -> Any:
        """The result of a command whose members have hyphens."""
        found = self.send(name, {key.replace("_", "-"): part for key, part in arguments.items()})
        assert "return" in found, found
        return found["return"]


@contextmanager
def daemon(argv: list[str], cwd: Path, monitors: int = 1) -> Iterator[tuple[Any, list[Client]]]:
    """A daemon that runs in ``cwd``, and a client of each of its monitors."""
    ends = [socket.socketpair() for _ in range(monitors)]
    words = list(argv)
    for i, (_, end) in enumerate(ends):
        words += ["--chardev", f"socket,id=m{i},fd={end.fileno()}", "--monitor", f"m{i}"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(
        words, cwd=cwd, env=environment, pass_fds=[end.fileno() for _, end in ends]
    )
    clients: list[Client] = []
    try:
        for _, end in ends:
            end.close()
        clients += [Client(mine) for mine, _ in ends]
        for client in clients:
            assert client.send("qmp_capabilities") == {"return": {}}
        yield process, clients
        if process.poll() is None:
            process.terminate()
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for client in clients:
            client.file.close()
        for mine, _ in ends:
            mine.close()
