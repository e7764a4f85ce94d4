"""Composed block status, compared with the real tool's map."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.graph import status as status_module
from diskwright.graph.gate import Gate
from diskwright.graph.names import parse_image_opts
from diskwright.graph.opener import close_disk, open_disk
from diskwright.graph.status import (
    Status,
    all_status,
    allocated_above,
    block_status,
    is_allocated_above,
)

from .tools import run, shell

KIB = 1 << 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(parts: list[Status]) -> list[dict[str, Any]]:
    """As the real tool's JSON has them."""
    out = []
    for part in parts:
        row: dict[str, Any] = {
            "start": part.start,
            "length": part.length,
            "depth": part.depth,
            "present": part.present,
            "zero": part.zero,
            "data": part.data,
            "compressed": part.compressed,
        }
        if part.offset >= 0:
            row["offset"] = part.offset
        out.append(row)
    return out


def ours(reference: Any, format: str | None = None) -> list[dict[str, Any]]:
    async def work(driver: Driver) -> list[Status]:
        node = await open_disk(driver, reference, format=format, gate=Gate("trusted"))
        parts = [part async for part in all_status(node)]
        await close_disk(node)
        return parts

    return rows(run(work))


def theirs(here: Path, qemu_img: str, *arguments: str) -> list[dict[str, Any]]:
    found = json.loads(shell(here, qemu_img, "map", "--output=json", *arguments))
    assert isinstance(found, list)
    return found


def same(here: Path, qemu_img: str, name: str, format: str) -> None:
    assert ours(name, format) == theirs(here, qemu_img, "-f", format, name)


def test_sparse_raw(here: Path, peer: Any) -> None:
    with Path("a").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(256 * KIB)
        file.write(b"x" * 64 * KIB)
        file.seek(1000 * KIB)
        file.write(b"y")
        file.truncate(1 << 20)
    for format in ("raw", "file"):
        same(here, peer("qemu-img"), "a", format)
    with Path("a").open("ab") as file:
        file.truncate((1 << 20) + 100)  # not whole sectors
    same(here, peer("qemu-img"), "a", "raw")


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_preallocated_qcow2(preallocation: str, here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    option = f"preallocation={preallocation}"
    shell(here, qemu_img, "create", "-q", "-f", "qcow2", "-o", option, "a", "4M")
    same(here, qemu_img, "a", "qcow2")
    shell(here, qemu_io, "-c", "write 128k 4k", "-c", "write 512k 64k", "a")
    same(here, qemu_img, "a", "qcow2")
    shell(here, qemu_io, "-c", "write 0 4M", "a")
    same(here, qemu_img, "a", "qcow2")


def test_zeroes_of_every_kind(here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    shell(here, qemu_img, "create", "-q", "-f", "qcow2", "a", "1M")
    commands = ["write 0 320k", "write -z 64k 64k", "write -z -u 128k 64k", "discard 192k 64k"]
    shell(here, qemu_io, *[w for c in commands for w in ("-c", c)], "a")
    same(here, qemu_img, "a", "qcow2")


def test_compressed_clusters(here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    shell(here, qemu_img, "create", "-q", "-f", "raw", "r", "1M")
    shell(here, qemu_io, "-f", "raw", "-c", "write 256k 64k", "r")
    shell(here, qemu_img, "convert", "-c", "-f", "raw", "-O", "qcow2", "r", "a")
    same(here, qemu_img, "a", "qcow2")


@pytest.mark.parametrize("seed", range(6))
def test_random_chains(seed: int, here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    random_ = random.Random(seed)
    below, below_format = "", ""
    for layer in range(3):
        name = f"l{layer}"
        size = random_.choice([1 << 20, 3 << 19, 2 << 20, 4096 * 3])
        if layer == 0 and seed % 2:
            shell(here, qemu_img, "create", "-q", "-f", "raw", name, str(size))
            format = "raw"
        else:
            cluster = random_.choice([512, 4096, 65536])
            more = ["-b", below, "-F", below_format] if below else []
            shell(here, qemu_img, "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}",
                  *more, name, str(size))  # fmt: skip
            format = "qcow2"
        commands = []
        for _ in range(random_.randrange(8)):
            at = random_.randrange(0, size, 512)
            length = min(random_.choice([512, 4096, 65536, 200 * KIB]), size - at)
            verb = random_.choice(["write", "write", "write -z", "write -z -u", "discard"])
            commands += ["-c", f"{verb} {at} {length}"]
        shell(here, qemu_io, "-f", format, *commands, "-c", "length", name)
        below, below_format = name, format
        same(here, qemu_img, name, format)


def test_small_windows_tell_the_same(
    here: Path, peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded work per call changes nothing of the whole answer."""
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    shell(here, qemu_img, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "a", "256k")
    shell(here, qemu_io, "-c", "write 3k 9k", "-c", "write -z 20k 40k", "a")
    shell(here, qemu_img, "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b", "512k")
    shell(here, qemu_io, "-c", "write 0k 4k", "-c", "discard 300k 30k", "b")
    whole = ours("b")
    assert whole == theirs(here, qemu_img, "b")
    for units in (1, 3, 7):
        monkeypatch.setattr(status_module, "WINDOW_UNITS", units)
        assert ours("b") == whole


def test_one_call_is_bounded_and_says_something(here: Path) -> None:
    diskwright.create("a", format="qcow2", size=64 << 40, options={"cluster_size": 2 << 20})
    with diskwright.open("a") as disk:

        async def once() -> list[Status]:
            return await block_status(disk.node, 5, 64 << 40)

        (part,) = disk._call(once)
        assert part.start == 5 and 0 < part.length <= status_module.MAX_WINDOW

        async def beyond() -> list[Status]:
            return await block_status(disk.node, disk.size, 1)

        assert disk._call(beyond) == []


def test_parts_of_a_range(here: Path) -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(65536, b"x" * 65536)
        parts = disk.extents(100_000, 50_000)
        assert [(p.offset, p.length, p.data) for p in parts] == [
            (100_000, 31072, True),
            (131072, 18928, False),
        ]
        assert parts[0].host_offset % 65536 == 100_000 % 65536


def test_through_translations(here: Path, peer: Any) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    shell(here, qemu_img, "create", "-q", "-f", "qcow2", "a", "1M")
    shell(here, qemu_io, "-c", "write 64k 128k", "-c", "write -z 256k 64k", "a")
    inner = "file.driver=qcow2,file.file.driver=file,file.file.filename=a"
    for options in (
        f"driver=raw,{inner}",
        f"driver=raw,offset=100k,{inner}",
        "driver=qcow2,file.driver=raw,file.file.driver=file,file.file.filename=a",
        "driver=null-co,size=1M,read-zeroes=on",
    ):
        found = theirs(here, qemu_img, "--image-opts", options)
        assert ours(parse_image_opts(options)) == found, options


def test_a_chain_below_a_translation_is_its_bytes() -> None:
    """The real tool calls what a deeper layer holds unallocated here, and convert would read
    zeroes; we tell it."""
    diskwright.create("a", format="qcow2", size=1 << 20)
    with diskwright.open("a", writable=True) as disk:
        disk.write_at(0, b"x" * 65536)
    diskwright.create("b", format="qcow2", options={"backing_file": "a", "backing_fmt": "qcow2"})
    (first, second) = ours({"driver": "raw", "offset": 512, "file": {
        "driver": "qcow2", "file.filename": "b"}})  # fmt: skip
    assert (first["start"], first["length"], first["depth"], first["data"]) == (0, 65024, 0, True)
    assert (second["zero"], second["data"]) == (True, False)


def test_what_lies_above_a_base() -> None:
    diskwright.create("a", format="qcow2", size=1 << 20)
    for name, base in (("b", "a"), ("c", "b")):
        diskwright.create(
            name, format="qcow2", options={"backing_file": base, "backing_fmt": "qcow2"}
        )
    for i, name in enumerate("abc"):
        with diskwright.open(name, writable=True, policy="trusted") as disk:
            disk.write_at(i * 65536, b"x" * 65536)
            if name == "b":
                disk.zero(5 * 65536, 65536)

    async def work(driver: Driver) -> None:
        top = await open_disk(driver, "c", gate=Gate("trusted"))
        middle = top.child("backing")
        assert middle is not None
        base = middle.child("backing")
        unit = 65536
        assert await allocated_above(top, base, 0, top.size) == [
            (0, unit, False),
            (unit, 2 * unit, True),
            (3 * unit, 2 * unit, False),
            (5 * unit, unit, True),
            (6 * unit, 10 * unit, False),
        ]
        assert await allocated_above(top, middle, 0, 4 * unit) == [
            (0, 2 * unit, False),
            (2 * unit, unit, True),
            (3 * unit, unit, False),
        ]
        assert await is_allocated_above(top, None, 0, unit) == (True, unit)
        assert await is_allocated_above(top, None, 3 * unit, 3 * unit) == (False, 2 * unit)
        assert await is_allocated_above(top, base, top.size, 1) == (False, 0)
        await close_disk(top)

    run(work)


def test_a_large_hole_is_one_answer(here: Path, peer: Any) -> None:
    """A map of a terabyte of nothing is one line and immediate."""
    diskwright.create("a", format="raw", size=1 << 40)
    assert ours("a", "raw") == theirs(here, peer("qemu-img"), "-f", "raw", "a")
