"""What an image names: extents, and parents by several names, which must be what they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import DiskError, ImageError, ImageInUse, Refused, UsageError
from diskwright.graph.display import display_name
from diskwright.graph.gate import Gate
from diskwright.graph.graph import chain, own_leaves
from diskwright.graph.named import meaning
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, explain, open_disk
from diskwright.graph.reopen import reopen
from diskwright.graph.status import block_status

from .tools import descriptors, run, shell
from .toys import registered, write_toy


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISKWRIGHT_POLICY", raising=False)
    with registered():
        yield tmp_path


TRUSTED = Gate("trusted")


def opened(reference: Any, look: Any = None, **named: Any) -> Any:
    """Open as a trusted toy, see what ``check`` returns of the node, and close."""

    async def work(driver: Driver) -> Any:
        named.setdefault("gate", TRUSTED)
        named.setdefault("format", "toy" if isinstance(reference, str) else None)
        node = await open_disk(driver, reference, **named)
        try:
            answer = look(node) if look is not None else None
            return await answer if hasattr(answer, "__await__") else answer
        finally:
            await close_disk(node)

    return run(work)


async def read_all(node: Node) -> bytes:
    (data,) = await node.read([0], [node.size])
    return bytes(data)


def two_extents() -> None:
    Path("a.bin").write_bytes(b"A" * 1024)
    Path("b.bin").write_bytes(b"B" * 512)
    write_toy("d.toy", "extent=1024 0 a.bin", "extent=512 0 b.bin")


# -- extents
def test_extents_are_open_when_the_procedure_goes_on() -> None:
    two_extents()
    assert opened("d.toy", read_all) == b"A" * 1024 + b"B" * 512
    os.mkdir("sub")
    for name in ("d.toy", "a.bin", "b.bin"):
        os.rename(name, f"sub/{name}")
    assert opened("sub/d.toy", read_all) == b"A" * 1024 + b"B" * 512
    write_toy("abs.toy", f"extent=512 0 {os.path.abspath('sub/b.bin')}")
    assert opened("abs.toy", read_all) == b"B" * 512
    write_toy("win.toy", "extent=512 0 sub\\b.bin")
    assert opened("win.toy", read_all) == b"B" * 512, "a relative path of Windows"


@pytest.mark.parametrize("writable", [False, True])
def test_an_extent_needs_leave(writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    two_extents()
    seen: list[str] = []
    real, look = os.open, os.stat

    def spy(path: Any, *arguments: Any, **named: Any) -> int:
        seen.append(os.fsdecode(path))
        return real(path, *arguments, **named)

    def spy_stat(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, str | bytes):
            seen.append(os.fsdecode(path))
        return look(path, *arguments, **named)

    before = descriptors()
    with monkeypatch.context() as patch, pytest.raises(Refused) as caught:
        patch.setattr(os, "open", spy)
        patch.setattr(os, "stat", spy_stat)
        opened("d.toy", gate=Gate(), writable=writable)
    assert set(seen) == {"d.toy"}, "nothing but the image was opened or looked at"
    assert (caught.value.reference, caught.value.file) == ("a.bin", "d.toy")
    for word in ("no extent that only", "--policy trusted", "DISKWRIGHT_POLICY"):
        assert word in str(caught.value)
    with pytest.raises(Refused) as caught:
        opened("d.toy", gate=Gate(allow=["a.bin"]), writable=writable)
    assert caught.value.reference == "b.bin"
    opened("d.toy", gate=Gate(allow=["a.bin", "b.bin"]), writable=writable)
    opened("./d.toy", gate=Gate(allow=["./a.bin", "b.bin"]), writable=writable)
    assert descriptors() == before
    opened("a.bin", format="raw", writable=True)


def test_extents_are_held_like_the_image_itself(here: Path, peer: Any) -> None:
    two_extents()

    def look(node: Node) -> None:
        leaves = own_leaves(node)
        assert [leaf.options["filename"] for leaf in leaves] == ["d.toy", "a.bin", "b.bin"]
        assert {leaf.cache for leaf in leaves} == {"unsafe"}  # type: ignore[attr-defined]
        assert {leaf.unmap for leaf in leaves} == {False}  # type: ignore[attr-defined]
        said = shell(here, peer("qemu-io"), "-f", "raw", "-c", "write 0 512", "b.bin", ok=False)
        assert 'Failed to get "write" lock' in said
        with pytest.raises(ImageInUse):
            diskwright.open("a.bin", format="raw", writable=True)

    opened("d.toy", look, writable=True, cache="unsafe", discard="ignore")
    shell(here, peer("qemu-io"), "-f", "raw", "-c", "write -q 0 512", "b.bin")
    with diskwright.open("b.bin", format="raw", writable=True), pytest.raises(ImageInUse):
        opened("d.toy", writable=True)
    opened("d.toy", writable=True)


def test_writes_reach_the_extents() -> None:
    two_extents()

    async def write(node: Node) -> None:
        await node.write([0, 1024], [b"x" * 512, b"y" * 512])
        await node.flush()

    opened("d.toy", write, writable=True)
    assert Path("a.bin").read_bytes() == b"x" * 512 + b"A" * 512
    assert Path("b.bin").read_bytes() == b"y" * 512


def test_an_extent_that_the_caller_gives_is_taken_instead() -> None:
    two_extents()
    Path("other").write_bytes(b"O" * 2048)
    given = {"driver": "toy", "file.filename": "d.toy"}
    both = b"O" * 1024 + b"B" * 512
    name: list[str] = []

    async def look(node: Node) -> bytes:
        name.append(display_name(node))
        return await read_all(node)

    # The caller's own needs no leave; what only the image names does.
    only = {"gate": Gate(allow=["b.bin"])}
    assert opened({**given, "extents.0.filename": "other"}, look, **only) == both
    assert opened(name[0], look, format=None, **only) == both, "the name says which one"
    assert name[0] == name[1]
    nested = {**given, "extents": [{"driver": "file", "filename": "other"}]}
    assert opened(nested, read_all, **only) == both
    assert opened({**given, "extents.1.filename": "other"}, read_all) == b"A" * 1024 + b"O" * 512
    raw = {"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "other"}}
    assert opened({**given, "extents": [raw]}, read_all) == both
    assert opened("d.toy", read_all, options={"extents.0.filename": "other"}) == both
    for wrong, text in (
        ({"extents.2.filename": "other"}, "does not support the option 'extents.2'"),
        ({"extents.x.filename": "other"}, "'extents.x' is not in it"),
        ({"extents.0": 7}, "an object or by a node's name"),
        ({"extents.0": "nobody"}, "Cannot find device='nobody'"),
        ({"extents": "other"}, "does not support the option 'extents'"),
        ({"extent.0.filename": "other"}, "does not support the option 'extent.0"),
    ):
        before = descriptors()
        with pytest.raises(UsageError, match=text):
            opened({**given, **wrong})
        assert descriptors() == before
    with pytest.raises(UsageError, match=r"does not support the option 'extents\.0'"):
        opened({"driver": "raw", "file.filename": "other", "extents.0.filename": "a.bin"})


def test_two_extents_in_one_file() -> None:
    Path("one").write_bytes(b"1" * 512 + b"2" * 512)
    os.link("one", "same")
    write_toy("d.toy", "extent=512 512 one", "extent=512 0 same")

    async def work(node: Node) -> bytes:
        assert len(own_leaves(node)) == 2
        found = await read_all(node)
        await node.write([0], [b"x" * 512])
        return found

    assert opened("d.toy", work, writable=True) == b"2" * 512 + b"1" * 512
    assert Path("one").read_bytes() == b"1" * 512 + b"x" * 512


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"toy","file.filename":"d.toy"}',
        'json:{"file.filename":"d.toy"}',
        "blkdebug::d.toy",
        'blkdebug::json:{"driver":"toy","file.filename":"d.toy"}',
        "C:\\VMs\\a.bin",
        "\\\\.\\PhysicalDrive0",
        "nowhere",
        "nbd:",
        "foo:bar",
        "",
        "x" * 5000,
        "a\0b",
        "d.toy/x",
    ],
)
def test_odd_names_of_extents_give_clean_errors(name: str) -> None:
    Path("a.bin").write_bytes(bytes(512))
    write_toy("d.toy", "extent=512 0 a.bin", f"extent=512 0 {name}")
    before = descriptors()
    with pytest.raises((DiskError, OSError)) as caught:
        opened("d.toy", writable=True)
    if name.startswith("json:"):
        assert "is no plain file" in str(caught.value)
    assert "extent" in explain(caught.value)
    assert descriptors() == before
    opened("a.bin", format="raw", writable=True)


def test_a_failure_after_extents_were_opened_closes_them() -> None:
    two_extents()
    write_toy("d.toy", "extent=1024 0 a.bin", "extent=513 0 b.bin")
    before = descriptors()
    for writable in (False, True):
        with pytest.raises(ImageError, match=r"'b\.bin' is too short"):
            opened("d.toy", writable=writable)
        assert descriptors() == before
        opened("b.bin", format="raw", writable=True)


def test_extents_follow_their_image_to_another_mode() -> None:
    two_extents()

    async def work(node: Node) -> None:
        with pytest.raises(PermissionError):
            await node.write([0], [b"w" * 512])
        await reopen(node, writable=True)
        assert {leaf.read_only for leaf in own_leaves(node)} == {False}
        await node.write([1024], [b"w" * 512])
        await reopen(node, writable=False)
        assert {leaf.read_only for leaf in own_leaves(node)} == {True}
        assert await read_all(node) == b"A" * 1024 + b"w" * 512

    opened("d.toy", work)
    assert Path("b.bin").read_bytes() == b"w" * 512


def test_a_mode_that_one_extent_cannot_take_changes_none() -> None:
    two_extents()
    write_toy("e.toy", "extent=512 0 b.bin")

    async def work(node: Node) -> None:
        other = await open_disk(node.driver, "e.toy", format="toy", gate=TRUSTED)
        with pytest.raises(ImageInUse):
            await reopen(node, writable=True)
        await close_disk(other)
        assert {leaf.read_only for leaf in own_leaves(node)} == {True}
        assert node.read_only
        assert await read_all(node) == b"A" * 1024 + b"B" * 512

    opened("d.toy", work)


def test_the_status_tells_the_files_and_their_holes() -> None:
    with open("a.bin", "wb") as file:
        file.write(b"A" * 65536)
        file.truncate(1 << 20)
    Path("b.bin").write_bytes(b"B" * 65536)
    write_toy("d.toy", f"extent={1 << 20} 0 a.bin", "extent=65536 0 b.bin")

    async def work(node: Node) -> list[tuple[Any, ...]]:
        return [
            (s.start, s.length, s.zero, s.data, s.offset, s.node.options["filename"][-5:])
            for s in await block_status(node, 0, node.size)
            if s.node is not None
        ]

    assert opened("d.toy", work) == [
        (0, 65536, False, True, 0, "a.bin"),
        (65536, (1 << 20) - 65536, True, True, 65536, "a.bin"),
        (1 << 20, 65536, False, True, 0, "b.bin"),
    ]


# -- parents by several names
def child(*names: str, identity: str = "") -> None:
    lines = [f"parent={name}" for name in names]
    write_toy(
        "child",
        "hole=512",
        "backing_format=toy",
        *lines,
        *([f"parent_identity={identity}"] if identity else []),
    )


def parent(path: str, fill: bytes, identity: str = "one") -> None:
    Path(path + ".bin").write_bytes(fill * 512)
    write_toy(path, f"extent=512 0 {os.path.abspath(path)}.bin", f"identity={identity}")


def test_the_first_name_that_exists_is_taken() -> None:
    os.mkdir("dir")
    parent("dir/p", b"d")
    parent("q", b"q")
    absolute = os.path.abspath("q")
    for names, expected in (
        (["p", "q"], b"q"),
        (["q", "dir/p"], b"q"),
        (["dir/p", "q"], b"d"),
        (["no/where", "child/x", absolute], b"q"),
        (["dir\\p", "q"], b"d"),
        (["C:\\x\\p", "\\\\server\\share\\p", "q"], b"q"),
        (["x" * 300, "q"], b"q"),
        (["", "q"], b"q"),
    ):
        child(*names)
        assert opened("child", read_all) == expected * 512, names


def test_a_name_that_is_refused_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    parent("p", b"p")
    parent("q", b"q")
    child("p", "q")
    seen: list[str] = []
    look = os.stat

    def spy(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if isinstance(path, str):
            seen.append(os.path.basename(path))
        return look(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", spy)
    gate = Gate(allow=["q", os.path.abspath("q.bin")])
    assert opened("child", read_all, gate=gate) == b"q" * 512
    assert "p" not in seen
    with pytest.raises(Refused) as caught:
        opened("child", gate=Gate(allow=["nothing"]))
    assert caught.value.reference == "p"
    assert "p" not in seen
    os.remove("q")
    with pytest.raises(Refused) as caught:
        opened("child", gate=gate)
    assert caught.value.reference == "p"


def test_paths_of_another_machine_are_opened_by_a_mapping_only() -> None:
    os.makedirs("vms/base")
    parent("vms/base/p", b"m")
    parent("p", b"x")
    for name, prefix in (
        ("C:\\VMs\\base\\p", "c:/vms"),
        ("c:/vms/base/p", "C:\\VMs\\"),
        ("C:\\VMs\\.\\other\\..\\base\\\\p", "C:\\VMs"),
        ("\\\\?\\C:\\VMs\\base\\p", "C:\\VMs"),
        ("\\\\server\\share\\base\\p", "\\\\SERVER\\Share"),
        ("\\\\?\\UNC\\server\\share\\base\\p", "\\\\server\\share"),
        ("\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\base\\p",
         "\\\\?\\volume{26a21bda-a627-11d7-9931-806e6f6e6963}\\"),
        ("/vmfs/volumes/ds/base/p", "/vmfs/volumes/ds/"),
    ):  # fmt: skip
        child(name)
        gate = Gate("trusted", paths={prefix: "vms", "Z:\\": "/nowhere", "C:\\VMs\\base2": "/no"})
        assert opened("child", read_all, gate=gate) == b"m" * 512, name
        assert opened("child", read_all, gate=gate.allowing("x")) == b"m" * 512
        with pytest.raises((ImageError, FileNotFoundError)) as caught:
            opened("child")
        if not name.startswith("/"):
            assert name in str(caught.value)
            assert "--map-path '" in str(caught.value)
        # A mapping is no leave.
        with pytest.raises(Refused) as refused:
            opened("child", gate=Gate(paths={prefix: "vms"}))
        assert refused.value.reference == name


@pytest.mark.parametrize(
    "name",
    [
        "C:\\VMs\\..\\secret",
        "C:\\VMs\\a\\..\\..\\secret",
        "C:\\VMs/../secret",
        "C:\\VMsecret",
        "C:\\secret",
        "C:\\VMs\\..\\VMs2\\secret",
        "D:\\VMs\\secret",
        "\\\\?\\C:\\VMs\\..\\secret",
        "\\\\.\\C:\\VMs\\secret",
        "\\\\C:\\VMs\\secret",
    ],
)
def test_no_path_leaves_the_mapped_directory(name: str) -> None:
    os.mkdir("vms")
    for place in ("secret", "vms/secret", "vms2"):
        if place != "vms2":
            parent(place, b"s")
    child(name)
    gate = Gate("trusted", paths={"C:\\VMs": "vms"})
    with pytest.raises(ImageError, match="a path of the machine that wrote it"):
        opened("child", gate=gate)


def test_a_mapping_must_make_sense() -> None:
    for prefix, directory in (("VMs", "x"), ("C:VMs", "x"), ("", "x"), ("C:\\", ""), ("/a", "b\0")):
        with pytest.raises(UsageError, match="cannot be mapped"):
            Gate(paths={prefix: directory})
    gate = Gate("trusted", ["x"], {"C:\\": "/", "D:": "rel/", "D:\\a": "/b"})
    again = gate.allowing("y")
    for one in (gate, again):
        assert one.mapped("C:\\a\\b") == "/a/b"
        assert one.mapped("c:\\") == "/"
        assert one.mapped("d:/X/y") == "rel/X/y"
        assert one.mapped("D:\\A\\y") == "/b/y", "the longest prefix counts"
        assert one.mapped("D:\\ab") == "rel/ab"
        assert one.mapped("/c") is None and one.mapped("c") is None
    assert Gate().mapped("C:\\a") is None


def test_when_no_name_exists_the_error_tells_them_all() -> None:
    child("gone", "C:\\VMs\\base\\p", "/not/there", "sub\\p")
    with pytest.raises(ImageError) as caught:
        opened("child")
    assert caught.value.file == "child"
    for word in (
        "'gone'",
        "'/not/there'",
        "C:\\VMs\\base\\p",
        "--map-path 'C:\\VMs\\base=",
        "sub/p",
    ):
        assert word in str(caught.value), word
    assert "Could not open backing file" in explain(caught.value)
    opened("child", backing=False)

    def look(node: Node) -> tuple[str, str]:
        return meaning(node, "C:\\VMs\\p"), meaning(node, "x")

    assert opened("./child", look, backing=False) == ("C:\\VMs\\p", "./x")


def test_what_the_caller_gives_needs_none_of_them() -> None:
    parent("p", b"p")
    child("C:\\gone", "gone")
    given = {"backing": {"driver": "toy", "file.filename": "p"}}
    gate = Gate(allow=[os.path.abspath("p.bin")])
    assert opened("child", read_all, options=given, gate=gate) == b"p" * 512


# -- identities
def test_a_parent_that_has_changed_is_found_at_once() -> None:
    parent("p", b"p", "one")
    child("p", identity="one")
    assert opened("child", read_all) == b"p" * 512
    parent("p", b"p", "two")
    before = descriptors()
    with pytest.raises(ImageError) as caught:
        opened("child")
    assert descriptors() == before
    assert caught.value.file == "child"
    for word in ("'p'", "identity one", "two", "rebase -u", "Without its backing file"):
        assert word in str(caught.value)
    # To check, to repair and to look at it alone it opens.
    opened("child", check=True)
    opened("child", backing=False)
    opened({"driver": "toy", "file.filename": "child", "backing": None})
    Path("r").write_bytes(b"r" * 512)
    for given in (
        {"driver": "raw", "file.filename": "r"},
        {"driver": "blkdebug", "image.driver": "raw", "image.file.filename": "r"},
    ):
        with pytest.raises(ImageError, match=r"identity one.*'r' is opened as raw, which has none"):
            opened("child", options={"backing": given})
    with pytest.raises(ImageError, match="two"):
        opened("child", options={"backing": {"driver": "toy", "file.filename": "p"}})
    child("r")
    assert opened("child", read_all, options={"backing.driver": "raw"}) == b"r" * 512


def test_identities_are_compared_in_every_layer() -> None:
    parent("a", b"a", "A")
    write_toy("b", "hole=512", "parent=a", "parent_identity=A", "identity=B", "backing_format=toy")
    write_toy("c", "hole=512", "parent=b", "parent_identity=B", "backing_format=toy")
    assert opened("c", lambda node: len(list(chain(node)))) == 3
    parent("a", b"a", "Z")
    with pytest.raises(ImageError) as caught:
        opened("c")
    assert caught.value.file == "b"


def test_a_long_chain_of_toys_and_one_that_bites_its_tail() -> None:
    parent("0", b"0", "i")
    for number in range(1, 90):
        write_toy(str(number), "hole=512", f"parent={number - 1}", "parent_identity=i",
                  "identity=i", "backing_format=toy")  # fmt: skip
    assert opened("80", read_all) == b"0" * 512
    with pytest.raises(ImageError, match="longer than 80"):
        opened("81")
    write_toy("0", "hole=512", "parent=gone", "parent=2", "identity=i", "backing_format=toy")
    with pytest.raises(ImageError, match="infinite loop"):
        opened("2")
