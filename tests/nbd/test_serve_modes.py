"""``serve`` beyond one image at one address: overlays, several images, sockets of others."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import diskwright
from nbd.peer import Client
from nbd.serving import ENVIRONMENT, Serve, wait_for
from nbd.test_serve import need, run

MIB = 1 << 20


def disk(path: Path, byte: bytes = b"b") -> Path:
    path.write_bytes(byte * MIB)
    return path


# -- overlays
def test_a_throw_away_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = disk(tmp_path / "disk")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(tmp_path / "tmp"))
    server = Serve(image, "-s")
    assert not list((tmp_path / "tmp").iterdir())  # kill -9 would leave nothing
    client = Client(str(server.socket))
    client.write(4096, b"new" * 1000)
    client.flush()
    assert client.read(4096, 3000) == b"new" * 1000 and client.read(0, 4096) == b"b" * 4096
    client.close()
    assert server.ended() == (0, "")
    assert image.read_bytes() == b"b" * MIB


def test_a_kept_overlay_goes_on(tmp_path: Path) -> None:
    need("qemu-img")
    image, overlay = disk(tmp_path / "disk"), tmp_path / "new.qcow2"
    for turn in (b"1", b"2"):
        server = Serve(image, f"--overlay={overlay}")
        client = Client(str(server.socket))
        assert client.read(0, 1) == (b"b" if turn == b"1" else b"1")
        client.write(0, turn)
        client.close()
        assert server.ended() == (0, "")
    assert image.read_bytes() == b"b" * MIB
    assert "backing file: disk (actual" in run("qemu-img", "info", overlay)
    with diskwright.open(overlay) as found:
        assert found.read_at(0, 2) == b"2b"
    other = disk(tmp_path / "other")
    status, said = Serve(other, f"--overlay={overlay}").ended()
    assert status == 1 and "is no overlay over" in said
    assert Serve(image, f"--overlay={image}", format="raw").ended()[0] == 1
    assert image.read_bytes() == b"b" * MIB


def test_a_snapshot_under_an_overlay(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=MIB)
    with diskwright.open(path, writable=True) as found:
        found.write_at(0, b"before")
        found.snapshots.create("one")
        found.write_at(0, b"behind")
    before = path.read_bytes()
    server = Serve(path, "-l", "one", "--overlay", format="qcow2")
    client = Client(str(server.socket))
    client.write(6, b"!")
    assert client.read(0, 8) == b"before!\0"
    client.close()
    assert server.ended() == (0, "")
    assert path.read_bytes() == before


def test_a_part_of_a_disk(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    diskwright.create(image, format="qcow2", size=MIB)
    server = Serve(image, "-o", "512k", format="qcow2")
    client = Client(str(server.socket))
    assert client.size == MIB // 2
    client.write(0, b"here")
    client.close()
    assert server.ended() == (0, "")
    with diskwright.open(image) as found:
        assert found.read_at(MIB // 2, 4) == b"here"
    status, said = Serve(image, "-o", "2M", format="qcow2").ended()
    assert status == 1 and "Offset (2097152) cannot be greater than size" in said


# -- sockets of others
@contextmanager
def notified(folder: Path) -> Iterator[tuple[str, socket.socket]]:
    """Where a supervisor is told of states."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(30)
        yield str(folder / "notify"), sock


LAUNCH = """
import os, socket, sys
sockets = []
for path in sys.argv[1:3]:
    sockets.append(socket.socket(socket.AF_UNIX))
    sockets[-1].bind(path)
    sockets[-1].listen()
for number, sock in enumerate(sockets, 3):
    os.dup2(sock.fileno(), number + 20)
for number in (3, 4):
    os.dup2(number + 20, number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="one:two")
os.execv(sys.executable, [sys.executable, "-m", "diskwright", "serve", *sys.argv[3:]])
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sockets_of_a_supervisor(tmp_path: Path, workers: str) -> None:
    """Two of them, each in use; READY and STOPPING are told."""
    paths = [tmp_path / "s1", tmp_path / "s2"]
    images = [disk(tmp_path / name) for name in "ab"]
    words = ["-t", "-f", "raw", "--workers", workers, *map(str, images)]
    with notified(tmp_path) as (where, sock):
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *map(str, paths), *words],
            env={**ENVIRONMENT, "NOTIFY_SOCKET": where},
            stderr=subprocess.PIPE,
        )
        assert sock.recv(100) == f"READY=1\nMAINPID={process.pid}".encode()
        for path in paths:
            client = Client(str(path), name=b"b")
            assert client.read(0, 1) == b"b"
            client.close()
        process.terminate()
        assert sock.recv(100) == b"STOPPING=1"
        assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0
    assert all(path.exists() for path in paths)  # they are not ours


def listening_at(path: Path) -> str:
    """What the system says of the unix socket."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return "".join(line for line in lines if line.endswith(f" {path}"))


def test_systemd_socket_activate(tmp_path: Path) -> None:
    need("systemd-socket-activate")
    image, path = disk(tmp_path / "disk"), tmp_path / "s"
    command = ["systemd-socket-activate", "-l", str(path), "-E", "PYTHONPATH", sys.executable]
    process = subprocess.Popen(
        [*command, "-m", "diskwright", "serve", "-f", "raw", str(image)],
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    try:
        # A name comes before somebody listens, and to connect is what starts the server.
        wait_for(lambda: "00010000 0001 01 " in listening_at(path), "the socket")
        client = Client(str(path))
        assert client.read(0, 1) == b"b"
        client.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
