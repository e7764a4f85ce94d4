"""The jobs that make and amend images: paused, cancelled, killed at work, left by their client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diskwright.api import check, info
from diskwright.cli.main import main
from diskwright.errors import DiskError
from diskwright.formats import luks1_slots
from diskwright.jobs import steps
from diskwright.monitor import all_commands
from diskwright.monitor.daemon import Daemon
from monitor.inside import Peer, with_peers
from monitor.running import needs_unix

pytestmark = needs_unix
all_commands()
SIZE = 1 << 20
FULL: dict[str, dict[str, Any]] = {
    "file": {"driver": "file"},
    "qcow2": {"driver": "qcow2", "preallocation": "full"},
    "luks": {"driver": "luks", "key-secret": "key", "iter-time": 10, "preallocation": "full"},
    "qcow2 with a data file": {"driver": "qcow2", "data-file": "data", "preallocation": "full"},
    "vmdk": {"driver": "vmdk", "subformat": "monolithicFlat", "extents": ["data"]},
    "vhdx": {"driver": "vhdx", "subformat": "fixed"},
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "PIECE", 1 << 16)
    monkeypatch.setattr(luks1_slots, "_SAMPLE", 0.001)  # seconds that PBKDF2 is measured for


async def begun(peer: Peer, folder: Path, options: dict[str, Any]) -> None:
    """A creation in ``image`` (and ``data``) has begun."""
    await peer.do("object-add", qom_type="secret", id="key", data="secret")
    options = {"size": SIZE, **options}
    if options["driver"] == "file":
        options.update(filename=str(folder / "image"), preallocation="full")
    else:
        for name in ("image", "data"):
            (folder / name).touch()
            where = str(folder / name)
            await peer.do("blockdev-add", driver="file", node_name=name, filename=where)
        options["file"] = "image"
    await peer.do("blockdev-create", job_id="j", options=options)


async def paused_behind(daemon: Daemon, peer: Peer, turns: int) -> bool:
    """Let it run for some turns and pause it; False when it has come to its end before."""
    job = daemon.jobs.all["j"]
    for _ in range(turns):
        await daemon.driver.turn()
    if job.ended:
        return False
    assert await peer.ask("job-pause", {"id": "j"}) == {"return": {}}
    while not job.ended and job.status != "paused":
        await daemon.driver.turn()
    return job.status == "paused"


@pytest.mark.parametrize("kind", FULL)
def test_paused_and_cancelled_at_work(kind: str, tmp_path: Path) -> None:
    """Wherever it is cancelled: no file, or an empty one; while it rests it writes nothing, and
    what is there is no image that could be taken for one."""
    where = tmp_path / "image"
    paused = 0

    async def talk(daemon: Daemon, peer: Peer) -> None:
        nonlocal paused
        await peer.meet()
        await begun(peer, tmp_path, FULL[kind])
        if not await paused_behind(daemon, peer, turns):
            return
        paused += 1
        before = where.stat() if where.exists() else None
        for _ in range(30):
            await daemon.driver.turn()
        if before is not None:
            assert (where.stat().st_size, where.stat().st_mtime_ns) == (
                before.st_size, before.st_mtime_ns
            )  # fmt: skip
            if kind != "file":
                with pytest.raises(DiskError):
                    info(str(where), format=FULL[kind]["driver"])
        await peer.do("job-cancel", id="j")
        await peer.told(status="concluded")
        (found,) = await peer.do("query-jobs")
        assert found["error"] == "Operation canceled"
        if kind == "file":
            assert not where.exists()
        else:
            assert where.stat().st_size == 0
            await peer.do("job-dismiss", id="j")
            await peer.do("blockdev-del", node_name="image")

    for turns in (1, 6, 25):  # noqa: B007 - `talk` looks at it
        where.unlink(missing_ok=True)
        with_peers(talk)
    assert paused >= 2


@pytest.mark.parametrize("kind", [kind for kind in FULL if kind != "luks"])
def test_paused_often_it_still_is_made(kind: str, tmp_path: Path) -> None:
    where = tmp_path / "image"

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await begun(peer, tmp_path, FULL[kind])
        for turns in (1, 2, 5, 7):
            if await paused_behind(daemon, peer, turns):
                await peer.do("job-resume", id="j")
        await peer.told(status="concluded")
        (found,) = await peer.do("query-jobs")
        assert "error" not in found
        assert found["current-progress"] == found["total-progress"]
        told = kind == "file" or "preallocation" in FULL[kind]
        assert (found["total-progress"] > SIZE) == told

    with_peers(talk)
    if kind == "file":
        assert where.read_bytes() == bytes(SIZE)
    else:
        assert check(str(where), format=FULL[kind]["driver"]).ok
        assert info(str(where)).virtual_size == SIZE
    if kind != "vmdk":  # QAPI has no preallocation for it
        assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= SIZE


def test_left_by_its_client(tmp_path: Path) -> None:
    async def talk(daemon: Daemon, peer: Peer, other: Peer) -> None:
        await peer.meet()
        await other.meet()
        await begun(peer, tmp_path, FULL["qcow2"])
        daemon.driver.forget(peer.sock.fileno())
        peer.sock.shutdown(2)
        await other.told(status="concluded")
        await other.do("job-dismiss", id="j")

    with_peers(talk, 2)
    assert check(str(tmp_path / "image")).ok


def test_the_end_of_the_daemon_ends_it(tmp_path: Path) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await begun(peer, tmp_path, FULL["file"])
        assert await paused_behind(daemon, peer, 5)
        assert (tmp_path / "image").exists()
        await peer.do("quit")

    with_peers(talk)
    assert not (tmp_path / "image").exists()


def test_a_node_in_use_is_left_alone(tmp_path: Path) -> None:
    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        await begun(peer, tmp_path, FULL["qcow2"])
        assert await paused_behind(daemon, peer, 5)
        options = {"driver": "vhdx", "file": "image", "size": SIZE}
        await peer.do("blockdev-create", job_id="k", options=options)
        await peer.told(id="k", status="concluded")
        second, _ = await peer.do("query-jobs")
        assert second["error"] == (
            "Node 'image' is busy: block device is in use by block job: create"
        )
        reply = await peer.ask("blockdev-del", {"node-name": "image"})
        assert reply["error"]["desc"] == "Block device image is in use"
        again = {"driver": "file", "node-name": "image", "filename": str(tmp_path / "image")}
        for name, arguments in (
            ("blockdev-reopen", {"options": [again]}),
            ("block_resize", {"node-name": "image", "size": 512}),
        ):
            reply = await peer.ask(name, arguments)
            assert reply["error"]["desc"].startswith("Node 'image' is busy"), name
        await peer.do("job-resume", id="j")
        await peer.told(id="j", status="concluded")

    with_peers(talk)
    assert check(str(tmp_path / "image")).ok


def encrypted(folder: Path) -> tuple[Path, list[str]]:
    """An image, and what opens it."""
    path = folder / "secret.qcow2"
    secret = ["--object", "secret,id=key,data=secret"]
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    argv = ["create", "-q", "-f", "qcow2", *secret, "-o", options, str(path), "1M"]
    assert main("qemu-img", argv) == 0
    return path, secret


def test_amending_beside_requests(tmp_path: Path, capsys: Any) -> None:
    """Paused at work it lets requests by; cancelled before its first write it has changed nothing;
    the new passphrase then opens the image."""
    path, _ = encrypted(tmp_path)

    async def talk(daemon: Daemon, peer: Peer) -> None:
        await peer.meet()
        for id, data in (("key", "secret"), ("new", "other")):
            await peer.do("object-add", qom_type="secret", id=id, data=data)
        encrypt: dict[str, Any] = {"format": "luks", "key-secret": "key"}
        file = {"driver": "file", "filename": str(path)}
        await peer.do("blockdev-add", driver="qcow2", node_name="d", encrypt=encrypt, file=file)
        slot = {"format": "luks", "state": "active", "new-secret": "new", "iter-time": 10}
        amend = {"driver": "qcow2", "encrypt": slot}
        before = path.read_bytes()
        for cancel in (True, False):
            await peer.do("x-blockdev-amend", job_id="j", node_name="d", options=amend)
            assert await paused_behind(daemon, peer, 3)
            reply = await peer.ask(
                "x-blockdev-amend", {"job-id": "k", "node-name": "d", "options": amend}
            )
            assert reply["error"]["desc"].startswith("Node 'd' is busy")
            disk = daemon.graph.nodes["d"]
            if cancel:
                assert path.read_bytes() == before
            else:
                await disk.write([0], [b"guest" * 100])
                await disk.flush()
            assert bytes((await disk.read([1 << 19], [512]))[0]) == bytes(512)
            await peer.do("job-cancel" if cancel else "job-resume", id="j")
            await peer.told(id="j", status="concluded")
            (found,) = await peer.do("query-jobs")
            assert found.get("error") == ("Operation canceled" if cancel else None)
            await peer.do("job-dismiss", id="j")
            peer.events.clear()
            if cancel:
                assert path.read_bytes() == before

    with_peers(talk)
    with_new = ["--object", "secret,id=key,data=other"]
    image = f"driver=qcow2,encrypt.key-secret=key,file.filename={path}"
    assert main("qemu-io", [*with_new, "--image-opts", image, "-c", "read 0 4k"]) == 0
    assert "read 4096/4096" in capsys.readouterr().out
