"""NBD servers of others, each a process of its own on a unix socket."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers import find_peer


def listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return os.path.exists(path) and probe.connect_ex(path) == 0


class Server:
    """``command`` (with SOCKET where the socket's path goes) until :meth:`end`.  It can be killed
    and started again."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.path = str(folder / "nbd.sock")
        self.command = [find_peer(command[0]), *command[1:]]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        if os.path.exists(self.path):
            os.unlink(self.path)
        command = [word.replace("SOCKET", self.path) for word in self.command]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 20
        while not listens(self.path):
            assert self.process.poll() is None, self.process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def pause(self) -> subprocess.Popen[bytes]:
        """Stop it, as SIGCONT would undo; none of its threads runs any more."""
        process = self.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        return process

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.kill()

    def options(self, export: str = "", **more: Any) -> dict[str, Any]:
        """How to open it, for writing."""
        named = {key.replace("_", "-"): value for key, value in more.items()}
        return {"server.type": "unix", "server.path": self.path, "export": export, **named}


def nbdkit(folder: Path, *words: str) -> Server:
    return Server(folder, "nbdkit", "-f", "-U", "SOCKET", *words)


def qemu_nbd(folder: Path, *words: str) -> Server:
    return Server(folder, "qemu-nbd", "-k", "SOCKET", "-t", "-e", "8", "-x", "disk", *words)


@contextmanager
def nbd_server(folder: Path, disk: Path) -> Iterator[dict[str, Any]]:
    """The reference implementation, which goes into the background and makes a process for each
    client; how to open ``disk`` there."""
    path, pid = folder / "nbd.sock", folder / "pid"
    about = f"[generic]\nunixsock={path}\nallowlist=true\n[disk]\nexportname={disk}\n"
    (folder / "config").write_text(about + "flush=true\nfua=true\ntrim=true\n")
    words = ["-C", str(folder / "config"), "-p", str(pid)]
    subprocess.run([find_peer("nbd-server"), *words], check=True, capture_output=True)
    deadline = time.monotonic() + 20
    while not (listens(str(path)) and pid.exists() and pid.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    try:
        yield {"server.type": "unix", "server.path": str(path), "export": "disk"}
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
