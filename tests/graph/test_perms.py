"""The lock bytes that a graph holds are those that the real tools hold."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Cancelled, Driver
from diskwright.errors import ImageInUse
from diskwright.graph.gate import Gate
from diskwright.graph.graph import Graph
from diskwright.graph.names import parse_image_opts
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.perms import ALL
from diskwright.graph.reopen import reopen

from .tools import run, shell


@pytest.fixture(autouse=True)
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    diskwright.create("r", format="raw", size=1 << 20)
    diskwright.create("a", format="qcow2", size=1 << 20)
    for name, base, format in (("b", "a", "qcow2"), ("c", "r", "raw")):
        diskwright.create(
            name, format="qcow2", options={"backing_file": base, "backing_fmt": format}
        )
    return tmp_path


def locked(path: str) -> set[int]:
    """The bytes of ``path`` on which anyone holds a lock."""
    inode = Path(path).stat().st_ino
    found: set[int] = set()
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[5].endswith(f":{inode}"):
            found.update(range(int(words[6]), int(words[7]) + 1))
    return found


@contextmanager
def reading_commands(*command: str) -> Iterator[None]:
    """A program that waits for its standard input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as program:
        try:
            yield
        finally:
            assert program.stdin
            program.stdin.close()


OPENINGS = [
    ("-f raw r", "r"),
    ("-r -f raw r", "r"),
    ("-r -U -f raw r", "r"),
    ("-f qcow2 a", "a"),
    ("-r -f qcow2 a", "a"),
    ("-r -U -f qcow2 a", "a"),
    ("-f qcow2 b", "a b"),
    ("-r -f qcow2 b", "a b"),
    ("-f qcow2 c", "r c"),
    ("-r -U -f qcow2 c", "r c"),
    ("--image-opts driver=raw,offset=512,file.driver=file,file.filename=r", "r"),
    ("--image-opts driver=raw,file.driver=raw,file.file.driver=file,file.file.filename=r", "r"),
    ("--image-opts driver=raw,file.driver=qcow2,file.file.driver=file,file.file.filename=a", "a"),
    ("--image-opts driver=file,filename=r", "r"),
]


@pytest.mark.parametrize(("words", "files"), OPENINGS)
def test_lock_bytes(words: str, files: str, peer: Any) -> None:
    arguments = words.split()
    with reading_commands(peer("qemu-io"), *arguments):
        while not all(100 in locked(name) for name in files.split()):
            time.sleep(0.01)
        time.sleep(0.1)  # the permissions of the node above follow those of the one below
        theirs = {name: locked(name) for name in files.split()}
    reference: Any = arguments[-1]
    format = arguments[-2] if "-f" in arguments else None
    if "--image-opts" in arguments:
        reference = parse_image_opts(reference)

    async def work(driver: Driver) -> dict[str, set[int]]:
        node = await open_disk(
            driver,
            reference,
            format=format,
            writable="-r" not in arguments,
            force_share="-U" in arguments,
            gate=Gate("trusted"),
        )
        found = {name: locked(name) for name in files.split()}
        await close_disk(node)
        return found

    assert run(work) == theirs
    assert all(not locked(name) for name in files.split())


def test_each_refuses_the_others_open_images(images: Path, peer: Any) -> None:
    qemu_io = peer("qemu-io")
    with diskwright.open("a", writable=True):
        assert 'Failed to get "write" lock' in shell(images, qemu_io, "-c", "length", "a", ok=False)
        assert 'get shared "write" lock' in shell(images, qemu_io, "-r", "-c", "length", "a",
                                                  ok=False)  # fmt: skip
        assert "1 MiB" in shell(images, qemu_io, "-U", "-r", "-c", "length", "a")
        with pytest.raises(ImageInUse):
            diskwright.open("a")
        with diskwright.open("a", force_share=True) as disk:
            assert disk.read_at(0, 4) == bytes(4)
    with reading_commands(qemu_io, "a"):
        while 203 not in locked("a"):
            time.sleep(0.01)
        for writable in (False, True):
            with pytest.raises(ImageInUse, match="Is another process using the image"):
                diskwright.open("a", writable=writable)
        with diskwright.open("a", force_share=True):
            pass


def test_a_users_refusal_to_share_reaches_the_file() -> None:
    async def work(driver: Driver) -> None:
        node = await open_disk(
            driver, "r", format="raw", writable=True, shared=ALL - {"resize"}, resize=True
        )
        assert locked("r") == {100, 101, 103, 203}
        await close_disk(node)

    run(work)


def test_a_shared_file_gives_up_what_nobody_needs_any_more() -> None:
    async def work(driver: Driver) -> None:
        graph = Graph(driver)
        low = {"driver": "file", "filename": "r", "node-name": "low"}
        reader = await open_disk(
            driver, {"driver": "raw", "file": low}, writable=False, graph=graph
        )
        assert locked("r") == {100}
        await close_disk(reader)
        writer = await open_disk(driver, {"driver": "raw", "file": low}, writable=True, graph=graph)
        second = await open_disk(
            driver, {"driver": "raw", "read-only": "on", "file": "low"}, graph=graph
        )
        assert locked("r") == {100, 101}
        await close_disk(writer)
        assert locked("r") == {100}
        assert (await second.read([0], [1]))[0] == b"\0"
        await close_disk(second)

    run(work)


def test_a_cancelled_open_or_close_holds_nothing() -> None:
    for turns in range(0, 40, 3):

        async def work(driver: Driver, turns: int = turns) -> None:
            task = driver.spawn(open_disk(driver, "b", writable=True, gate=Gate("trusted")))
            for _ in range(turns):
                await driver.turn()
            task.cancel()
            try:
                node = await task
            except Cancelled:
                pass
            else:
                closing = driver.spawn(close_disk(node))
                for _ in range(1 + turns % 5):  # one that has not begun closes nothing
                    await driver.turn()
                closing.cancel()
                try:
                    await closing
                except Cancelled:
                    pass
            assert not locked("a") and not locked("b")

        run(work)


def test_reopening_changes_the_locks() -> None:
    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "b", gate=Gate("trusted"))
        reading = locked("b")
        await reopen(node, writable=True)
        assert locked("b") == {100, 101, 103, 201, 203}
        below = node.child("backing")
        assert below is not None
        before = locked("a")
        await reopen(below, writable=True)
        assert locked("a") == {100, 101, 103, 201, 203}
        await below.write([0], [b"from above"])
        await reopen(below, writable=False)
        assert locked("a") == before
        assert (await node.read([0], [10]))[0] == b"from above"
        await reopen(node, writable=False)
        assert locked("b") == reading
        await close_disk(node)

    run(work)
