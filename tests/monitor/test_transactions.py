"""Transactions: all or nothing, in one moment for whoever writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diskwright.bitmaps import DirtyBitmap
from diskwright.cli.main import main
from diskwright.engine.kernel import Future
from diskwright.graph.backend import Backend
from diskwright.monitor import all_commands
from diskwright.monitor.daemon import Daemon
from diskwright.monitor.transactions import ACTIONS, Transaction, action
from monitor.inside import Peer, with_peers
from monitor.running import needs_unix

pytestmark = needs_unix
all_commands()
CLUSTER = 1 << 16


async def opened(peer: Peer, folder: Path, *names: str) -> None:
    for name in names:
        path = folder / f"{name}.qcow2"
        assert main("qemu-img", ["create", "-q", "-f", "qcow2", str(path), "64M"]) == 0
        file = {"driver": "file", "filename": str(path)}
        await peer.do("blockdev-add", driver="qcow2", node_name=name, file=file)


def bits(daemon: Daemon, node: str, name: str) -> list[tuple[int, int]]:
    found: DirtyBitmap = daemon.graph.nodes[node].engine.bitmaps.get(name)  # type: ignore[attr-defined]
    return list(found.runs())


def clusters(daemon: Daemon, node: str, name: str) -> set[int]:
    return {
        at // CLUSTER
        for offset, length in bits(daemon, node, name)
        for at in range(offset, offset + length, CLUSTER)
    }


def act(kind: str, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": data}


def bitmap(what: str, node: str, name: str, **more: Any) -> dict[str, Any]:
    return act(f"block-dirty-bitmap-{what}", node=node, name=name, **more)


def test_one_moment_for_all_disks(tmp_path: Path) -> None:
    """Two disks get the same writes in turn.  Bitmaps that begin together miss the same writes
    (but for one that was between the disks), even where the actions take a while."""

    @action("x-wait", plain=False)
    async def x_wait(transaction: Transaction) -> None:
        """Let others run."""
        for _ in range(20):
            await transaction.daemon.driver.turn()

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await opened(peer, tmp_path, "a", "b")
        disks = [Backend(daemon.graph.nodes[name]) for name in "ab"]
        daemon.backends = lambda: disks  # type: ignore[method-assign]
        written, stop = 0, False

        async def write() -> None:
            nonlocal written
            while not stop:
                for disk in disks:
                    await disk.write([written * CLUSTER], [b"x" * 512])
                    await daemon.driver.turn()
                written = (written + 1) % 1024

        task = daemon.driver.spawn(write())
        for round in range(2):
            before, seen = written, 0
            while seen < 3:
                await daemon.driver.turn()
                seen += written != before
                before = written
            name = f"m{round}"
            actions = [
                bitmap("add", "a", name),
                act("blockdev-snapshot-internal-sync", device="a", name=name),
                act("x-wait"),
                act("blockdev-snapshot-internal-sync", device="b", name=name),
                bitmap("add", "b", name),
            ]
            await peer.do("transaction", actions=actions)
            while written == before:
                await daemon.driver.turn()
        stop = True
        await task
        for round in range(2):
            found, other = (clusters(daemon, node, f"m{round}") for node in "ab")
            assert found and found <= other and len(other - found) <= 1

    from diskwright.monitor.transactions import ACTION

    ACTION._built = None
    try:
        with_peers(talk)
    finally:
        del ACTIONS["x-wait"]
        ACTION._built = None
    for name in "ab":
        assert main("qemu-img", ["check", "-q", str(tmp_path / f"{name}.qcow2")]) == 0


def test_what_failed_has_not_been(tmp_path: Path, capsys: Any) -> None:
    """Every action is taken back, and the images are what they were before."""

    async def state(peer: Peer, daemon: Daemon) -> str:
        found = await peer.do("query-named-block-nodes", flat=True)
        kept = [
            (one["node-name"], one.get("dirty-bitmaps"), one["image"].get("snapshots"),
             one["image"]["virtual-size"] if one["drv"] != "file" else 0)
            for one in found
        ]  # fmt: skip
        dirty = {
            one["name"]: bits(daemon, node, one["name"])
            for node, bitmaps, *_ in kept
            for one in bitmaps or ()
        }
        return json.dumps([kept, dirty])

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await opened(peer, tmp_path, "a", "b")
        for node in "ab":
            for name, persistent in (("stored", True), ("kept", False), ("off", True)):
                more = {"persistent": persistent, "disabled": name == "off"}
                await peer.do("block-dirty-bitmap-add", node=node, name=name + node, **more)
            disk: Any = daemon.graph.nodes[node]
            await disk.write([0, 9 * CLUSTER], [b"x" * CLUSTER, b"y" * CLUSTER])
        await peer.do("block-dirty-bitmap-clear", node="b", name="keptb")
        await peer.do("blockdev-snapshot-internal-sync", device="a", name="s")
        before = await state(peer, daemon)
        every = [
            bitmap("add", "a", "new", persistent=True),
            bitmap("clear", "a", "storeda"),
            act("block-dirty-bitmap-merge", node="b", target="keptb",
                bitmaps=[{"node": "a", "name": "kepta"}, "storedb"]),
            act("block-dirty-bitmap-merge", node="a", target="new", bitmaps=["kepta"]),
            bitmap("enable", "a", "offa"),
            bitmap("disable", "b", "storedb"),
            bitmap("clear", "b", "offb"),
            bitmap("remove", "b", "offb"),
            act("blockdev-snapshot-internal-sync", device="b", name="t"),
        ]  # fmt: skip
        for count in range(len(every) + 1):
            actions = [*every[:count], act("abort")]
            reply = await peer.ask("transaction", {"actions": actions})
            assert reply["error"]["desc"] == "Transaction aborted using Abort action"
            assert await state(peer, daemon) == before, count
        await peer.do("transaction", actions=every)
        assert bits(daemon, "b", "keptb") == bits(daemon, "a", "kepta") == bits(daemon, "a", "new")
        assert not bits(daemon, "a", "storeda")

    with_peers(talk)
    for name in "ab":
        assert main("qemu-img", ["check", "-q", str(tmp_path / f"{name}.qcow2")]) == 0
    capsys.readouterr()
    assert main("qemu-img", ["info", "--output=json", str(tmp_path / "b.qcow2")]) == 0
    stored = json.loads(capsys.readouterr().out)["format-specific"]["data"]["bitmaps"]
    assert [(one["name"], one["flags"]) for one in stored] == [("storedb", [])]


def test_only_users_of_the_nodes_that_are_named_wait(tmp_path: Path) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await opened(peer, tmp_path, "a", "b")
        address = {"type": "unix", "data": {"path": str(tmp_path / "s")}}
        await peer.do("nbd-server-start", addr=address)
        for name in "ab":
            await peer.do("block-export-add", type="nbd", id=name, node_name=name)
        gate: Future[None] = Future()

        async def stuck(*columns: Any) -> list[bytes]:
            await gate
            return [bytes(512)]

        node: Any = daemon.graph.nodes["b"]
        node.read = stuck
        reading = daemon.driver.start(daemon.exports["b"].disk.read([0], [512]))
        await peer.do("block-dirty-bitmap-add", node="a", name="x")
        actions = [bitmap("add", "a", "y"), bitmap("clear", "a", "x")]
        await peer.do("transaction", actions=actions)
        assert not reading.done
        words = {"node": "b", "name": "x"}
        await peer.send({"execute": "block-dirty-bitmap-add", "arguments": words})
        for _ in range(20):
            await daemon.driver.turn()
        assert not daemon.graph.nodes["b"].engine.bitmaps  # type: ignore[attr-defined]
        gate.set()
        assert await peer.hear() == {"return": {}}
        await reading
        del node.read

    with_peers(talk)
