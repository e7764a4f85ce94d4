"""The servers that are compared: how each is started, and what it cost."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
TICKS = os.sysconf("SC_CLK_TCK")

QEMU = {
    "qemu-nbd threads": ["--aio=threads"],
    "qemu-nbd io_uring": ["--aio=io_uring"],
    "qemu-nbd native": ["--aio=native", "--cache=none"],
}
OURS, NBDKIT, CEILING = "diskwright", "nbdkit", "ceiling"
ALL = [OURS, *QEMU, NBDKIT, CEILING]


def version(name: str) -> str:
    """What the server says of itself."""
    tool = {NBDKIT: "nbdkit", OURS: "", CEILING: ""}.get(name, "qemu-nbd")
    if not tool:
        return f"Python {sys.version.split()[0]}"
    out = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    return out.splitlines()[0] if out else "?"


def available(name: str, fmt: str) -> bool:
    """Whether the server is installed and can serve ``fmt``."""
    if name == NBDKIT:
        return fmt == "raw" and shutil.which("nbdkit") is not None
    return name in (OURS, CEILING) or shutil.which("qemu-nbd") is not None


def command(name: str, image: Path, fmt: str, sock: Path, size: int) -> list[str]:
    """How it is started, in the foreground, for several clients one after the other."""
    if name == OURS:
        serve = [sys.executable, "-m", "diskwright", "serve", "-t", "-e", "8"]
        return [*serve, "--policy", "trusted", "-f", fmt, "-k", str(sock), str(image)]
    if name == CEILING:
        return [sys.executable, str(HERE / "ceiling.py"), str(sock), str(size)]
    if name == NBDKIT:
        return ["nbdkit", "-f", "-U", str(sock), "file", str(image)]
    return ["qemu-nbd", "-t", "-e", "8", *QEMU[name], "-f", fmt, "-k", str(sock), str(image)]


class Server:
    """A running server; a context manager."""

    def __init__(self, name: str, image: Path, fmt: str, sock: Path, size: int) -> None:
        self.name, self.sock = name, sock
        sock.unlink(missing_ok=True)
        environment = dict(os.environ, PYTHONPATH=str(SOURCE))
        self.process = subprocess.Popen(
            command(name, image, fmt, sock, size), env=environment, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{name} did not start on {image}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(self.sock))
            except OSError:
                return False
            return len(probe.recv(18)) > 0

    @property
    def uri(self) -> str:
        """For fio."""
        return f"nbd+unix:///?socket={self.sock}"

    def cpu_seconds(self) -> float:
        """User and system time of all threads and of children that ended."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / TICKS

    def peak_kib(self) -> int:
        """The most memory that was resident."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
        return 0

    def flush(self) -> float:
        """Seconds that one FLUSH takes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self.sock))
            sock.recv(18, socket.MSG_WAITALL)
            sock.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, 0))
            sock.recv(10, socket.MSG_WAITALL)
            start = time.perf_counter()
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, 1, 0, 0))
            answer = sock.recv(16, socket.MSG_WAITALL)
            taken = time.perf_counter() - start
            assert len(answer) == 16 and answer[4:8] == bytes(4), answer
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0))
        return taken

    def stop(self) -> None:
        """End it and wait."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
