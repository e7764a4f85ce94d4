"""Opening again in place: mode, users above, and life after a failed flush."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import FlushFailed, ImageInUse
from diskwright.graph.graph import leaf_of
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.perms import ALL
from diskwright.graph.reopen import reopen

from .tools import run, shell


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


DESCRIPTIONS: dict[str, Any] = {
    "raw": {"driver": "raw", "file.filename": "raw"},
    "qcow2": {"driver": "qcow2", "file.filename": "qcow2"},
    "both": {
        "driver": "raw",
        "offset": 4096,
        "file": {"driver": "qcow2", "file.filename": "qcow2"},
    },
    "memory": {"driver": "raw", "file": {"driver": "memory", "size": 1 << 20}},
}


@pytest.mark.parametrize("which", DESCRIPTIONS)
def test_back_and_forth(which: str, here: Path, peer: Any) -> None:
    for format in ("raw", "qcow2"):
        diskwright.create(format, format=format, size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, DESCRIPTIONS[which], writable=True)
        for i in range(3):
            await node.write([i * 70000], [b"%d" % i * 1000])
            await reopen(node, writable=False)
            assert node.read_only
            with pytest.raises(PermissionError):
                await node.write([0], [b"no"])
            for j in range(i + 1):
                (found,) = await node.read([j * 70000], [1000])
                assert bytes(found) == b"%d" % j * 1000
            await reopen(node, writable=True)
        await node.write([500000], [b"end"])
        await close_disk(node)

    run(work)
    if which != "raw":
        shell(here, peer("qemu-img"), "check", "-f", "qcow2", "qcow2")


def test_those_above_see_the_change() -> None:
    diskwright.create("a", format="raw", size=1 << 20)
    seen: list[bool] = []

    class Above(Node):
        def child_changed(self, slot: str) -> None:
            child = self.child(slot)
            if child is not None:
                seen.append(child.read_only)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a", format="raw")
        top = Above(driver, "above")
        top.attach("file", node, shared=ALL)
        await reopen(node, writable=True)
        await reopen(node, writable=False)
        top.detach("file")
        await close_disk(node)

    run(work)
    assert seen[0] is True and seen[-1] is True and False in seen


def test_a_mode_that_cannot_be_had_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a")
        leaf = leaf_of(node)
        real = leaf.reopen  # type: ignore[attr-defined]

        async def refused(*, writable: bool, **more: Any) -> Any:
            if writable:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a")
            return await real(writable=writable, **more)

        monkeypatch.setattr(leaf, "reopen", refused)
        with pytest.raises(OSError, match="Read-only file system"):
            await reopen(node, writable=True)
        assert node.read_only and leaf.read_only
        assert (await node.read([0], [4]))[0] == bytes(4)
        await close_disk(node)

    run(work)


def test_a_lock_that_cannot_be_had_leaves_the_old_mode() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a")
        other = await open_disk(driver, "a")
        with pytest.raises(ImageInUse):
            await reopen(node, writable=True)
        assert node.read_only
        assert (await node.read([0], [4]))[0] == bytes(4)
        await close_disk(other)
        await reopen(node, writable=True)
        await node.write([0], [b"mine"])
        await close_disk(node)

    run(work)


def test_life_after_a_failed_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "a", writable=True)
        leaf = leaf_of(node)
        await node.write([0], [b"safe"])
        await node.flush()
        await node.write([70000], [b"lost?"])

        async def broken() -> None:
            raise OSError(errno.EIO, "disk")

        with monkeypatch.context() as patch:
            patch.setattr(leaf, "flush", broken)
            with pytest.raises(OSError, match="disk"):
                await node.flush()
        with pytest.raises(FlushFailed):
            await node.flush()
        await reopen(node)
        assert (await node.read([0], [4]))[0] == b"safe"
        await node.write([140000], [b"new"])
        await node.flush()
        await close_disk(node)

    run(work)
    with diskwright.open("a") as disk:
        assert disk.read_at(0, 4) == b"safe"
        assert disk.read_at(140000, 3) == b"new"


def test_resize_is_seen_above() -> None:
    diskwright.create("a", format="raw", size=1 << 20)

    async def work(driver: Driver) -> None:
        description = {"driver": "raw", "file": {"driver": "raw", "file.filename": "a"}}
        top = await open_disk(driver, description, writable=True)
        below = top.child("file")
        assert below is not None
        await below.truncate(2 << 20)
        assert (below.size, top.size) == (2 << 20, 2 << 20)
        await top.truncate(3 << 20)
        assert (leaf_of(top).size, below.size, top.size) == (3 << 20,) * 3
        await top.write([(3 << 20) - 4], [b"last"])
        await close_disk(top)

    run(work)
