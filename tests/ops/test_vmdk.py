"""Whole-image operations on VMDK, beside qemu-img."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.support import masked, ours, real

MIB = 1 << 20
Peer = Callable[[str], str]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Three MiB with something in some grains."""
    data = bytearray(3 * MIB)
    rng = random.Random(7)
    for start in (0, 200_000, 2 * MIB + 70_000):
        data[start : start + 90_000] = rng.randbytes(45_000) + bytes(45_000)
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("words", [("-c",), ()])
def test_one_pass(disk: Path, peer: Peer, words: tuple[str, ...]) -> None:
    tool = peer("qemu-img")
    folder = disk.parent
    target = ("-O", "vmdk", "-o", "subformat=streamOptimized", "disk.raw", "out.vmdk")
    done = ours("convert", *words, "-f", "raw", *target, cwd=folder)
    assert (done.status, done.out, done.err) == (0, b"", b"")
    compare = ("compare", "-f", "raw", "-F", "vmdk", "disk.raw", "out.vmdk")
    assert ours(*compare, cwd=folder).status == 0
    assert real(tool, *compare, cwd=folder).status == 0
    assert ours("check", "out.vmdk", cwd=folder).status == 0
    # Nobody writes into it again.
    before = (folder / "out.vmdk").read_bytes()
    again = ours("convert", "-n", "-O", "vmdk", "-f", "raw", "disk.raw", "out.vmdk", cwd=folder)
    assert again.status == 1
    assert b"compressed grains" in again.err
    assert (folder / "out.vmdk").read_bytes() == before


def test_one_pass_makes_no_overlay(disk: Path) -> None:
    assert ours("create", "-f", "vmdk", "base", "3M", cwd=disk.parent).status == 0
    words = ("-O", "vmdk", "-o", "subformat=streamOptimized", "-B", "base", "-F", "vmdk")
    done = ours("convert", *words, "-f", "raw", "disk.raw", "out", cwd=disk.parent)
    assert done.status == 1
    assert b"in one pass cannot have a backing file" in done.err
    assert not (disk.parent / "out").exists()


def test_compressing_into_other_subformats(disk: Path, peer: Peer) -> None:
    """They take ``-c`` and store what they always store; flat ones have no grains."""
    tool = peer("qemu-img")
    for subformat in ("monolithicSparse", "twoGbMaxExtentSparse", "monolithicFlat"):
        words = ("convert", "-c", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}")
        names = ("disk.raw", f"{subformat}.vmdk")
        told = real(tool, *words, *names, cwd=disk.parent)
        mine = ours(*words, *names, cwd=disk.parent)
        assert (mine.status, mine.out, mine.err) == (told.status, told.out, told.err), subformat


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-o", "adapter_type=lsilogic,zeroed_grain=on,toolsversion=5"),
        ("-o", "hwversion=6,subformat=twoGbMaxExtentSparse,compat6=off"),
        ("-o", "subformat=monolithicFlat"),
        ("-o", "subformat=twoGbMaxExtentFlat"),
        ("-o", "compat6=on,preallocation=off"),
        ("-b", "base.vmdk", "-F", "vmdk"),
        ("-b", "base.vmdk", "-F", "vmdk", "-o", "subformat=monolithicFlat"),
    ],
)
def test_created_as_there(tmp_path: Path, peer: Peer, words: tuple[str, ...]) -> None:
    tool = peer("qemu-img")
    real(tool, "create", "-f", "vmdk", "base.vmdk", "3G", cwd=tmp_path)
    create = ("create", "-f", "vmdk", *words, "x.vmdk", "3G")
    made = real(tool, *create, cwd=tmp_path)
    mine = ours(*create, cwd=tmp_path)
    assert (mine.status, mine.out, mine.err) == (made.status, made.out, made.err)
    if made.status:
        return
    for output in ("human", "json"):
        info = ("info", f"--output={output}", "x.vmdk")
        told, said = real(tool, *info, cwd=tmp_path), ours(*info, cwd=tmp_path)
        assert masked(said.out) == masked(told.out)


def test_a_parent_with_a_path_of_windows(tmp_path: Path) -> None:
    (tmp_path / "vms").mkdir()
    assert ours("create", "-f", "vmdk", "vms/Base.vmdk", "1M", cwd=tmp_path).status == 0
    words = ("-c", "write -P 7 0 64k", "vms/Base.vmdk")
    assert ours(*words, cwd=tmp_path, name="qemu-io").status == 0
    assert ours("create", "-f", "vmdk", "-b", "vms/Base.vmdk", "-F", "vmdk", "child", cwd=tmp_path)
    name = "C:\\Virtual Machines\\Base.vmdk"
    assert ours("rebase", "-u", "-b", name, "-F", "vmdk", "child", cwd=tmp_path).status == 0
    read = ("-c", "read -P 7 0 64k", "child")
    done = ours(*read, cwd=tmp_path, name="qemu-io")
    assert done.status == 1
    assert b"--map-path 'C:\\Virtual Machines=DIRECTORY'" in done.err
    mapped = ("--map-path", "c:/virtual machines=vms")
    assert ours(*mapped, *read, cwd=tmp_path, name="qemu-io").status == 0
    refused = ours(*mapped, *read, cwd=tmp_path, name="qemu-io", policy="untrusted")
    assert refused.status == 1 and b"--policy trusted" in refused.err
    chain = ours("info", "--backing-chain", "--output=json", *mapped, "child", cwd=tmp_path)
    assert chain.status == 0, chain.err
    told = json.loads(chain.out)
    assert told[0]["backing-filename"] == name
    assert told[1]["filename"] == "vms/Base.vmdk"
