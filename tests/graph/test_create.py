"""Making images: backing files, options, and what is left behind by a creation that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.contract import Barrier, MetaWrite, Write
from diskwright.declare import Driver as Declared
from diskwright.declare import Option
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageInUse, NotSupported, UsageError
from diskwright.graph import registry
from diskwright.graph.create import create_image, primed

from .tools import run, shell


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    return tmp_path


def test_sizes_are_rounded_up_to_sectors(here: Path, peer: Any) -> None:
    for format in ("raw", "qcow2"):
        assert diskwright.create("a", format=format, size=1000) == 1024
        found = shell(here, peer("qemu-img"), "info", "-f", format, "a")
        assert "(1024 bytes)" in found
    assert diskwright.create("a", format="qcow2", size=0) == 0
    with diskwright.open("a") as disk:
        assert disk.size == 0 and disk.extents() == []


def test_the_size_comes_from_the_backing_file_where_none_is_given() -> None:
    diskwright.create("a", format="qcow2", size=5 << 20)
    backing = {"backing_file": "a", "backing_fmt": "qcow2"}
    assert diskwright.create("b", format="qcow2", options=backing) == 5 << 20
    assert diskwright.create("c", format="qcow2", size=1 << 20, options=backing) == 1 << 20
    with diskwright.open("b", policy="trusted") as disk:
        assert disk.size == 5 << 20


def test_relative_backing_names_mean_the_overlays_folder(here: Path, peer: Any) -> None:
    os.mkdir("d")
    diskwright.create("d/a", format="qcow2", size=1 << 20)
    backing = {"backing_file": "a", "backing_fmt": "qcow2"}
    assert diskwright.create("d/b", format="qcow2", options=backing) == 1 << 20
    with pytest.raises(FileNotFoundError) as caught:
        diskwright.create("b", format="qcow2", options=backing)
    assert caught.value.filename == "a"
    assert not Path("b").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("foo", 1, {}), "Unknown driver 'foo'"),
        (("file", 1, {}), "does not support image creation"),
        (("vdi", 1, {}), "'vdi' is not supported"),
        (("qcow2", None, {}), "Image creation needs a size parameter"),
        (("qcow2", 1, {"foo": 1}), "Invalid parameter 'foo'"),
        (("qcow2", 1, {"cluster_size": 3}), "Cluster size must be a power of two"),
        (("qcow2", 1, {"lazy_refcounts": "maybe"}), "expects 'on' or 'off'"),
        (("qcow2", 1, {"backing_file": "base"}), "without backing format\nDetected format of raw"),
        (("qcow2", 1, {"backing_file": "base", "backing_fmt": "foo"}), "Unknown driver 'foo'"),
        (("qcow2", 1, {"backing_file": "no", "backing_fmt": "raw"}), "No such file or directory"),
        (("qcow2", 1, {"backing_file": "x", "backing_fmt": "raw"}), "same filename as the backing"),
        (("qcow2", 1, {"backing_file": "./x", "backing_fmt": "raw"}), "No such file|same filename"),
        (("raw", 1, {"preallocation": "metadata"}), "preallocation"),
        (("raw", 1, {"backing_file": "base"}), "Invalid parameter 'backing_file'"),
    ],
)
@pytest.mark.parametrize("existed", [False, True])
def test_a_creation_that_is_refused_touches_nothing(
    arguments: tuple[str, Any, dict[str, Any]], text: str, existed: bool
) -> None:
    Path("base").write_bytes(bytes(512))
    if existed:
        Path("x").write_bytes(b"precious")
    format, size, options = arguments
    with pytest.raises((DiskError, OSError), match=text):
        diskwright.create("x", format=format, size=size, options=options)
    assert Path("x").exists() == existed
    if existed:
        assert Path("x").read_bytes() == b"precious"


def test_options_of_the_protocol_are_options_of_the_creation() -> None:
    diskwright.create(
        "x", format="qcow2", size=1 << 20, options={"extent_size_hint": "0", "nocow": "off"}
    )
    with pytest.raises(UsageError, match="expects 'on' or 'off'"):
        diskwright.create("x", format="qcow2", size=1 << 20, options={"nocow": "maybe"})


def failing(error: Exception | None) -> Declared:
    """A format whose creation writes something and then fails."""

    def create(options: dict[str, Any]) -> Generator[Any, Any, None]:
        yield Write([MetaWrite("file", 0, b"half")])
        yield Barrier()
        if error is not None:
            raise error

    return Declared("half", "format", create_options=(Option("size", "size", ""),), create=create)


@pytest.mark.parametrize("existed", [False, True])
def test_a_creation_that_fails_leaves_no_file_where_none_was(existed: bool) -> None:
    registry.register(failing(OSError(errno.ENOSPC, "full")))
    try:
        if existed:
            Path("x").write_bytes(b"old")
        with pytest.raises(OSError, match="full"):
            diskwright.create("x", format="half", size=1024)
        assert Path("x").exists() == existed
        registry.register(failing(None))
        diskwright.create("x", format="half", size=1024)
        assert Path("x").read_bytes() == b"half"
    finally:
        registry.forget("half")


def test_an_image_in_use_is_not_overwritten(here: Path, peer: Any) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(0, b"precious")
        disk.flush()
        with pytest.raises(ImageInUse):
            diskwright.create("a", format="qcow2", size=1 << 20)
        found = shell(here, peer("qemu-img"), "create", "-f", "qcow2", "a", "1M", ok=False)
        assert 'Failed to get "write" lock' in found
    with diskwright.open("a") as disk:
        assert disk.read_at(0, 8) == b"precious"


def test_a_name_that_is_no_file_cannot_be_created() -> None:
    for name, kind in (
        ("null-co://", NotSupported),
        ("json:{}", (UsageError, KeyError)),
        ("nodir/x", FileNotFoundError),
        (".", (OSError, UsageError)),
    ):
        with pytest.raises(kind):
            diskwright.create(name, format="raw", size=1024)


def test_file_and_folder_are_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    from diskwright.protocols.os_portable import Portable

    calls: list[str] = []
    for name in ("sync", "sync_data", "sync_directory"):
        for kind in (Portable, *Portable.__subclasses__()):
            if name in vars(kind):
                real = getattr(kind, name)

                def spy(self: Any, *rest: Any, name: str = name, real: Any = real) -> Any:
                    calls.append(name)
                    return real(self, *rest)

                monkeypatch.setattr(kind, name, spy)
    for format in ("raw", "qcow2"):
        calls.clear()
        diskwright.create(format, format=format, size=1 << 20)
        assert "sync" in calls and "sync_directory" in calls


def test_a_primed_procedure_is_the_same_procedure() -> None:
    def procedure() -> Generator[Any, Any, str]:
        got = []
        for i in range(3):
            try:
                got.append((yield Barrier()))
            except OSError as error:
                got.append(str(error))
            assert len(got) == i + 1
        return "-".join(map(str, got))

    running = primed(procedure())
    assert next(running) == Barrier()
    assert running.send(1) == Barrier()
    assert running.throw(OSError("two")) == Barrier()
    with pytest.raises(StopIteration) as stop:
        running.send(3)
    assert stop.value.value == "1-two-3"


def test_without_a_look_the_backing_file_need_not_be_there() -> None:
    async def work(driver: Driver) -> int:
        backing = {"backing_file": "not yet", "backing_fmt": "raw"}
        return await create_image(driver, "x", "qcow2", 1 << 20, backing, check_backing=False)

    assert run(work) == 1 << 20
