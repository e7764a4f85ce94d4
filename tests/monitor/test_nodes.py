"""Nodes under clients: what is told of them and what is done with them, beside
qemu-storage-daemon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from diskwright.cli.main import main
from diskwright.engine.kernel import Driver
from diskwright.monitor import nodes
from diskwright.monitor.daemon import Daemon
from monitor.running import OURS, THEIRS, Client, daemon, needs_qsd, needs_unix
from monitor.test_daemon import DISK, NBD, TOP, images, normal

pytestmark = [
    needs_unix,
    needs_qsd,
    pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-io is not installed"),
]

Step = tuple[str, Any]
LOAD = ["write -P 1 0 4k", "write -P 2 4k 4k", "read -P 1 0 1k", "flush", "discard 64k 64k"]
FILE = {"driver": "file", "node-name": "file", "filename": "top.qcow2", "discard": "unmap"}
EXPORT = {"type": "nbd", "id": "e", "node-name": "top", "writable": True}


def load(folder: Path, name: str, commands: list[str]) -> int:
    """Requests of a client of the export ``name``; qemu-io's exit status."""
    words = [word for command in commands for word in ("-c", command)]
    uri = f"nbd+unix:///{name}?socket={folder}/nbd.sock"
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True, timeout=20
    )
    return done.returncode


def contexts(folder: Path, pki: Path) -> list[str]:
    """What a client with a certificate is told of the exports."""
    uri = f"nbds+unix://localhost/?socket={folder}/nbd.sock&tls-certificates={pki}"
    done = subprocess.run(["nbdinfo", "--list", uri], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "qemu:" in line or "descr" in line]


def played(argv: list[str], folder: Path, script: list[Step]) -> list[Any]:
    """Every step of the script with its reply and the events until then.  A step is a command and
    its arguments, or ``qemu-io``, the name of an export and what qemu-io is to do."""
    folder.mkdir()
    overlays(folder)
    found: list[Any] = []
    with daemon(argv, folder) as (_, (client,)):
        for name, arguments in script:
            if name == "qemu-io":
                told: Any = load(folder, *arguments)
                client.send("query-version")
            elif name == "nbdinfo":
                told, arguments = contexts(folder, arguments), None
            else:
                told = client.send(name, arguments)
            events = [(event["event"], normal(event["data"])) for event in client.events]
            client.events.clear()
            found.append((f"{name} {json.dumps(arguments)}", normal(told), events))
    return found


def compare(tmp_path: Path, script: list[Step]) -> None:
    """All replies and events are those of qemu-storage-daemon."""
    ours, theirs = (
        played(argv, tmp_path / name, script) for name, argv in (("ours", OURS), ("theirs", THEIRS))
    )
    for mine, their in zip(ours, theirs, strict=True):
        assert mine == their


def test_thresholds(tmp_path: Path) -> None:
    threshold = "block-set-write-threshold"
    script: list[Step] = [
        ("blockdev-add", {**TOP, "file": FILE, "discard": "unmap"}),
        ("nbd-server-start", NBD),
        ("block-export-add", EXPORT),
        (threshold, {"node-name": "missing", "write-threshold": 1}),
        (threshold, {"node-name": "top", "write-threshold": "x"}),
        (threshold, {"node-name": "file", "write-threshold": 1 << 20}),
        (threshold, {"node-name": "top", "write-threshold": 4096}),
        ("query-named-block-nodes", {"flat": True}),
        ("qemu-io", ("top", LOAD)),
        ("query-named-block-nodes", {"flat": True}),
        ("qemu-io", ("top", LOAD)),
        (threshold, {"node-name": "top", "write-threshold": 4096}),
        (threshold, {"node-name": "top", "write-threshold": 0}),
        ("qemu-io", ("top", LOAD)),
        (threshold, {"node-name": "top", "write-threshold": 4096}),
        ("qemu-io", ("top", ["write -z 1000k 8k"])),
    ]
    compare(tmp_path, script)


def stats(client: Client, **arguments: Any) -> dict[str, Any]:
    """By the name of the node, without what is zero."""
    return {
        one["node-name"]: {name: value for name, value in one["stats"].items() if value}
        | {"discards": one.get("driver-specific", {}).get("discard-bytes-ok")}
        for one in client.do("query-blockstats", **arguments)
    }


def test_counters(tmp_path: Path) -> None:
    found = {}
    for name, argv in ("ours", OURS), ("theirs", THEIRS):
        folder = tmp_path / name
        folder.mkdir()
        images(folder)
        with daemon(argv, folder) as (_, (client,)):
            client.do("blockdev-add", **TOP | {"file": FILE, "discard": "unmap"})
            client.do("nbd-server-start", **NBD)
            client.do("block-export-add", **EXPORT)
            if name == "ours":
                told = client.send("block-latency-histogram-set", {"id": "x", "boundaries": [1]})
                assert told["error"]["class"] == "DeviceNotFound"
                told = client.send("block-latency-histogram-set", {"id": "e", "boundaries": [2, 1]})
                assert "must be positive and grow" in told["error"]["desc"]
                client.do("block-latency-histogram-set", id="e", boundaries=[1, 10**12])
            assert load(folder, "top", LOAD) == 0
            found[name] = stats(client, query_nodes=True)
            if name == "theirs":
                continue
            (export,) = client.do("query-blockstats")
            assert (export["device"], export["qdev"]) == ("", "e")
            assert export["parent"]["node-name"] == "file" and "backing" in export
            counted = export["stats"]
            assert counted["wr_latency_histogram"] == {"boundaries": [1, 10**12], "bins": [0, 2, 0]}
            client.do("block-latency-histogram-set", id="e")
            assert "rd_latency_histogram" not in client.do("query-blockstats")[0]["stats"]
            assert client.do("query-block")[0]["inserted"]["node-name"] == "top"
            client.do("block-export-del", id="e")
            assert client.do("query-blockstats") == client.do("query-block") == []
            assert stats(client, query_nodes=True)["top"]["wr_bytes"] == counted["wr_bytes"] == 8192
    mine, their = found["ours"], found["theirs"]
    top = mine["top"]
    assert (top["rd_operations"], top["rd_bytes"], top["wr_operations"]) == (1, 1024, 2)
    assert (top["unmap_operations"], top["unmap_bytes"]) == (1, 65536)
    assert top["flush_operations"] and top["idle_time_ns"] and top["wr_total_time_ns"]
    for name in ("top", "file"):  # what QEMU counts of nodes
        assert mine[name]["wr_highest_offset"] == their[name]["wr_highest_offset"]
        assert mine[name]["discards"] == their[name]["discards"]


def overlays(folder: Path) -> None:
    images(folder)
    (folder / "sub").mkdir()
    for name in ("over1", "over2", "over3"):
        path = str(folder / f"{name}.qcow2")
        assert main("qemu-img", ["create", "-q", "-f", "qcow2", path, "1M"]) == 0


def opened(name: str, **more: Any) -> Step:
    file = {"driver": "file", "filename": f"{name}.qcow2"}
    return "blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **more}


def over(node: str, overlay: str) -> dict[str, Any]:
    return {"node": node, "overlay": overlay}


def test_overlays(tmp_path: Path) -> None:
    snapshot, sync = "blockdev-snapshot", "blockdev-snapshot-sync"
    one = {"type": snapshot, "data": over("top", "over1")}
    other = {"type": snapshot, "data": over("over1", "over2")}
    abort = {"type": "abort", "data": {}}
    write = ("qemu-io", ("top", ["write -P 5 0 4k", "read -P 1 4k 4k"]))
    script: list[Step] = [
        ("blockdev-add", {**TOP, "file": FILE}),
        opened("over1"), opened("over2"), opened("over3", **{"read-only": True}),
        ("blockdev-add", {"driver": "raw", "node-name": "raw",
                          "file": {"driver": "file", "filename": "disk.raw"}}),
        ("nbd-server-start", NBD),
        ("block-export-add", EXPORT),
        ("qemu-io", ("top", ["write -P 1 0 64k"])),
        (snapshot, over("missing", "over1")),
        (snapshot, over("top", "missing")),
        (snapshot, over("top", "top")),
        (snapshot, over("over1", "over1")),
        (snapshot, over("top", "over3")),
        (snapshot, over("top", "raw")),
        ("transaction", {"actions": [one, other, abort]}),
        ("query-block-exports", None),
        ("query-named-block-nodes", {"flat": True}),
        write,
        ("transaction", {"actions": [one, other]}),
        ("query-block-exports", None),
        ("query-named-block-nodes", {"flat": True}),
        ("x-debug-query-block-graph", None),
        write,
        (snapshot, over("over2", "over1")),
        ("blockdev-del", {"node-name": "top"}),
        ("blockdev-del", {"node-name": "over2"}),
        (sync, {"node-name": "over2", "snapshot-file": "s1.qcow2"}),
        (sync, {"node-name": "missing", "snapshot-file": "s1.qcow2", "snapshot-node-name": "s1"}),
        (sync, {"node-name": "over2", "snapshot-file": "s1.qcow2", "snapshot-node-name": "top"}),
        (sync, {"node-name": "over2", "snapshot-file": "s1", "snapshot-node-name": "s1",
                "format": "raw"}),
        (sync, {"node-name": "over2", "snapshot-file": "s1", "snapshot-node-name": "s1",
                "format": "foo"}),
        (sync, {"node-name": "over2", "snapshot-file": "no/s1", "snapshot-node-name": "s1"}),
        (sync, {"node-name": "over2", "snapshot-file": "no", "snapshot-node-name": "s1",
                "mode": "existing"}),
        (sync, {"node-name": "over2", "snapshot-file": "s1.qcow2", "snapshot-node-name": "s1"}),
        (sync, {"node-name": "s1", "snapshot-file": "s2.qcow2", "snapshot-node-name": "s2",
                "mode": "foo"}),
        ("query-block-exports", None),
        write,
        ("blockdev-del", {"node-name": "s1"}),
        ("change-backing-file", {"device": "missing", "image-node-name": "s1",
                                 "backing-file": "x"}),
        ("change-backing-file", {"device": "s1", "image-node-name": "raw", "backing-file": "x"}),
        ("change-backing-file", {"device": "file", "image-node-name": "top", "backing-file": "x"}),
        ("change-backing-file", {"device": "s1", "image-node-name": "top",
                                 "backing-file": "base.qcow2"}),
        ("change-backing-file", {"device": "raw", "image-node-name": "top", "backing-file": "x"}),
        ("block-export-del", {"id": "e"}),
        ("query-named-block-nodes", {"flat": True}),
        ("blockdev-del", {"node-name": "over2"}),
        ("blockdev-del", {"node-name": "over1"}),
        ("blockdev-del", {"node-name": "top"}),
    ]  # fmt: skip
    compare(tmp_path, script)
    for name in ("ours", "theirs"):
        for image in ("s1", "over1", "over2", "top"):
            path = str(tmp_path / name / f"{image}.qcow2")
            assert main("qemu-img", ["check", "-q", path]) == 0


def test_objects_tls_and_bitmaps(tmp_path: Path, certificates: Path) -> None:
    if not shutil.which("nbdinfo"):
        pytest.skip("nbdinfo is not installed")
    add, start, export = "object-add", "nbd-server-start", "block-export-add"
    tls = {"qom-type": "tls-creds-x509", "dir": str(certificates)}
    rule = {"match": "*CN=me", "policy": "allow", "format": "glob"}
    nbd = {"type": "nbd", "node-name": "disk"}
    both = {**nbd, "id": "e", "writable": True, "bitmaps": ["b", {"node": "disk", "name": "c"}],
            "allocation-depth": True, "description": "what it is", "name": "n"}  # fmt: skip
    script: list[Step] = [
        ("blockdev-add", DISK),
        ("block-dirty-bitmap-add", {"node": "disk", "name": "b"}),
        ("block-dirty-bitmap-add", {"node": "disk", "name": "c"}),
        (add, {"qom-type": "iothread", "id": "io"}),
        (add, {"qom-type": "iothread", "id": "io"}),
        (add, {"qom-type": "iothread", "id": "io2", "poll-max-ns": 100, "aio-max-batch": 3}),
        (add, {"qom-type": "iothread", "id": "io3", "poll-max-ns": "x"}),
        (add, {"qom-type": "iothread", "id": "io3", "poll": 1}),
        (add, {"qom-type": "authz-simple", "id": "io2", "identity": "CN=me"}),
        (add, {"qom-type": "authz-simple", "id": "simple", "identity": "CN=you"}),
        (add, {"qom-type": "authz-simple", "id": "other"}),
        (add, {"qom-type": "authz-list", "id": "list", "policy": "deny", "rules": [rule]}),
        (add, {"qom-type": "authz-list", "id": "other", "policy": "perhaps"}),
        (add, {"qom-type": "authz-list", "id": "other", "rules": [{**rule, "format": "re"}]}),
        (add, {**tls, "id": "server", "endpoint": "server"}),
        (add, {**tls, "id": "client"}),
        (add, {**tls, "id": "other", "endpoint": "both"}),
        ("qom-list", {"path": "/objects"}),
        ("object-del", {"id": "client"}),
        ("object-del", {"id": "other"}),
        (start, {**NBD, "tls-creds": "missing"}),
        (start, {**NBD, "tls-creds": "list"}),
        (start, {**NBD, "max-connections": -1}),
        (start, {**NBD, "tls-creds": "server", "tls-authz": "list", "max-connections": 3}),
        ("object-del", {"id": "server"}),
        (export, {**both, "bitmaps": ["missing"]}),
        (export, {**both, "bitmaps": [{"node": "missing", "name": "b"}]}),
        (export, {**both, "bitmaps": [{"node": "disk", "name": "missing"}]}),
        (export, {**both, "bitmaps": [3]}),
        (export, {**both, "writable": False}),
        (export, both),
        (export, {**both, "id": "f", "name": "other"}),
        ("block-dirty-bitmap-disable", {"node": "disk", "name": "b"}),
        ("block-dirty-bitmap-remove", {"node": "disk", "name": "c"}),
        ("query-named-block-nodes", {"flat": True}),
        ("nbdinfo", certificates),
        (export, {**nbd, "id": "f", "iothread": "missing"}),
        (export, {**nbd, "id": "f", "iothread": "io", "fixed-iothread": True}),
        (export, {**nbd, "id": "g", "name": "g", "writethrough": True}),
        ("block-export-del", {"id": "e"}),
        ("block-dirty-bitmap-remove", {"node": "disk", "name": "c"}),
        ("block-dirty-bitmap-disable", {"node": "disk", "name": "b"}),
        ("block-export-del", {"id": "f"}),
        ("nbd-server-add", {"device": "disk", "name": "h", "bitmap": "b"}),
        ("block-dirty-bitmap-remove", {"node": "disk", "name": "b"}),
        ("nbd-server-stop", None),
        ("block-dirty-bitmap-remove", {"node": "disk", "name": "b"}),
    ]  # fmt: skip
    compare(tmp_path, script)


def test_permissions(tmp_path: Path) -> None:
    """Who may use what together: refused where QEMU refuses, in its words."""
    qcow2 = {"driver": "file", "filename": "disk.qcow2", "node-name": "file"}
    raw = {"driver": "file", "filename": "disk.raw"}
    over_file = {"driver": "raw", "file": "file"}
    top = {"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}
    export = {"type": "nbd", "writable": True}
    script: list[Step] = [
        ("blockdev-add", {"node-name": "ro", **top, "file": {**top["file"], "read-only": True}}),
        ("blockdev-add", {"node-name": "ro", **top, "force-share": True}),
        ("blockdev-add", {"node-name": "ro", **top, "force-share": True, "read-only": True}),
        ("query-named-block-nodes", {"flat": True}),
        ("blockdev-del", {"node-name": "ro"}),
        ("blockdev-add", {"node-name": "ro", **top, "read-only": True,
                          "file": {**top["file"], "read-only": False, "node-name": "rw"}}),
        ("query-named-block-nodes", {"flat": True}),
        ("blockdev-del", {"node-name": "ro"}),
        ("blockdev-add", {"node-name": "x", **raw, "detect-zeroes": "unmap"}),
        ("blockdev-add", {"node-name": "x", **raw, "detect-zeroes": "maybe"}),
        ("blockdev-add", {"node-name": "x", **raw, "detect-zeroes": "on", "cache":
                          {"direct": True, "no-flush": True}}),
        ("blockdev-add", {"node-name": "y", "driver": "raw", "file": "x"}),
        ("blockdev-add", {"node-name": "z", "driver": "raw", "file": "x"}),
        ("query-named-block-nodes", {"flat": True}),
        ("nbd-server-start", NBD),
        *(("block-export-add", {**export, "id": id, "node-name": id, "name": id}) for id in "xyz"),
        ("x-debug-query-block-graph", None),
        ("block_resize", {"node-name": "x", "size": 2 << 20}),
        ("block_resize", {"node-name": "y", "size": 2 << 20}),
        ("blockdev-del", {"node-name": "x"}),
        ("blockdev-add", {"node-name": "disk", "driver": "qcow2", "file": qcow2}),
        ("blockdev-add", {"node-name": "a", **over_file}),
        ("blockdev-add", {"node-name": "b", **over_file, "driver": "qcow2"}),
        ("blockdev-add", {"node-name": "c", "driver": "qcow2", "file":
                          {"driver": "file", "filename": "disk.qcow2"}}),
        ("block-export-add", {**export, "id": "e", "node-name": "file"}),
        ("block-export-add", {**export, "id": "e", "node-name": "file", "writable": False}),
        ("block_resize", {"node-name": "file", "size": 2 << 20}),
        ("block_resize", {"node-name": "disk", "size": 2 << 20}),
        ("blockdev-add", {"node-name": "top", **top, "backing": "disk"}),
        ("block-export-add", {**export, "id": "e", "node-name": "top"}),
        ("block-export-add", {**export, "id": "f", "node-name": "disk"}),
        ("block_resize", {"node-name": "disk", "size": 3 << 20}),
        ("block_resize", {"node-name": "top", "size": 3 << 20}),
        ("blockdev-del", {"node-name": "disk"}),
        ("blockdev-del", {"node-name": "file"}),
        ("x-debug-query-block-graph", None),
    ]  # fmt: skip
    compare(tmp_path, script)


def allocated(path: Path) -> list[tuple[int, int]]:
    """Where a file has data."""
    found, at = [], 0
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, at))
    return found


def test_zeroes_and_discards_give_up_space_as_with_qemu(tmp_path: Path) -> None:
    """Every combination of the options, on the upper and on the lower node."""
    found: dict[str, Any] = {}
    ways = [
        (detect, discard, below)
        for discard in ("ignore", "unmap")
        for detect in ("off", "on", "unmap")
        for below in (None, "ignore", "unmap")
        if (detect, discard) != ("unmap", "ignore")
    ]
    commands = ["write -P 0 0 64k", "discard 128k 64k", "write -z 256k 64k", "write -zu 384k 64k",
                "write -P 3 512k 64k"]  # fmt: skip
    for side, argv in ("ours", OURS), ("theirs", THEIRS):
        folder = tmp_path / side
        folder.mkdir()
        found[side] = {}
        with daemon(argv, folder) as (_, (client,)):
            client.do("nbd-server-start", **NBD)
            for number, way in enumerate(ways):
                detect, discard, below = way
                path = folder / f"{number}.raw"
                path.write_bytes(b"\1" * (1 << 20))
                file = {"driver": "file", "filename": path.name}
                if below is not None:
                    file["discard"] = below
                options = {"discard": discard, "detect-zeroes": detect, "file": file}
                node = {"driver": "raw", "node-name": f"n{number}", **options}
                assert client.send("blockdev-add", node) == {"return": {}}
                export = {"type": "nbd", "id": "e", "node-name": f"n{number}", "writable": True}
                assert client.send("block-export-add", export) == {"return": {}}
                assert load(folder, f"n{number}", commands) == 0
                client.do("block-export-del", id="e")
                client.do("blockdev-del", node_name=f"n{number}")
                found[side][way] = (allocated(path), hash(path.read_bytes()))
    assert found["ours"] == found["theirs"]


def test_no_flush_by_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    driver = Driver()

    async def flushes(no_flush: bool) -> int:
        flushed.clear()
        daemon = Daemon(driver)
        file = {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}
        cache = {"no-flush": no_flush}
        disk = {"driver": "qcow2", "node-name": "n", "file": file, "cache": cache}
        node = await nodes.add(daemon, disk)
        await node.write([0], [b"x"])
        await node.flush()
        daemon.stop()
        await daemon.until_stopped()
        return len(flushed)

    try:
        assert driver.run(flushes(True)) == 0
        assert driver.run(flushes(False)) > 0
    finally:
        driver.close()


def test_direct_by_what_it_does(tmp_path: Path) -> None:
    images(tmp_path)
    node = {"driver": "raw", "file": {"driver": "file", "filename": "disk.raw"}}
    with daemon(OURS, tmp_path) as (process, (client,)):

        def direct() -> bool:
            for fd in Path(f"/proc/{process.pid}/fd").iterdir():
                if fd.exists() and fd.resolve() == (tmp_path / "disk.raw").resolve():
                    info = Path(f"/proc/{process.pid}/fdinfo/{fd.name}").read_text()
                    return bool(int(info.split("flags:")[1].split()[0], 8) & os.O_DIRECT)
            raise AssertionError("it is not open")

        for wanted in False, True:
            cache = {"direct": wanted}
            assert client.send("blockdev-add", {**node, "node-name": "n", "cache": cache})
            assert direct() is wanted
            client.do("blockdev-del", node_name="n")
