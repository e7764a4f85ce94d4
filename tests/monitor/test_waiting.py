"""``--trace`` and ``x-debug-query-waiting``: a disk on a server that answers late."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright.errors import DiskError
from monitor.running import SOURCE, Client, needs_unix
from protocols.nbd_servers import nbdkit

pytestmark = needs_unix


def traced(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_daemon_on_a_server_that_hangs(tmp_path: Path) -> None:
    """Asked out of band, by a signal, and by itself when it takes long."""
    words = ["memory", "1M", "--filter=delay", "rdelay=60"]
    mine, end = socket.socketpair()
    with nbdkit(tmp_path, *words) as server:
        node = f"driver=nbd,node-name=far,server.type=unix,server.path={server.path}"
        # Once the monitor answers, all before it is there.
        command = [sys.executable, "-m", "diskwright", "daemon", "--trace", "slow=0.2,file=trace",
                   "--blockdev", node, "--nbd-server", "addr.type=unix,addr.path=near.sock",
                   "--export", "nbd,id=e,node-name=far,name=far",
                   "--chardev", f"socket,id=m,fd={end.fileno()}", "--monitor", "m"]  # fmt: skip
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(SOURCE)},
            pass_fds=[end.fileno()], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        reading = threading.Thread(
            target=use, args=(f"nbd+unix:///far?socket={tmp_path}/near.sock",)
        )
        try:
            end.close()
            client = Client(mine)
            assert client.send("qmp_capabilities", {"enable": ["oob"]}) == {"return": {}}
            reading.start()
            cause = f"an answer of the NBD server at {server.path}"
            until = time.monotonic() + 20
            found: dict[str, Any] = {"text": ""}
            while cause not in found["text"]:
                assert time.monotonic() < until, found
                client.file.write(b'{"exec-oob": "x-debug-query-waiting", "id": 1}\n')
                found = client.read()["return"]
            (request,) = found["requests"]
            assert request["what"] == "a client of the NBD export 'far'"
            (read,) = request["waits-for"]
            assert read["what"].startswith("read on far (nbd") and read["seconds"] >= 0
            assert read["waits-for"][0]["what"] == cause

            text = ""
            while "a request takes more than 0.2 s" not in text or cause not in text:
                text += process.stderr.readline()
            process.send_signal(signal.SIGUSR2)
            while "running: " not in text:
                text += process.stderr.readline()
        finally:
            server.kill()
            process.terminate()
            process.wait(20)
            reading.join()
            process.stderr.close()
            client.file.close()
            mine.close()
    lines = traced(tmp_path / "trace")
    assert lines[0]["event"] == "trace" and lines[0]["pid"] == process.pid
    begun = {one["id"]: one for one in lines if one["event"] == "begin"}
    (read,) = (one for one in begun.values() if one["request"] == "read")
    assert (read["node"], read["offset"], read["count"]) == ("far", 4096, 1)
    ended = next(one for one in lines if one["event"] == "end" and one["id"] == read["id"])
    assert ended["seconds"] >= 0.2 and "error" in ended


def use(uri: str) -> None:
    """Read; the server's end is not an error of the test's."""
    try:
        with diskwright.open(uri, format="raw") as disk:
            disk.read_at(4096, 512)
    except (OSError, DiskError):
        pass


def test_convert_traced(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(1 << 20))
    before = signal.getsignal(signal.SIGUSR2)
    words = ["convert", "--trace", "on,file=trace", "-f", "raw", "-O", "qcow2", "raw", "new"]
    done = ours(*words, cwd=tmp_path, name="diskwright")
    assert not done.status, done.err
    assert signal.getsignal(signal.SIGUSR2) == before
    lines = traced(tmp_path / "trace")
    begun = [one["id"] for one in lines if one["event"] == "begin"]
    assert begun and sorted(begun) == sorted(one["id"] for one in lines if one["event"] == "end")
    assert any(one.get("request") == "write" and one["driver"] == "qcow2" for one in lines)
    for bad in ("", "x", "slow=", "slow=-1", "file="):
        done = ours("convert", "--trace", bad, "raw", "other", cwd=tmp_path, name="diskwright")
        assert done.status == 1 and b"--trace" in done.err
    done = ours("convert", "--trace", f"file={tmp_path}/none/x", "raw", "other", cwd=tmp_path,
                name="diskwright")  # fmt: skip
    assert done.status == 1 and b"No such file" in done.err
    assert ours("daemon", "-T", "pattern", name="qemu-storage-daemon").status == 1


@pytest.mark.parametrize("argument", ["on", "slow=0.5,on"])
def test_traces_can_be_asked_for_twice(argument: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(1 << 16))
    for _ in range(2):
        done = ours("convert", "--trace", argument, "-f", "raw", "-O", "raw", "raw", "new",
                    cwd=tmp_path, name="diskwright")  # fmt: skip
        assert not done.status and not done.err
