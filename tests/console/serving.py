"""Servers that say what a test wants, and daemons behind a path."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import diskwright
from monitor.running import OURS, THEIRS, daemon, needs_qsd

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}}, "capabilities": []}}

both = pytest.mark.parametrize(
    "argv", [OURS, pytest.param(THEIRS, marks=needs_qsd)], ids=["ours", "theirs"]
)


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


@contextmanager
def says(*answers: bytes) -> Iterator[socket.socket]:
    """A socket to a server that greets, answers ``qmp_capabilities``, and then sends the next of
    ``answers`` for each line that it hears."""
    mine, other = socket.socketpair()

    def serve() -> None:
        file = other.makefile("rwb", 0)
        try:
            file.write(line(GREETING))
            for answer in (line({"return": {}, "id": 1}), *answers):
                if not file.readline():
                    break
                file.write(answer)
        except OSError:
            pass  # the client had enough
        finally:
            other.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield mine
    finally:
        mine.close()
        other.close()
        thread.join()


@contextmanager
def served(argv: list[str], folder: Path) -> Iterator[tuple[str, Any]]:
    """A daemon with the node ``disk`` (64 MiB), exported over NBD as ``disk`` by ``nbd.sock``;
    the path of its second monitor, and a client of the first."""
    diskwright.create(folder / "disk.qcow2", format="qcow2", size=64 << 20)
    node = "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"
    words = ["--chardev", "socket,id=s,path=qmp.sock,server=on,wait=off", "--monitor", "s"]
    words += ["--blockdev", node, "--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
    words += ["--export", "nbd,id=e,node-name=disk,name=disk,writable=on"]
    with daemon([*argv, *words], folder) as (_, (client,)):
        yield str(folder / "qmp.sock"), client
