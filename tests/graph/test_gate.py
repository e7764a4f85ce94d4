"""Nothing that an image names is opened without leave."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageError, Refused, UsageError
from diskwright.graph.create import create_image
from diskwright.graph.gate import Gate, Leave
from diskwright.graph.graph import chain
from diskwright.graph.opener import close_disk, explain, open_disk

from .tools import run, shell


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("DISKWRIGHT_POLICY", "DISKWRIGHT_ALLOW"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISKWRIGHT_CONFIG", "")
    return tmp_path


def make_chain(*names: str) -> None:
    diskwright.create(names[0], format="qcow2", size=1 << 20)
    for below, above in pairwise(names):
        diskwright.create(
            above, format="qcow2", options={"backing_file": below, "backing_fmt": "qcow2"}
        )


REFERENCES = [
    "base.qcow2",
    "./base.qcow2",
    "/etc/passwd",
    "file:base.qcow2",
    'json:{"driver":"raw","file":{"driver":"file","filename":"/etc/passwd"}}',
    "nbd://127.0.0.1:1/x",
    "blkdebug::base.qcow2",
    "null-co://",
    "nowhere",
]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("format", ["qcow2", "raw", None])
@pytest.mark.parametrize("writable", [False, True])
def test_an_image_that_names_a_backing_file_is_refused(
    reference: str, format: str | None, writable: bool, peer: Any, here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    diskwright.create("base.qcow2", format="qcow2", size=1 << 20)
    shell(here, peer("qemu-img"), "create", "-q", "-f", "qcow2", "top.qcow2", "1M")
    _name_backing(here / "top.qcow2", reference, format)
    opened: list[str] = []
    real = os.open

    def spy(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.fsdecode(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", spy)
    with pytest.raises(Refused) as caught:
        diskwright.open("top.qcow2", writable=writable, policy="untrusted")
    monkeypatch.undo()
    assert opened and set(opened) == {"top.qcow2"}, "nothing but the image itself was opened"
    error = caught.value
    assert (error.reference, error.file) == (reference, "top.qcow2")
    for word in ("top.qcow2", reference, "untrusted", "--policy trusted", "DISKWRIGHT_POLICY"):
        assert word in str(error)
    assert error.exit_code == 1
    # It gave its locks back.
    shell(here, peer("qemu-io"), "-c", "write 0 512", "base.qcow2")


def _name_backing(image: Path, name: str, format: str | None) -> None:
    """Write a backing file's name into a fresh qcow2 image's header cluster."""
    raw = bytearray(image.read_bytes())
    position = 112
    encoded = os.fsencode(name)
    if format:
        extension = format.encode()
        raw[position : position + 8] = b"\xe2\x79\x2a\xca" + len(extension).to_bytes(4, "big")
        raw[position + 8 : position + 8 + len(extension)] = extension
        position += 8 + -(-len(extension) // 8) * 8
    raw[position : position + 8] = bytes(8)
    position += 8
    raw[position : position + len(encoded)] = encoded
    raw[8:16] = position.to_bytes(8, "big")
    raw[16:20] = len(encoded).to_bytes(4, "big")
    image.write_bytes(raw)


def test_every_way_to_trust_opens_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_chain("a", "b", "c")
    with diskwright.open("c", policy="trusted") as disk:
        assert [node.options["driver"] for node in chain(disk.node)] == ["qcow2"] * 3
    monkeypatch.setenv("DISKWRIGHT_POLICY", "trusted")
    with diskwright.open("c") as disk:
        assert len(list(chain(disk.node))) == 3
    with pytest.raises(Refused):
        diskwright.open("c", policy="untrusted")  # what is typed wins over the environment
    monkeypatch.setenv("DISKWRIGHT_POLICY", "wide-open")
    with pytest.raises(UsageError, match="wide-open"):
        diskwright.open("c")


def test_without_backing_nothing_is_asked() -> None:
    make_chain("a", "b")
    with diskwright.open("b", backing=False) as disk:
        assert disk.node.child("backing") is None
        assert disk.read_at(0, 512) == bytes(512)


def test_what_the_caller_typed_needs_no_leave() -> None:
    make_chain("a", "b", "c")
    os.mkdir("sub")
    # As a reference that the gate was told of,
    gate = Gate(allow=["b"])

    async def work(driver: Driver) -> None:
        with pytest.raises(Refused) as caught:
            await open_disk(driver, "c", gate=gate)
        assert caught.value.reference == "a", "b was typed, what b names was not"
        node = await open_disk(driver, "c", gate=gate.allowing("a"))
        assert len(list(chain(node))) == 3
        await close_disk(node)
        # as part of a description,
        node = await open_disk(
            driver,
            {"driver": "qcow2", "file.filename": "c", "backing": {
                "driver": "qcow2", "file.filename": "b", "backing": {
                    "driver": "qcow2", "file.filename": "a"}}},
        )  # fmt: skip
        assert len(list(chain(node))) == 3
        await close_disk(node)
        # and as the backing file of a new image: it is only looked at.
        await create_image(
            driver, "d", "qcow2", None, {"backing_file": "b", "backing_fmt": "qcow2"}
        )

    run(work)


def test_the_gate_gives_the_name_that_is_opened() -> None:
    make_chain("a", "b")
    os.mkdir("jail")
    os.rename("a", "jail/a")
    asked: list[tuple[str, ...]] = []

    class Moved(Gate):
        def admit(
            self,
            reference: str,
            by: str,
            *,
            resolved: str = "",
            role: str = "backing file",
            folder: str | None = None,
        ) -> Leave:
            asked.append((reference, by, resolved, role))
            return Leave("jail/" + reference)

    async def work(driver: Driver) -> None:
        node = await open_disk(driver, "./b", gate=Moved())
        assert len(list(chain(node))) == 2
        await close_disk(node)

    run(work)
    assert asked == [("a", "./b", "./a", "backing file")]


def test_chains_that_bite_their_tail_are_refused(here: Path, peer: Any) -> None:
    make_chain("a.q", "b.q", "c.q")
    qemu_img = peer("qemu-img")
    shell(here, qemu_img, "rebase", "-u", "-f", "qcow2", "-b", "c.q", "-F", "qcow2", "a.q")
    for name in ("a.q", "b.q", "c.q"):
        with pytest.raises(ImageError, match="creates an infinite loop"):
            diskwright.open(name, policy="trusted")
    os.mkdir("d")
    shell(here, qemu_img, "rebase", "-u", "-f", "qcow2", "-b", "d/../a.q", "-F", "qcow2", "a.q")
    for writable in (False, True):
        with pytest.raises(ImageError, match="creates an infinite loop") as caught:
            diskwright.open("a.q", policy="trusted", writable=writable)
        assert caught.value.file == "a.q"
        assert "d/../a.q" in str(caught.value)


def test_a_long_chain_opens_and_a_longer_one_is_refused() -> None:
    names = [f"l{i}" for i in range(Gate.max_depth + 2)]
    make_chain(*names)
    with diskwright.open(names[-3], policy="trusted") as disk:
        assert disk.read_at(0, 512) == bytes(512)
        assert len(list(chain(disk.node))) == Gate.max_depth
        assert len(disk.extents()) == 1
    with diskwright.open(names[-2], policy="trusted") as disk:
        assert disk.read_at(0, 512) == bytes(512)
    with pytest.raises(ImageError, match=f"longer than {Gate.max_depth}"):
        diskwright.open(names[-1], policy="trusted")


def test_a_broken_chain_says_which_link(here: Path, peer: Any) -> None:
    os.mkdir("d")
    make_chain("d/a")
    diskwright.create("d/b", format="qcow2", options={"backing_file": "a", "backing_fmt": "qcow2"})
    diskwright.create("c", format="qcow2", options={"backing_file": "d/b", "backing_fmt": "qcow2"})
    os.unlink("d/a")
    with pytest.raises(FileNotFoundError) as caught:
        diskwright.open("c", policy="trusted")
    assert caught.value.filename == "d/a"
    theirs = shell(here, peer("qemu-io"), "-f", "qcow2", "-c", "length", "c", ok=False)
    assert explain(caught.value) == (
        "Could not open backing file: Could not open 'd/a': No such file or directory"
    )
    assert explain(caught.value) in theirs
    # What was open already is closed again.
    shell(here, peer("qemu-io"), "-c", "length", "d/b", ok=False)
    with pytest.raises(FileNotFoundError):
        diskwright.open("c", policy="trusted", writable=True)


@pytest.mark.parametrize("name", ["a\0b", "json:{", "json:[]", "x:y", "json:" + "[" * 900, "."])
def test_hostile_names_in_a_trusted_image_give_clean_errors(
    name: str, here: Path, peer: Any
) -> None:
    shell(here, peer("qemu-img"), "create", "-q", "-f", "qcow2", "top.qcow2", "1M")
    raw_name = name.encode()
    image = here / "top.qcow2"
    raw = bytearray(image.read_bytes())
    raw[112:120] = bytes(8)
    raw[120 : 120 + len(raw_name)] = raw_name
    raw[8:20] = (120).to_bytes(8, "big") + len(raw_name).to_bytes(4, "big")
    image.write_bytes(raw)
    with pytest.raises((DiskError, OSError)) as caught:
        diskwright.open("top.qcow2", policy="trusted")
    assert "Could not open backing file" in explain(caught.value)
