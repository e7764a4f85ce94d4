"""The storage daemon as a program, beside qemu-storage-daemon and with its client library."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from diskwright.cli.main import main
from monitor.running import OURS, SOURCE, THEIRS, daemon, needs_qsd, needs_unix

pytestmark = needs_unix

NBD = {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}
FILE = {"driver": "file", "filename": "disk.qcow2"}
DISK = {"driver": "qcow2", "node-name": "disk", "file": FILE}
TOP = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}}
NEW = {"driver": "file", "filename": "new", "size": 65536}
IMAGE = {"driver": "qcow2", "file": "new", "size": 1 << 20}
RAW = {"driver": "file", "node-name": "raw", "filename": "disk.raw"}

ABORT = {"type": "abort", "data": {}}


def bitmap(what: str, name: str, *sources: str, **more: Any) -> dict[str, Any]:
    """An action about a bitmap of the node ``made``."""
    named = {"target": name, "bitmaps": list(sources)} if sources else {"name": name}
    return {"type": f"block-dirty-bitmap-{what}", "data": {"node": "made", **named, **more}}


def snapshot(name: str) -> dict[str, Any]:
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": "made", "name": name}}


TRANSACTIONS: list[list[dict[str, Any]]] = [
    [bitmap("add", "t", granularity=65536), bitmap("merge", "t", "b"), bitmap("disable", "t")],
    [bitmap("add", "u"), bitmap("add", "u")],
    [bitmap("add", "u", persistent=True), bitmap("merge", "u", "missing")],
    [bitmap("add", "u", persistent=True), bitmap("disable", "u"), bitmap("enable", "u")],
    [bitmap("add", "v"), bitmap("remove", "v")],
    [bitmap("remove", "u"), bitmap("add", "u", persistent=True)],
    [bitmap("remove", "u"), bitmap("clear", "u")],
    [bitmap("remove", "u"), bitmap("merge", "u", "b")],
    [bitmap("remove", "u"), bitmap("remove", "u")],
    [bitmap("enable", "t"), bitmap("clear", "b"), bitmap("disable", "b"), bitmap("remove", "u")],
    [snapshot("x"), snapshot("x")],
    [snapshot("x"), bitmap("add", "b")],
    [snapshot("x"), bitmap("clear", "t")],
    [bitmap("disable", "missing")],
]

SCRIPT: list[tuple[str, dict[str, Any] | None]] = [
    ("query-version", {"x": 3}),
    ("no-such-command", None),
    ("qmp_capabilities", None),
    ("block_resize", {"node-name": "disk", "size": "x"}),
    ("block_resize", {"node-name": 3, "size": 3.5}),
    ("block_resize", {"node-name": "disk"}),
    ("block_resize", {"node-name": "disk", "size": 512}),
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "foo"}),
    ("blockdev-add", {"driver": "file"}),
    ("blockdev-add", {"driver": "file", "filename": "disk.raw"}),
    ("blockdev-add", {**RAW, "filename": "missing"}),
    ("blockdev-add", {**RAW, "bar": 1}),
    ("blockdev-add", {**RAW, "node-name": "1n"}),
    ("blockdev-add", {**RAW, "discard": "maybe"}),
    ("blockdev-add", {**DISK, "file": {"driver": "file"}}),
    ("blockdev-add", {**DISK, "file": 3}),
    ("blockdev-add", {**DISK, "file": "missing"}),
    ("blockdev-add", {**DISK, "file": {**FILE, "cache": {"direct": 3}}}),
    ("blockdev-add", DISK),
    ("blockdev-add", DISK),
    ("blockdev-add", {**DISK, "node-name": "again"}),
    ("blockdev-add", {**RAW, "read-only": True}),
    ("blockdev-add", {"driver": "raw", "node-name": "over", "file": "raw", "read-only": True}),
    ("blockdev-add", TOP),
    ("query-named-block-nodes", {}),
    ("query-named-block-nodes", {"flat": True}),
    ("x-debug-query-block-graph", None),
    ("blockdev-del", {"node-name": "raw"}),
    ("blockdev-del", {"node-name": "missing"}),
    ("block_resize", {"node-name": "disk", "size": 2 << 20}),
    ("block_resize", {"node-name": "disk", "size": -3}),
    ("block_resize", {"node-name": "disk", "size": 5}),
    ("block_resize", {"node-name": "raw", "size": 2 << 20}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"}),
    ("nbd-server-stop", None),
    ("nbd-server-start", NBD),
    ("nbd-server-start", NBD),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "missing"}),
    ("block-export-add", {"type": "nbd", "id": "1e", "node-name": "disk"}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "name": "x",
                          "writable": True}),
    ("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk"}),
    ("block_resize", {"node-name": "disk", "size": 3 << 20}),
    ("block-export-add", {"type": "nbd", "id": "f", "node-name": "disk", "name": "x"}),
    ("block-export-add", {"type": "nbd", "id": "f", "node-name": "raw", "writable": True}),
    ("block-export-add", {"type": "foo", "id": "f", "node-name": "raw"}),
    ("query-block-exports", None),
    ("x-debug-query-block-graph", None),
    ("blockdev-del", {"node-name": "disk"}),
    ("block-export-del", {"id": "missing"}),
    ("block-export-del", {"id": "e", "mode": "gently"}),
    ("block-export-del", {"id": "e"}),
    ("nbd-server-add", {"device": "disk"}),
    ("nbd-server-add", {"device": "disk"}),
    ("query-block-exports", None),
    ("nbd-server-remove", {"name": "missing"}),
    ("nbd-server-remove", {"name": "disk"}),
    ("block-export-add", {"type": "nbd", "id": "g", "node-name": "top"}),
    ("nbd-server-stop", None),
    ("query-block-exports", None),
    ("blockdev-reopen", {"options": [{**DISK, "node-name": "missing"}]}),
    ("blockdev-del", {"node-name": "disk"}),
    ("blockdev-del", {"node-name": "top"}),
    ("query-named-block-nodes", {"flat": True}),
    ("object-add", {"qom-type": "secret", "id": "s", "data": "x"}),
    ("object-add", {"qom-type": "secret", "id": "s", "data": "x"}),
    ("object-add", {"qom-type": "secret", "id": "t"}),
    ("object-add", {"qom-type": "foo", "id": "t"}),
    ("qom-list", {"path": "/objects"}),
    ("object-del", {"id": "s"}),
    ("object-del", {"id": "s"}),
    ("blockdev-create", {"job-id": "1j", "options": NEW}),
    ("blockdev-create", {"job-id": "j", "options": {**NEW, "size": "x"}}),
    ("blockdev-create", {"job-id": "j", "options": NEW}),
    ("query-jobs", None),
    ("blockdev-create", {"job-id": "j", "options": NEW}),
    ("job-cancel", {"id": "j"}),
    ("job-dismiss", {"id": "j"}),
    ("job-dismiss", {"id": "j"}),
    ("job-cancel", {"id": "j"}),
    ("blockdev-create", {"job-id": "k", "options": {**NEW, "filename": "no/where"}}),
    ("query-jobs", None),
    ("blockdev-create", {"job-id": "l", "options": {**IMAGE, "file": "missing"}}),
    ("blockdev-add", {"driver": "file", "node-name": "new", "filename": "new"}),
    ("blockdev-create", {"job-id": "m", "options": IMAGE}),
    ("blockdev-create", {"job-id": "n", "options": {**IMAGE, "refcount-bits": 3}}),
    ("blockdev-create", {"job-id": "o", "options": {**IMAGE, "version": "v2", "file":
                         {"driver": "file", "filename": "new"}}}),
    ("query-jobs", None),
    *(("job-dismiss", {"id": id}) for id in "klmno"),
    ("blockdev-create", {"job-id": "p", "options": IMAGE}),
    ("job-dismiss", {"id": "p"}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "made", "file": "new"}),
    ("query-named-block-nodes", {"flat": True}),
    ("block-dirty-bitmap-add", {"node": "missing", "name": "b"}),
    ("block-dirty-bitmap-add", {"node": "made", "name": ""}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "b", "granularity": 3}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "b", "granularity": -1}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "b", "granularity": "x"}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "b", "persistent": True}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "b"}),
    ("block-dirty-bitmap-add", {"node": "made", "name": "c", "disabled": True,
                                "granularity": 4096}),
    ("query-named-block-nodes", {"flat": True}),
    ("block-dirty-bitmap-disable", {"node": "made", "name": "b"}),
    ("block-dirty-bitmap-enable", {"node": "made", "name": "c"}),
    ("block-dirty-bitmap-clear", {"node": "made", "name": "missing"}),
    ("block-dirty-bitmap-clear", {"node": "made", "name": "c"}),
    ("block-dirty-bitmap-merge", {"node": "made", "target": "c", "bitmaps": ["b"]}),
    ("block-dirty-bitmap-merge", {"node": "made", "target": "c", "bitmaps": ["missing"]}),
    ("block-dirty-bitmap-merge", {"node": "made", "target": "missing", "bitmaps": []}),
    ("block-dirty-bitmap-merge", {"node": "made", "target": "c", "bitmaps":
                                  [{"node": "made", "name": "b"}]}),
    ("block-dirty-bitmap-remove", {"node": "made", "name": "c"}),
    ("block-dirty-bitmap-remove", {"node": "made", "name": "c"}),
    ("query-named-block-nodes", {"flat": True}),
    ("blockdev-snapshot-internal-sync", {"device": "made", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"device": "made", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"device": "made", "name": ""}),
    ("blockdev-snapshot-internal-sync", {"device": "missing", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"device": "raw", "name": "s"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "null", "read-zeroes": True}),
    ("blockdev-snapshot-internal-sync", {"device": "null", "name": "s"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "made"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "made", "name": "missing"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "made", "id": "7"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "made", "id": "1", "name": "s"}),
    ("transaction", {"actions": []}),
    ("transaction", {"actions": [{"type": "nothing", "data": {}}]}),
    ("transaction", {"actions": [{"type": "abort"}]}),
    ("transaction", {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "made"}}]}),
    *(("transaction", {"actions": actions}) for actions in TRANSACTIONS),
    ("transaction", {"actions": TRANSACTIONS[0], "properties": {"completion-mode": "grouped"}}),
    ("transaction", {"actions": [], "properties": {"completion-mode": "x"}}),
    ("query-named-block-nodes", {"flat": True}),
    *(("transaction", {"actions": [*actions, ABORT]}) for actions in TRANSACTIONS),
    ("query-named-block-nodes", {"flat": True}),
    ("block-job-cancel", {"device": "j"}),
    ("query-block-jobs", None),
    ("x-blockdev-amend", {"job-id": "q", "node-name": "missing", "options":
                          {"driver": "luks", "state": "active"}}),
    ("x-blockdev-amend", {"job-id": "q", "node-name": "made", "options":
                          {"driver": "luks", "state": "active"}}),
    ("x-blockdev-amend", {"job-id": "q", "node-name": "made", "options": {"driver": "qcow2"}}),
    ("query-jobs", None),
    *(("job-" + verb, {"id": "q"}) for verb in ("pause", "resume", "complete", "finalize",
                                                "cancel", "dismiss", "dismiss")),
    ("quit", None),
]  # fmt: skip


def images(folder: Path) -> None:
    for name, more in (("disk", []), ("base", []), ("top", ["-b", "base.qcow2", "-F", "qcow2"])):
        path = str(folder / f"{name}.qcow2")
        assert main("qemu-img", ["create", "-q", "-f", "qcow2", *more, path, "1M"]) == 0
    (folder / "disk.raw").write_bytes(bytes(1 << 20))


def normal(reply: Any) -> Any:
    """A reply without what may differ: the order of lists, numbers and names that are made up."""
    if isinstance(reply, dict):
        if "edges" in reply:
            names = {node["id"]: node["name"] for node in reply["nodes"]}
            for edge in reply["edges"]:
                edge.update(parent=names[edge["parent"]], child=names[edge["child"]])
            for node in reply["nodes"]:
                del node["id"]
        shown = {
            key: normal(value)
            for key, value in reply.items()
            if not key.startswith(("date-", "vm-clock-"))
        }
        if "actual-size" in shown:  # how much of a new file is allocated is not the same
            shown["actual-size"] = shown["actual-size"] > 0
        if shown.get("format") == "file":  # where in it new clusters are is not the same
            shown["virtual-size"] = shown["virtual-size"] > 0
        return shown
    if isinstance(reply, list):
        parts = (normal(value) for value in reply)
        return sorted(parts, key=lambda part: json.dumps(part, sort_keys=True))
    if isinstance(reply, str) and reply.startswith("json:"):
        return json.loads(reply[5:])
    return re.sub(r"^#block\d+$", "#block", reply) if isinstance(reply, str) else reply


def played(argv: list[str], folder: Path) -> list[tuple[str, Any]]:
    """Every command of the script with its reply, and the events."""
    folder.mkdir()
    images(folder)
    found: list[tuple[str, Any]] = []
    with daemon(argv, folder) as (process, (client,)):
        for name, arguments in SCRIPT:
            reply = client.send(name, arguments)
            job = name in ("blockdev-create", "x-blockdev-amend")
            before = 0 if job else len(client.events)
            if job and "return" in reply:
                while not client.events or client.events[-1]["data"].get("status") != "concluded":
                    client.events.append(client.read())
            events = [(event["event"], normal(event["data"])) for event in client.events]
            client.events.clear()
            found += events[:before]
            found.append((f"{name} {json.dumps(arguments)}", normal(reply)))
            found += events[before:]
        assert process.wait(20) == 0
    return found


@needs_qsd
def test_same_replies_as_qemu(tmp_path: Path) -> None:
    ours, theirs = played(OURS, tmp_path / "ours"), played(THEIRS, tmp_path / "theirs")
    assert len(ours) == len(theirs)
    for mine, their in zip(ours, theirs, strict=True):
        assert mine == their


def test_client_library_and_two_monitors(tmp_path: Path) -> None:
    library = pytest.importorskip("qemu.qmp")
    images(tmp_path)
    chardev = "socket,id=q,path=q.sock,server=on,wait=off"
    argv = [*OURS, "--blockdev", "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
            "--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--object", "secret,id=s,data=x",
            "--export", '{"type": "nbd", "id": "e", "node-name": "disk", "writable": true}',
            "--chardev", chardev, "--monitor", "q"]  # fmt: skip

    async def talk() -> None:
        qmp = library.QMPClient("test")
        with qmp.listener() as events:
            await qmp.connect(str(tmp_path / "q.sock"))
            assert (await qmp.execute("query-version"))["qemu"]["major"] == 10
            with pytest.raises(library.ExecuteError, match="Cannot find device"):
                await qmp.execute("block_resize", {"node-name": "x", "size": 1})
            await qmp.execute("block-export-del", {"id": "e"})
            event = await asyncio.wait_for(events.get(), 10)
            assert event["event"] == "BLOCK_EXPORT_DELETED"
            assert abs(event["timestamp"]["seconds"] - os.stat(tmp_path / "q.sock").st_mtime) < 60
            await qmp.execute("quit")
            with suppress(EOFError, ConnectionError):  # the daemon may be gone first
                await qmp.disconnect()

    with daemon(argv, tmp_path) as (process, (other,)):
        assert other.do("query-block-exports")[0]["id"] == "e"
        asyncio.run(talk())
        assert other.read()["event"] == "BLOCK_EXPORT_DELETED"
        assert process.wait(10) == 0
    assert not (tmp_path / "nbd.sock").exists() and not (tmp_path / "q.sock").exists()


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-io is not installed")
def test_exports_come_and_go_under_clients(tmp_path: Path) -> None:
    images(tmp_path)

    def qemu_io(*commands: str, name: str = "disk") -> subprocess.CompletedProcess[str]:
        words = [word for command in commands for word in ("-c", command)]
        uri = f"nbd+unix:///{name}?socket={tmp_path}/nbd.sock"
        return subprocess.run(
            ["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, timeout=20
        )

    with daemon(OURS, tmp_path) as (process, (client,)):
        client.do("blockdev-add", **DISK)
        client.do("nbd-server-start", **NBD)
        export = {"type": "nbd", "id": "e", "node_name": "disk", "writable": True}
        client.do("block-export-add", **export)
        with subprocess.Popen(
            ["qemu-io", "-f", "raw", f"nbd+unix:///disk?socket={tmp_path}/nbd.sock"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as peer:  # fmt: skip
            assert peer.stdin is not None and peer.stdout is not None
            peer.stdin.write("write -P 7 0 64k\n")
            peer.stdin.flush()
            while "wrote" not in peer.stdout.readline():
                pass
            refused = client.send("block-export-del", {"id": "e"})
            assert refused["error"]["desc"] == "export 'e' still in use"
            client.do("block-export-del", id="e", mode="hard")
            while not client.events:
                client.do("query-block-exports")
            assert client.events.pop()["data"] == {"id": "e"}
            peer.kill()
        assert client.do("query-block-exports") == []
        assert "Requested export not available" in qemu_io("read 0 1").stderr
        client.do("block_resize", node_name="disk", size=4 << 20)
        client.do("block-export-add", **export)
        assert "wrote 65536/65536" in qemu_io("read -P 7 0 64k", "write -P 9 3M 64k").stdout
        reopened = {**DISK, "file": client.do("query-named-block-nodes", flat=True)[1]["node-name"]}
        client.do("block-export-del", id="e")
        client.do("blockdev-reopen", options=[{**reopened, "read-only": True}])
        assert client.do("query-named-block-nodes", flat=True)[0]["ro"] is True
        client.do("blockdev-reopen", options=[reopened])
        client.do("block-export-add", **export)
        assert qemu_io("write -P 5 1M 64k", "flush").returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    words = ["-r", "-c", "read -P 5 1M 64k", "-c", "read -P 9 3M 64k", str(tmp_path / "disk.qcow2")]
    done = subprocess.run(["qemu-io", "-f", "qcow2", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stdout
    assert main("qemu-img", ["check", "-q", str(tmp_path / "disk.qcow2")]) == 0


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--blockdev", "driver=foo"], "Parameter 'driver' does not accept value 'foo'"),
        (["--blockdev", "file"], "Parameter 'filename' is missing"),
        (["--blockdev", "driver=file,filename=nope,node-name=x"],
         "Could not open 'nope': No such file or directory"),
        (["--blockdev", "driver=file,filename=/dev/null,node-name=x,read-only=3"],
         "Parameter 'read-only' expects 'on' or 'off'"),
        (["--export", "foo"], "Parameter 'type' does not accept value 'foo'"),
        (["--export", "nbd,id=x,node-name=y"], "Cannot find device='' nor node-name='y'"),
        (["--nbd-server", "addr.type=unix"], "Parameter 'addr.path' is missing"),
        (["--object", "secret"], "Parameter 'id' is missing"),
        (["--monitor", "foo"], 'chardev "foo" not found'),
    ],
)  # fmt: skip
def test_command_line_refused_in_qemus_words(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("qemu-storage-daemon", argv) == 1
    assert capsys.readouterr().err == f"qemu-storage-daemon: {' '.join(argv)}: {text}\n"


def test_version_help_and_what_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("qemu-storage-daemon", ["--version"]) == 0
    assert capsys.readouterr().out.startswith("qemu-storage-daemon version 10.")
    assert main("diskwright", ["daemon", "--help"]) == 0
    assert "--nbd-server" in capsys.readouterr().out
    for argv, text in (
        (["--trace", "x"], "--trace"),
        (["--chardev", "pty,id=x"], "'pty'"),
        (["--chardev", "socket,id=x,path=y"], "server=on"),
        (["x"], "x: Unexpected argument"),
    ):
        assert main("qemu-storage-daemon", argv) == 1
        assert text in capsys.readouterr().err


def test_daemonize(tmp_path: Path) -> None:
    argv = [*OURS, "--chardev", "socket,id=q,path=q.sock,server=on", "--monitor", "q",
            "--pidfile", "pid", "--daemonize"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run(argv, cwd=tmp_path, env=environment, timeout=20).returncode == 0
    pid = int((tmp_path / "pid").read_text())
    assert (tmp_path / "q.sock").exists()
    os.kill(pid, signal.SIGTERM)
    for _ in range(200):
        if not (tmp_path / "pid").exists():
            break
        time.sleep(0.05)
    assert not (tmp_path / "pid").exists() and not (tmp_path / "q.sock").exists()
