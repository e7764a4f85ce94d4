"""Files that a format makes beside its image, when it is created and when it grows."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import Create
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageInUse, NotSupported, UsageError
from diskwright.graph import registry
from diskwright.graph.create import create_image, prepare, write_image
from diskwright.graph.creating import bare
from diskwright.graph.gate import Gate
from diskwright.graph.graph import own_leaves
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.reopen import reopen

from .tools import run
from .toys import created, registered, write_toy


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    with registered():
        yield tmp_path


def create(name: str, size: int | None = 512, **options: Any) -> int:
    return run(lambda driver: create_image(driver, name, "toy", size, options))


def listing() -> set[str]:
    return set(os.listdir("."))


def content(name: str) -> bytes:
    async def work(driver: Driver) -> bytes:
        node = await open_disk(driver, name, format="toy", gate=Gate("trusted"))
        (data,) = await node.read([0], [node.size])
        await close_disk(node)
        return bytes(data)

    return run(work)


def test_a_creation_makes_all_its_files_beside_the_image() -> None:
    create("x", extents="a:b")
    assert listing() == {"x", "a", "b"}
    assert content("x") == b"\1" * 512 + b"\2" * 512 + bytes(512)
    os.mkdir("d")
    create("d/x", extents="a:c:d")
    assert listing() == {"x", "a", "b", "d"} and set(os.listdir("d")) == {"x", "a", "c", "d"}
    Path("b").write_bytes(b"old" * 5000)
    create("x", extents="b")
    assert Path("b").read_bytes() == b"\1" * 512, "one that is there is emptied"


def test_the_caller_learns_what_was_made() -> None:
    async def work(driver: Driver) -> tuple[str, ...]:
        found, given, beside = await prepare(driver, "./x", "toy", 512, {"extents": "a:b"})
        return await write_image(driver, "./x", found, given, beside)

    assert run(work) == ("./a", "./b")

    async def again(driver: Driver) -> None:
        # Enough for a gate to let them pass.
        await close_disk(
            await open_disk(driver, "./x", format="toy", gate=Gate(allow=["./a", "./b"]))
        )

    run(again)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_creation_that_fails_leaves_nothing(step: int) -> None:
    options = {"extents": "a:b", "fail_at": step}
    if step == 8:
        create("x", **options)
        assert listing() == {"x", "a", "b"}
        return
    with pytest.raises(OSError, match="No space left"):
        create("x", **options)
    assert listing() == set()
    Path("a").write_bytes(b"a" * 9)
    with pytest.raises(OSError, match="No space left"):
        create("x", **options)
    assert listing() == {"a"}, "what was there stays there"


def test_files_in_use_are_not_emptied() -> None:
    Path("b").write_bytes(b"b" * 512)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "b", format="raw", writable=True, resize=True)
        with pytest.raises(ImageInUse):
            await create_image(driver, "x", "toy", 512, {"extents": "a:b"})
        await close_disk(node)

    run(work)
    assert listing() == {"b"}
    assert Path("b").read_bytes() == b"b" * 512


@pytest.mark.parametrize("name", ["d/a", "../a", "..", ".", "/a", "a\\b", "a\0", "x", "./x"])
def test_odd_names_are_refused(name: str) -> None:
    Path("d").mkdir()
    Path("../a").write_bytes(b"keep")
    with pytest.raises((UsageError, OSError)):
        create("x", extents=f"ok:{name}")
    assert listing() == {"d"} and not os.listdir("d")
    assert Path("../a").read_bytes() == b"keep"
    assert bare("a") and bare("a:b") and bare("...") and not bare("")


def test_the_image_and_its_files_have_different_names() -> None:
    with pytest.raises(UsageError, match="'x' is a file of the image already"):
        create("x", extents="x")
    with pytest.raises(UsageError, match="'a' is a file of the image already"):
        create("x", extents="a:a")
    Path("x").write_bytes(b"")
    os.link("x", "y")
    with pytest.raises(UsageError, match="'y' is a file of the image already"):
        create("x", extents="y")
    assert listing() == {"x", "y"}


def test_the_backing_file_is_not_emptied() -> None:
    write_toy("p", "hole=512", "identity=i")
    for name in ("p", "./p", os.path.abspath("p"), "file:p"):
        with pytest.raises(UsageError, match="'p' is needed"):
            create("x", extents="a:p", backing_file=name, backing_fmt="toy")
        assert listing() == {"p"} and Path("p").stat().st_size


def test_what_a_creation_is_told() -> None:
    create("dir-less")
    assert created[-1]["file-name"] == "dir-less"
    assert "backing_identity" not in created[-1]
    write_toy("p", "hole=1024", "identity=p-1")
    for options in (
        {"backing_file": "p", "backing_fmt": "toy"},
        {"parent": "p"},
        {"parent": "p", "backing_fmt": "toy"},
    ):
        assert create("c", None, **options) == 1024, "the size comes from the backing file"
        told = created[-1]
        assert (told["backing_identity"], told["backing_size"]) == ("p-1", 1024)
        assert (told["backing_file"], told["backing_fmt"]) == ("p", "toy")
        assert "parent" not in told
    Path("r").write_bytes(bytes(512))
    create("c", 2048, backing_file="r", backing_fmt="raw")
    assert (created[-1]["backing_identity"], created[-1]["backing_size"]) == (None, 512)
    with pytest.raises(UsageError, match="the same"):
        create("c", parent="p", backing_file="p")


def test_a_backing_file_that_is_not_to_be_looked_at() -> None:
    write_toy("p", "hole=1024", "identity=p-1")

    async def work(driver: Driver, name: str, size: int | None) -> dict[str, Any]:
        options = {"backing_file": name, "backing_fmt": "toy"}
        await create_image(driver, "c", "toy", size, options, check_backing=False)
        return created[-1]

    assert run(lambda driver: work(driver, "p", 512))["backing_identity"] == "p-1"
    assert "backing_identity" not in run(lambda driver: work(driver, "gone", 512))
    with pytest.raises(UsageError, match="size"):
        run(lambda driver: work(driver, "p", None))


# -- an image that grows
def grown(check: Any = None, writable: bool = True, size: int = 1536, **options: Any) -> Any:
    """Resize ``x``."""

    async def work(driver: Driver) -> Any:
        node: Any = await open_disk(
            driver,
            "x",
            format="toy",
            writable=writable,
            gate=Gate("trusted"),
            options=options or None,
            cache="unsafe",
        )
        try:
            await node.truncate(size)
            return await check(node) if check is not None else None
        finally:
            await close_disk(node)

    return run(work)


def image() -> None:
    Path("a").write_bytes(b"a" * 512)
    write_toy("x", "extent=512 0 a")


def test_an_image_grows_by_another_file() -> None:
    image()

    async def look(node: Node) -> None:
        assert [leaf.options["filename"] for leaf in own_leaves(node)] == ["x", "a", "next-1"]
        assert {leaf.cache for leaf in own_leaves(node)} == {"unsafe"}  # type: ignore[attr-defined]
        with pytest.raises(ImageInUse):
            await open_disk(node.driver, "next-1", format="raw", writable=True)
        await node.write([512], [b"n" * 1024])
        await node.truncate(2048)  # type: ignore[call-arg]

    grown(look)
    assert listing() == {"x", "a", "next-1", "next-2"}
    assert content("x") == b"a" * 512 + b"n" * 1024 + bytes(512)


def test_growing_does_not_empty_what_is_there() -> None:
    image()
    Path("next-1").write_bytes(b"keep")
    with pytest.raises(FileExistsError) as caught:
        grown()
    assert caught.value.filename == "next-1"
    assert Path("next-1").read_bytes() == b"keep"
    for name in ("a", "x", "../b", "/tmp/b"):
        with pytest.raises((UsageError, FileExistsError)):
            grown(next=name)
    os.symlink("/nowhere/at/all", "link")
    with pytest.raises(FileExistsError):
        grown(next="link")
    assert listing() == {"x", "a", "next-1", "link"}
    assert Path("a").read_bytes() == b"a" * 512


def test_growing_that_fails_takes_its_file_back_in_time() -> None:
    image()

    async def fails(driver: Driver, how: str) -> None:
        node: Any = await open_disk(
            driver, "x", format="toy", writable=True, gate=Gate("trusted"),
            options={"fail-resize": how},
        )  # fmt: skip
        try:
            with pytest.raises(OSError, match=how) as caught:
                await node.truncate(1536)
            assert caught.value.errno == errno.EIO
            assert ("extent.1" in node.children) is (how == "late")
        finally:
            try:
                await close_disk(node)
            except (OSError, DiskError):
                assert how == "late", "the image is between two states"

    run(lambda driver: fails(driver, "early"))
    assert listing() == {"x", "a"}
    run(lambda driver: fails(driver, "late"))
    assert listing() == {"x", "a", "next-1"}, "the image refers to it already"
    assert len(content("x")) == 1536


def test_a_read_only_image_makes_nothing() -> None:
    image()
    with pytest.raises(PermissionError):
        grown(writable=False)

    async def work(driver: Driver) -> None:
        node: Any = await open_disk(driver, "x", format="toy", gate=Gate("trusted"))
        with pytest.raises(DiskError):
            await node.run_procedure(iter_create())
        await reopen(node, writable=True)
        await node.truncate(1024)
        await reopen(node, writable=False)
        assert node.size == 1024
        with pytest.raises(DiskError):
            await node.run_procedure(iter_create())
        await close_disk(node)

    def iter_create() -> Any:
        yield Create("extent.9", "nine")

    run(work)
    assert listing() == {"x", "a", "next-1"}


def test_only_beside_files() -> None:
    async def work(driver: Driver) -> None:
        memory = registry.driver("memory")
        assert memory.open is not None
        node: Any = await open_disk(
            driver, {"driver": "raw", "file.driver": "memory", "file.size": 512}, writable=True
        )

        def procedure() -> Any:
            yield Create("extent.0", "a")

        with pytest.raises((UsageError, NotSupported)):
            await node.run_procedure(procedure())
        await close_disk(node)

    run(work)
    assert listing() == set()
