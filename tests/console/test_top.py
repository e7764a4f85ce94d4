"""``top``: rates from counters, tables of any width, QEMU's own counters, a terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from console.serving import line, says, served
from diskwright.console.connection import Connection
from diskwright.console.sample import Disk, Watcher
from diskwright.console.tables import page, short
from monitor.running import OURS, SOURCE, needs_unix

pytestmark = needs_unix

QUERIES = [
    "query-blockstats", "query-named-block-nodes", "query-block-exports", "query-jobs",
    "query-block-jobs",
]  # fmt: skip


def stats(operations: Any, size: Any = 0, nanoseconds: Any = 0) -> dict[str, Any]:
    return {"rd_operations": operations, "rd_bytes": size, "rd_total_time_ns": nanoseconds,
            "failed_rd_operations": 3}  # fmt: skip


def look(*answers: Any) -> list[Any]:
    """Answers to QUERIES; counters are asked for twice."""
    return [answers[0], *answers]


def views(*looks: list[Any]) -> Any:
    """What a watcher makes of such answers, one by one; a second lies between them."""
    replies = [[{"name": name} for name in QUERIES], *(one for look in looks for one in look)]
    lines = [line({"return": one, "id": id}) for id, one in enumerate(replies, 2)]
    with says(*lines) as sock, pytest.MonkeyPatch.context() as patch:
        clock = iter(range(100))
        patch.setattr("diskwright.console.sample.time.monotonic", lambda: next(clock))
        connection = Connection(sock, timeout=20)
        try:
            watcher = Watcher(connection)
            return [watcher.view() for _ in looks]
        finally:
            connection.close()


def test_rates_between_two_looks() -> None:
    node = {"node-name": "n", "drv": "qcow2", "ro": False, "image": {"virtual-size": 1 << 30}}
    export = {"id": "e", "type": "nbd", "node-name": "n"}
    job = {"id": "j", "type": "create", "status": "running", "total-progress": 100}
    entry = {"device": "", "qdev": "e", "node-name": "n"}
    first, second = views(
        look([{**entry, "stats": stats(5)}], [node], [export], [{**job, "current-progress": 10}],
             []),
        look([{**entry, "stats": stats(25, 8192, 4_000_000)}], [node], [export],
             [{**job, "current-progress": 40}], [{"device": "j", "error": "late"}]),
    )  # fmt: skip
    assert first.disks[0].rates["read"] == (0, 0, None) and first.interval == 0
    (disk,), (listed,), (running,) = second.disks, second.nodes, second.jobs
    assert disk[:5] == ("e", "n", "nbd", 1 << 30, False) and disk.failed == 3
    assert disk.rates["read"] == (20, 8192, 0.0002)
    assert (listed.name, listed.kind, listed.rates) == ("n", "qcow2", disk.rates)
    assert (running.per_second, running.error) == (30, "late")
    text = page(second, "title", 200, False)
    assert text[2].split()[:8] == ["DISK", "NODE", "TYPE", "SIZE", "RD/s", "RD", "B/s", "RD"]
    assert text[3].split() == [
        "e", "n", "nbd", "1G", "20", "8.2k", "200µs", "0", "0", "-", "0", "-", "0", "0", "-", "3",
    ]  # fmt: skip
    assert text[-1].split() == ["j", "create", "running", "40%", "0:00:02", "late"]
    for width in range(10, 200, 7):
        assert max(map(len, page(second, "title", width, True))) <= width
    told = json.loads(json.dumps(second.to_dict()))
    assert told["disks"][0]["rates"]["read"]["latency-seconds"] == 0.0002


def test_another_disk_of_the_same_name_has_no_rates_below_zero() -> None:
    entry = {"device": "d", "node-name": "n"}
    _, second = views(
        look([{**entry, "stats": stats(5, 9, 9)}], [], [], [], []),
        look([{**entry, "stats": stats(3, 3, 3)}], [], [], [], []),
    )
    assert second.disks[0].rates["read"] == (0, 0, None)


def test_answers_that_make_no_sense() -> None:
    mad = {
        "node-name": "\x1b[2J" + "x" * 99, "drv": 3, "image": {"virtual-size": 10**400},
        "stats": stats(10**400, -3, True), "id": [], "device": {}, "current-progress": "x",
        "total-progress": -1, "status": "\x07",
    }  # fmt: skip
    for answer in (None, 3, [3, {}], [mad, mad]):
        for view in views(look(*[answer] * 5), look(*[answer] * 5)):
            assert all("\x1b" not in one and "\x07" not in one for one in page(view, "", 80, True))
            json.dumps(view.to_dict())


def test_numbers_are_short() -> None:
    numbers = (0, 7, 1.25, 99.94, 99.96, 999, 999.6, 1234, 10**6, 10**30, None)
    assert [short(one) for one in numbers[:-2]] == [
        "0", "7", "1.2", "99.9", "100", "999", "1.0k", "1.2k", "1M",
    ]  # fmt: skip
    assert short(None) == "-" and short(10**15) == "1P"


def test_the_busiest_are_first() -> None:
    def of(name: str, count: int) -> dict[str, Any]:
        return {"device": name, "stats": stats(count)}

    _, second = views(
        look([of("a", 1), of("b", 1), of("c", 1)], [], [], [], []),
        look([of("a", 1), of("b", 9), of("c", 1)], [], [], [], []),
    )
    assert [one.name for one in second.disks] == ["b", "a", "c"]
    assert isinstance(second.disks[0], Disk)


@pytest.mark.skipif(
    not shutil.which("qemu-system-x86_64"), reason="qemu-system-x86_64 is not installed"
)
def test_qemu(tmp_path: Path) -> None:
    """QEMU counts for its devices; its monitor can make requests."""
    path = tmp_path / "qmp"
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    command += ["-qmp", f"unix:{path},server=on,wait=on", "-qmp",
                f"unix:{path}2,server=on,wait=off",
                "-drive", "if=none,id=vd,file=null-co://,format=raw"]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            other = Connection(connected(path), timeout=20)
            connection = Connection(connected(Path(f"{path}2")), timeout=20)
            watcher = Watcher(connection)
            before = watcher.view().disks[0]
            for text in ("aio_write 0 1M", "aio_flush"):
                hmp = {"command-line": f'qemu-io vd "{text}"'}
                other.execute("human-monitor-command", hmp)
            after = watcher.view().disks[0]
            other.execute("quit")
            other.close()
            connection.close()
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert before.name == after.name == "vd" and before.rates and after.rates
    assert before.rates["write"].iops == 0 < after.rates["write"].iops
    assert after.rates["write"].bytes == after.rates["write"].iops * (1 << 20)
    assert after.rates["write"].latency is not None


def connected(path: Path) -> Any:
    """A socket to a program that is about to listen there."""
    import time

    from diskwright.console.connection import connect

    end = time.monotonic() + 20
    while True:
        try:
            return connect(str(path))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def test_ours(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    with served(OURS, tmp_path) as (path, _):
        connection = Connection(connected(Path(path)), timeout=20)
        watcher = Watcher(connection)
        before = watcher.view()
        uri = f"nbd+unix:///disk?socket={tmp_path}/nbd.sock"
        with diskwright.open(uri, format="raw", writable=True) as disk:
            disk.write_at(0, b"x" * 65536)
        after = watcher.view()
        connection.close()
        for one in (after.disks[0], next(n for n in after.nodes if n.name == "disk")):
            assert one.rates is not None and one.rates["write"].iops > 0
            assert one.rates["write"].bytes == one.rates["write"].iops * 65536
            assert (one.rates["write"].latency or 0) > 0
        assert (before.disks[0].name, before.disks[0].kind) == ("e", "nbd")

        done = ours("top", path, "--once", "-d", "0.01", "--json", name="diskwright")
        found = json.loads(done.out)
        assert not done.status and found["disks"][0]["name"] == "e" and found["interval"] > 0
        assert "disk" in [one["name"] for one in found["nodes"]]
        done = ours("top", path, "-n", "2", "-d", "0.01", "-a", name="diskwright")
        assert not done.status and done.out.decode().count("DISK") == 2

        master, slave = pty.openpty()
        command = [sys.executable, "-m", "diskwright", "top", path]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "COLUMNS": "60", "LINES": "5"}
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        text = b""
        try:
            while b"\x1b[J" not in text:
                text += os.read(master, 4096)
            os.write(master, b"q")
            while b"\x1b[?1049l" not in text:
                text += os.read(master, 4096)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(master)
        assert text.startswith(b"\x1b[?1049h") and text.count(b"\r\n") <= 4
    for words in (["top"], ["top", "-d", "0", "x"], ["top", "-n", "0", "x"], ["top", "nowhere"]):
        assert ours(*words, cwd=tmp_path, name="diskwright").status == 1
