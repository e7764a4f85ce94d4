"""Whole-image operations on VHDX, beside qemu-img."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from cli.support import masked, ours, real
from diskwright.errors import ImageError
from house.tinyvhdx import FULL, PARTIAL, TinyVhdx

Peer = Callable[[str], str]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-o", "log_size=2M"),
        ("-o", "block_size=2M,block_state_zero=off"),
        ("-o", "subformat=fixed,block_size=1M"),
        ("-F", "raw"),
    ],
)
def test_created_as_there(tmp_path: Path, peer: Peer, words: tuple[str, ...]) -> None:
    tool = peer("qemu-img")
    create = ("create", "-f", "vhdx", *words, "x.vhdx", "30M")
    made = real(tool, *create, cwd=tmp_path)
    mine = ours(*create, cwd=tmp_path)
    assert (mine.status, mine.out) == (made.status, made.out)
    if made.status:
        return
    human = real(tool, "info", "x.vhdx", cwd=tmp_path).out
    told = ours("info", "x.vhdx", cwd=tmp_path).out
    # Ours tells more, in a block that the real one does not have.
    before, _, after = told.partition(b"Format specific information:\n")
    while after.startswith(b"    "):
        after = after.partition(b"\n")[2]
    assert masked(before + after) == masked(human)
    machine = json.loads(real(tool, "info", "--output=json", "x.vhdx", cwd=tmp_path).out)
    said = json.loads(ours("info", "--output=json", "x.vhdx", cwd=tmp_path).out)
    assert said.pop("format-specific")["type"] == "vhdx"
    assert list(said) == list(machine)
    assert {**said, "children": 0, "actual-size": 0} == {**machine, "children": 0, "actual-size": 0}


@pytest.mark.parametrize("options", ["subformat=dynamic", "subformat=fixed", "block_size=1M"])
def test_converted(tmp_path: Path, peer: Peer, options: str) -> None:
    tool = peer("qemu-img")
    data = bytearray(7 << 20)
    for start in (0, 3_000_000, len(data) - 512):
        data[start : start + 512] = b"data" * 128
    (tmp_path / "a").write_bytes(data)
    words = ("convert", "-f", "raw", "-O", "vhdx", "-o", options, "a", "b")
    assert ours(*words, cwd=tmp_path).status == 0
    compare = ("compare", "-f", "raw", "-F", "vhdx", "a", "b")
    assert real(tool, *compare, cwd=tmp_path).status == 0
    assert ours(*compare, cwd=tmp_path).status == 0
    assert real(tool, "check", "b", cwd=tmp_path).status == 0
    done = ours("check", "--output=json", "b", cwd=tmp_path)
    assert done.status == 0 and json.loads(done.out)["check-errors"] == 0
    back = ("convert", "-O", "raw", "b", "c")
    assert ours(*back, cwd=tmp_path).status == 0
    assert (tmp_path / "c").read_bytes() == data


def test_compression_is_not_there(tmp_path: Path, peer: Peer) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    words = ("convert", "-c", "-f", "raw", "-O", "vhdx", "a", "b")
    told, mine = real(peer("qemu-img"), *words, cwd=tmp_path), ours(*words, cwd=tmp_path)
    assert (mine.status, mine.out, mine.err) == (told.status, told.out, told.err)
    assert not (tmp_path / "b").exists()


def test_a_parent_with_a_path_of_windows(tmp_path: Path) -> None:
    (tmp_path / "vms").mkdir()
    assert ours("create", "-f", "vhdx", "vms/Base.vhdx", "8M", cwd=tmp_path).status == 0
    words = ("-c", "write -P 7 0 64k", "vms/Base.vhdx")
    assert ours(*words, cwd=tmp_path, name="qemu-io").status == 0
    create = ("create", "-f", "vhdx", "-b", "vms/Base.vhdx", "-F", "vhdx", "child")
    assert ours(*create, cwd=tmp_path).status == 0
    read = ("-c", "read -P 7 0 64k", "child")
    assert ours(*read, cwd=tmp_path, name="qemu-io").status == 0
    name = "C:\\Virtual Machines\\Base.vhdx"
    rename = ("rebase", "-u", "-b", name, "-F", "vhdx", "child")
    done = ours(*rename, cwd=tmp_path)
    assert done.status == 0 and b"is a path of another machine" in done.err
    done = ours(*rename, "--map-path", "C:\\Virtual Machines=vms", cwd=tmp_path)
    assert (done.status, done.err) == (0, b"")
    done = ours(*read, cwd=tmp_path, name="qemu-io")
    assert done.status == 1
    assert b"--map-path 'C:\\Virtual Machines=DIRECTORY'" in done.err
    mapped = ("--map-path", "c:/virtual machines=vms")
    assert ours(*mapped, *read, cwd=tmp_path, name="qemu-io").status == 0
    refused = ours(*mapped, *read, cwd=tmp_path, name="qemu-io", policy="untrusted")
    assert refused.status == 1 and b"--policy trusted" in refused.err
    chain = ours("info", "--backing-chain", "--output=json", *mapped, "child", cwd=tmp_path)
    assert chain.status == 0, chain.err
    assert json.loads(chain.out)[1]["filename"] == "vms/Base.vhdx"


@pytest.mark.parametrize("known", [0, 1, None])
def test_a_parent_has_one_of_the_recorded_identities(tmp_path: Path, known: int | None) -> None:
    mib = 1 << 20
    guids = [uuid.UUID(int=n) for n in (1, 2, 3)]
    base = TinyVhdx(
        blocks={0: (FULL, b"p" * mib)}, data_guid=guids[2 if known is None else known]
    )
    child = TinyVhdx(
        blocks={0: (PARTIAL, b"c" * mib)},
        bitmap={1},
        parent=[
            ("parent_linkage", f"{{{guids[0]}}}"),
            ("parent_linkage2", f"{{{guids[1]}}}"),
            ("relative_path", ".\\base.vhdx"),
        ],
    )
    (tmp_path / "base.vhdx").write_bytes(base.data)
    (tmp_path / "child.vhdx").write_bytes(child.data)
    if known is None:
        with pytest.raises(ImageError, match=r"rebase -u"):
            diskwright.open(tmp_path / "child.vhdx", policy="trusted")
        return
    with diskwright.open(tmp_path / "child.vhdx", policy="trusted") as disk:
        assert disk.read_at(0, 1536) == b"p" * 512 + b"c" * 512 + b"p" * 512
    assert ours("commit", "child.vhdx", cwd=tmp_path, policy="trusted").status == 0
    with diskwright.open(tmp_path / "child.vhdx", policy="trusted") as disk:
        assert disk.read_at(0, 1536) == b"p" * 512 + b"c" * 512 + b"p" * 512
    with diskwright.open(tmp_path / "base.vhdx") as disk:
        assert disk.read_at(512, 512) == b"c" * 512


def test_a_child_has_the_sectors_of_its_parent(tmp_path: Path) -> None:
    create = ("create", "-q", "-f", "vhdx")
    assert ours(*create, "-o", "logical_sector_size=4096", "base", "8M", cwd=tmp_path).status == 0
    over = ("-b", "base", "-F", "vhdx")
    assert ours(*create, *over, "child", cwd=tmp_path).status == 0
    told = json.loads(ours("info", "--output=json", "child", cwd=tmp_path).out)
    assert told["format-specific"]["data"]["logical-sector-size"] == 4096
    done = ours(*create, *over, "-o", "logical_sector_size=512", "other", cwd=tmp_path)
    assert done.status == 1 and b"logical sectors of 4096" in done.err


@pytest.mark.parametrize("mode", ["off", "falloc", "full", "metadata"])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_preallocation_as_there(tmp_path: Path, peer: Peer, mode: str, subformat: str) -> None:
    words = ("create", "-f", "vhdx", "-o", f"preallocation={mode},subformat={subformat}")
    told = real(peer("qemu-img"), *words, "x", "20M", cwd=tmp_path)
    done = ours(*words, "y", "20M", cwd=tmp_path)
    assert done.status == told.status, done.err
    if not done.status:
        assert real(peer("qemu-img"), "check", "y", cwd=tmp_path).status == 0


@pytest.mark.parametrize("options", ["", "block_size=1M", "block_size=64M", "subformat=fixed"])
def test_a_disk_of_no_size_is_one_for_qemu_too(tmp_path: Path, peer: Peer, options: str) -> None:
    words = ("-o", options) if options else ()
    assert ours("create", "-f", "vhdx", *words, "x", "0", cwd=tmp_path).status == 0
    assert (tmp_path / "x").stat().st_blocks * 512 < 4 << 20
    assert real(peer("qemu-img"), "check", "x", cwd=tmp_path).status == 0
    assert ours("check", "x", cwd=tmp_path).status == 0
    assert ours("resize", "x", "70M", cwd=tmp_path).status == 0
    assert real(peer("qemu-img"), "check", "x", cwd=tmp_path).status == 0
