"""Other options and other children for nodes in use, beside qemu-storage-daemon."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.cli.main import main
from diskwright.monitor import all_commands
from diskwright.monitor.daemon import Daemon
from monitor.inside import Peer, with_peers
from monitor.running import OURS, THEIRS, Client, daemon, needs_qsd, needs_unix
from monitor.test_nodes import Step, compare
from protocols.support import Linux, Watching, using

all_commands()
pytestmark = [needs_unix, needs_qsd]

LOWER = {"driver": "file", "filename": "disk.raw"}


def test_reopening(tmp_path: Path) -> None:
    def again(**options: Any) -> Step:
        return "blockdev-reopen", {
            "options": [{key.replace("_", "-"): value for key, value in options.items()}]
        }

    raw = {"driver": "raw", "node_name": "raw"}
    top = {"driver": "qcow2", "node_name": "over3", "file": "image"}
    show: Step = ("query-named-block-nodes", {"flat": True})
    script: list[Step] = [
        ("blockdev-add", {**LOWER, "node-name": "one"}),
        ("blockdev-add", {"driver": "file", "filename": "over1.qcow2", "node-name": "two"}),
        ("blockdev-add", {"driver": "raw", "node-name": "raw", "file": "one"}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "over2",
                          "file": {"driver": "file", "filename": "over2.qcow2"}}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "over3", "file":
                          {"driver": "file", "filename": "over3.qcow2", "node-name": "image"}}),
        again(**raw, file="two"),
        show,
        again(**raw, file="one", read_only=True, detect_zeroes="on", discard="unmap"),
        show,
        again(**raw, file="one"),
        show,
        again(**raw, file="missing"),
        again(**raw, file="raw"),
        again(**raw, file=LOWER),
        again(**raw, file="one", force_share=True),
        again(**{**raw, "driver": "qcow2"}, file="one"),
        again(**top, backing="over2"),
        show,
        again(**top),
        again(**top, backing="missing"),
        again(**top, backing="over3"),
        ("blockdev-del", {"node-name": "over2"}),
        again(**top, backing=None),
        show,
        ("blockdev-del", {"node-name": "over2"}),
        again(node_name="one", driver="file", filename="two"),
        again(node_name="one", driver="file", filename="disk.raw", read_only=True),
        show,
    ]  # fmt: skip
    compare(tmp_path, script)


def file_at(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """A file's node, called like it."""
    file = {"driver": "file", "node-name": f"{name}-file", "filename": str(folder / name)}
    return {**file, **{key.replace("_", "-"): value for key, value in more.items()}}


def opened(path: Path, process: int | str = "self") -> list[tuple[int, set[int]]]:
    """For writing (2) or not (0), and the locked bytes: of each descriptor of the file."""
    found = []
    for fd in Path(f"/proc/{process}/fd").iterdir():
        try:
            if os.readlink(fd) != str(path):
                continue
            lines = Path(f"/proc/{process}/fdinfo/{fd.name}").read_text().splitlines()
        except FileNotFoundError:
            continue
        flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
        ends = [line.split()[-2:] for line in lines if line.startswith("lock:")]
        held = {byte for first, last in ends for byte in range(int(first), int(last) + 1)}
        found.append((flags & os.O_ACCMODE, held))
    return found


def test_options(tmp_path: Path) -> None:
    """What may change, and in which words the rest is refused."""
    disk = {**LOWER, "node-name": "disk"}
    lazy = {"driver": "qcow2", "node-name": "lazy", "file": "lazy-file"}
    raw = {"driver": "raw", "node-name": "raw", "file": "disk"}
    own = {"driver": "qcow2", "node-name": "own"}
    inner = {"driver": "file", "filename": "over2.qcow2"}
    given = {"driver": "null-co", "node-name": "null", "size": 1 << 20}
    limited = {"driver": "blkdebug", "node-name": "limited", "image": "disk", "align": 512}
    fixed = {**LOWER, "filename": "over3.qcow2", "node-name": "fixed", "locking": "auto"}
    lazy_file = {"driver": "file", "filename": "over1.qcow2", "node-name": "lazy-file"}
    script: list[Step] = [
        ("blockdev-add", options)
        for options in (
            disk, lazy_file, fixed, raw, {**lazy, "backing": None}, given, limited,
            {**own, "file": inner, "backing": None},
        )
    ]  # fmt: skip
    show: Step = ("query-named-block-nodes", {"flat": True})
    lazy["backing"] = None
    changes: list[dict[str, Any]] = [
        {**raw, "size": 65536}, {**raw, "offset": 65536}, {**raw, "offset": 1, "size": 1},
        {**raw, "size": 1 << 40}, {**raw, "offset": 1 << 40}, raw,
        *({**lazy, **options} for options in (
            {"l2-cache-size": 65536}, {"refcount-cache-size": 1 << 60}, {"cache-size": 1 << 20},
            {"cache-size": 65536, "l2-cache-size": 131072}, {"l2-cache-entry-size": 100},
            {"cache-clean-interval": 5}, {"cache-clean-interval": 1 << 33},
            {"lazy-refcounts": True}, {"pass-discard-request": False},
            {"pass-discard-snapshot": False}, {"pass-discard-other": True},
            {"discard-no-unref": True}, {"overlap-check": "all"}, {"overlap-check": "most"},
            {"overlap-check": {"template": "none", "main-header": True}}, {"data-file": "disk"},
            {"encrypt": {"format": "luks", "key-secret": "x"}}, {"read-only": True},
            {"cache": {"direct": True}}, {"force-share": True}, {"driver": "raw"},
        )),
        *({**disk, **options} for options in (
            {"cache": {"no-flush": True}}, {"discard": "unmap", "detect-zeroes": "unmap"},
            {"detect-zeroes": "on"}, {"auto-read-only": True}, {"read-only": True},
            {"locking": "on"}, {"aio": "native"}, {"aio-max-batch": 0}, {"drop-cache": True},
        )),
        fixed, {key: value for key, value in fixed.items() if key != "locking"},
        {**own, "file": inner, "backing": None, "read-only": True},
        {**own, "file": {**inner, "cache": {"direct": True}}, "backing": None},
        {**own, "file": {**inner, "filename": "other"}, "backing": None},
        {**given, "size": 512}, {"driver": "null-co", "node-name": "null"},
        {**given, "read-only": True}, limited, {**limited, "align": 1024},
        {**limited, "image": "fixed"}, {**lazy, "node-name": "missing"},
    ]  # fmt: skip
    for options in changes:
        script += [("blockdev-reopen", {"options": [options]})]
    script += [
        show,
        ("blockdev-reopen", {"options": [{**lazy, "read-only": True}, {**raw, "size": 1}]}),
        ("blockdev-reopen", {"options": [raw, {**raw, "read-only": True}]}),
        ("blockdev-reopen", {"options": [{**raw, "size": 512}, raw]}),
        show,
    ]
    compare(tmp_path, script)


def test_a_size_that_clients_were_told(tmp_path: Path) -> None:
    """QEMU lets it change, and its server then ends at a read behind the end."""
    (tmp_path / "r").write_bytes(bytes(1 << 20))
    raw = {"driver": "raw", "node-name": "r", "file": "r-file"}
    with daemon(OURS, tmp_path) as (_, (client,)):
        client.do("blockdev-add", **file_at(tmp_path, "r"))
        client.do("blockdev-add", **raw)
        client.do("nbd-server-start", addr={"type": "unix", "data": {"path": "s"}})
        client.do("block-export-add", type="nbd", id="e", node_name="r")
        for options in {"size": 65536}, {"offset": 512}:
            found = client.send("blockdev-reopen", {"options": [{**raw, **options}]})
            assert found["error"]["desc"].startswith("Permission conflict on node 'r': permissions")
        client.do("blockdev-reopen", options=[{**raw, "size": 1 << 20}])


def test_an_export_that_can_only_be_read(tmp_path: Path) -> None:
    """With auto-read-only a node is what the server offers."""
    server = {"type": "unix", "path": "s"}
    far = {"driver": "nbd", "node-name": "far", "server": server, "export": "n"}
    with daemon(OURS, tmp_path) as (_, (client,)):
        client.do("blockdev-add", driver="null-co", node_name="n", size=1 << 20)
        client.do("nbd-server-start", addr={"type": "unix", "data": {"path": "s"}})
        client.do("block-export-add", type="nbd", id="e", node_name="n")
        found = client.send("blockdev-add", far)
        assert "for reading only" in found["error"]["desc"]
        far["auto-read-only"] = True
        client.do("blockdev-add", **far)
        client.do("blockdev-reopen", options=[far])
        writer = {"type": "nbd", "id": "w", "node-name": "far", "writable": True}
        found = client.send("block-export-add", writer)
        assert found["error"]["desc"] == "Cannot export read-only node as writable"
        client.do("blockdev-del", node_name="far")


def test_files_follow_their_writers(tmp_path: Path) -> None:
    """With auto-read-only a file is open for writing while somebody writes."""
    found: dict[str, list[Any]] = {}
    drop: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not installed")
        drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-dac_override"]
    for name, argv in ("ours", OURS), ("theirs", THEIRS):
        folder = tmp_path / name
        folder.mkdir()
        disk = folder / "disk"
        disk.write_bytes(bytes(1 << 20))
        diskwright.create(str(folder / "image"), format="qcow2", size=1 << 20)
        with daemon(drop + argv, folder) as (process, (client,)):
            found[name] = following(client, disk, partial(opened, process=process.pid))
    assert found["ours"] == found["theirs"]
    assert any(flags == 2 for step in found["ours"] for flags, _ in step[1])


def following(client: Client, disk: Path, look: Callable[[Path], Any]) -> list[Any]:
    """The replies, and how the file is open after each step."""
    auto = file_at(disk.parent, disk.name, auto_read_only=True)
    file, raw = auto["node-name"], {"driver": "raw", "node-name": "raw"}
    client.do("nbd-server-start", addr={"type": "unix", "data": {"path": "s"}})
    told: list[Any] = []

    def step(command: str, /, **arguments: Any) -> None:
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply = client.send(command, words)
        desc = reply.get("error", {}).get("desc", "").replace(str(disk.parent), "")
        told.append((desc, look(disk), look(disk.with_name("image"))))

    def export(node: str, writable: bool = True) -> None:
        step("block-export-add", type="nbd", id=f"{node}{writable}", name=f"{node}{writable}",
             node_name=node, writable=writable)  # fmt: skip

    def reopen(**options: Any) -> None:
        step("blockdev-reopen", options=[auto | {k.replace("_", "-"): options[k] for k in options}])

    step("blockdev-add", **auto)
    step("blockdev-add", **raw, file=file)
    export(file, False)
    export("raw")
    export(file)
    step("block-export-del", id="rawTrue")
    step("block-export-del", id=f"{file}True")
    step("block_resize", node_name="raw", size=2 << 20)
    step("block-export-del", id=f"{file}False")
    step("block_resize", node_name="raw", size=2 << 20)
    disk.chmod(0o444)
    export("raw")
    step("block_resize", node_name="raw", size=1 << 20)
    reopen()
    reopen(auto_read_only=False)
    disk.chmod(0o644)
    export("raw")
    disk.chmod(0o444)
    reopen(auto_read_only=False)
    disk.chmod(0o644)
    reopen(auto_read_only=False)
    step("block-export-del", id="rawTrue")
    reopen(read_only=True)
    export(file)
    reopen()
    inner = {"driver": "file", "filename": str(disk.with_name("image"))}
    step("blockdev-add", driver="qcow2", node_name="q", auto_read_only=True, file=inner)
    step("blockdev-reopen", options=[
        {"driver": "qcow2", "node-name": "q", "file": inner, "read-only": True,
         "auto-read-only": True}])  # fmt: skip
    return told


def test_bitmaps_stay_in_use(tmp_path: Path) -> None:
    diskwright.create(str(tmp_path / "q"), format="qcow2", size=1 << 20)
    disk = {"driver": "qcow2", "node-name": "q", "file": file_at(tmp_path, "q")}

    async def talk(daemon: Daemon, peer: Peer) -> None:
        async def count() -> int:
            (found,) = [one for one in await peer.do("query-named-block-nodes")
                        if one["node-name"] == "q"]  # fmt: skip
            return int(found["dirty-bitmaps"][0]["count"])

        await peer.meet()
        await peer.do("blockdev-add", **disk)
        await peer.do("block-dirty-bitmap-add", node="q", name="p", persistent=True)
        address = {"type": "unix", "data": {"path": str(tmp_path / "s")}}
        await peer.do("nbd-server-start", addr=address)
        await peer.do("block-export-add", type="nbd", id="e", node_name="q", bitmaps=["p"],
                      writable=True)  # fmt: skip
        served = daemon.exports["e"]
        await served.disk.write([0], [b"x" * 65536])
        await peer.do("blockdev-reopen", options=[{**disk, "cache": {"no-flush": True}}])
        await served.disk.write([131072], [b"x" * 65536])
        assert next(iter(served.bitmaps.values())).count == await count() == 131072
        found = await peer.ask("block-dirty-bitmap-remove", {"node": "q", "name": "p"})
        assert "currently in use" in found["error"]["desc"]
        await peer.do("block-export-del", id="e")
        await peer.do("blockdev-del", node_name="q")
        await peer.do("blockdev-add", **disk)
        assert await count() == 131072

    with_peers(talk)


class Nth(Watching):
    """The n-th call fails, once it is armed."""

    left = 0

    def _note(self, row: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def lock(self, fd: int, byte: int, held: bool) -> None:
        if held:
            self._note("lock")
        Linux.lock(self, fd, byte, held)

    def again(self, fd: int, filename: str, flags: int) -> int:
        self._note("again")
        return super().again(fd, filename, flags)


@pytest.mark.skipif(sys.platform != "linux", reason="counts calls of Linux")
def test_all_of_them_or_none(tmp_path: Path) -> None:
    """Four nodes are opened anew together; whichever step fails, all are what they were."""
    for name in "abc":
        diskwright.create(str(tmp_path / name), format="qcow2", size=1 << 20)
    for name in "rs":
        (tmp_path / name).write_bytes(bytes(1 << 20))
    table = Nth()

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        for name in "crs":
            await peer.do("blockdev-add", **file_at(tmp_path, name, auto_read_only=name == "r"))
        before: list[dict[str, Any]] = [
            {"driver": "qcow2", "node-name": "a", "file": "a-file", "read-only": True},
            {"driver": "qcow2", "node-name": "b", "file": "b-file", "backing": "a"},
            {"driver": "raw", "node-name": "r", "file": "r-file", "read-only": True},
            {"driver": "qcow2", "node-name": "c", "file": "c-file"},
        ]
        after: list[dict[str, Any]] = [
            {"driver": "qcow2", "node-name": "a", "file": "a-file", "l2-cache-size": 65536},
            {"driver": "qcow2", "node-name": "b", "file": "b-file", "read-only": True,
             "backing": None},
            {"driver": "raw", "node-name": "r", "file": "s-file", "offset": 65536},
            {"driver": "qcow2", "node-name": "c", "file": "c-file", "overlap-check": "all",
             "cache": {"no-flush": True}, "detect-zeroes": "on"},
        ]  # fmt: skip
        for options in before:
            if options["node-name"] in "ab":
                options = {**options, "file": file_at(tmp_path, options["node-name"])}
            await peer.do("blockdev-add", **options)
        await peer.do("block-dirty-bitmap-add", node="c", name="kept")
        nodes = daemon.graph.nodes

        async def state() -> Any:
            shown = await peer.do("query-named-block-nodes")
            edges = [{slot: edge.child for slot, edge in node.children.items()}
                     for node in nodes.values()]  # fmt: skip
            own = [(node.options, node.mode, getattr(node, "engine", None))
                   for node in nodes.values()]  # fmt: skip
            return shown, edges, own, [opened(tmp_path / name) for name in "abcrs"]

        written = failed = 0
        for n in itertools.count(1):
            old = await state()
            table.left = n
            found = await peer.ask("blockdev-reopen", {"options": after})
            spent, table.left = table.left <= 0, 0
            if not spent:
                break
            if "error" in found:  # else it could do without
                assert "Input/output error" in found["error"]["desc"], n
                assert await state() == old, n
                failed += 1
            # What failed may have been a flush, which is forgotten by opening anew.
            await peer.do("blockdev-reopen", options=before)
            for name in "bc":
                await nodes[name].write([n * 4096], [bytes([n]) * 4096])
                await nodes[name].flush()
            written = n
        assert found == {"return": {}}
        assert failed > 15
        a, b, c, r, s = [opened(tmp_path / name) for name in "abcrs"]
        assert [flags for ((flags, _),) in (a, b, c, r, s)] == [2, 0, 2, 0, 2]
        assert nodes["r"].size == (1 << 20) - 65536
        assert nodes["b"].child("backing") is None and nodes["c"].detect_zeroes == "on"
        for name in "bc":
            for i in range(1, written + 1):
                assert (await nodes[name].read([i * 4096], [4096]))[0] == bytes([i]) * 4096
        await peer.do("block-dirty-bitmap-remove", node="c", name="kept")

    with using(table):
        with_peers(talk)
    for name in "abc":
        assert main("qemu-img", ["check", "-q", str(tmp_path / name)]) == 0
