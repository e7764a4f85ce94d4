"""seSparse images that we write, read by QEMU (which does not write them)."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import OURS, TRUSTED, apply, assert_bytes, io_arguments, operations, run

Peer = Callable[[str], str]
GRAIN = 4096


def create(path: Path, size: int, *more: str | Path) -> None:
    run([*OURS, "create", "-q", "-f", "vmdk", "-o", "subformat=seSparse", *more, path, str(size)])


def change(path: Path, words: list[str]) -> None:
    run([*OURS, "io", "-f", "vmdk", *words, path], env=TRUSTED)


def agree(peer: Peer, path: Path, model: bytearray) -> None:
    """QEMU and we read the model's bytes; both find nothing to complain of."""
    run([peer("qemu-img"), "check", "-q", "-f", "vmdk", path])
    report = json.loads(run([*OURS, "check", "--output=json", "-f", "vmdk", path]))
    assert not {"corruptions", "leaks"} & report.keys(), report
    for name, tool in (("qemu", [peer("qemu-img")]), ("ours", OURS)):
        out = path.with_suffix(f".{name}")
        run([*tool, "convert", "-f", "vmdk", "-O", "raw", path, out])
        assert_bytes(out.read_bytes(), model, name)


@pytest.mark.parametrize("seed", range(6))
def test_random_writes(seed: int, peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = rng.choice((1 << 20, 33 << 20, 18 << 20)) + rng.choice((0, 512, 3584))
    path = tmp_path / "x.vmdk"
    create(path, size)
    model = bytearray(size)
    for _ in range(2):
        ops = operations(rng, size, GRAIN, 15)
        change(path, io_arguments(ops))
        apply(model, ops, GRAIN)
        agree(peer, path, model)


@pytest.mark.parametrize("seed", range(3))
def test_over_a_parent(seed: int, peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(100 + seed)
    size = (17 << 20) + 512
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    run([peer("qemu-img"), "create", "-q", "-f", "vmdk", base, str(size)])
    ops = operations(rng, size, GRAIN, 10, discard=False)
    run([peer("qemu-io"), "-f", "vmdk", *io_arguments(ops), base])
    model = bytearray(size)
    apply(model, ops, GRAIN)
    create(top, size, "-b", base, "-F", "vmdk")
    agree(peer, top, model)
    ops = operations(rng, size, GRAIN, 12, discard=False)
    change(top, io_arguments(ops))
    apply(model, ops, GRAIN)
    agree(peer, top, model)
    text = top.read_text()
    assert 'createType="seSparse"' in text and "parentFileNameHint" in text


@pytest.mark.parametrize("size", ["3T", "62T"])
def test_large_disks(size: str, peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "large.vmdk"
    run([*OURS, "create", "-q", "-f", "vmdk", "-o", "subformat=seSparse", path, size])
    last = (int(size[:-1]) << 40) - 1000
    places = (0, 1 << 31, 1 << 32, (2 << 40) - 700, last)
    change(path, [w for p in places for w in ("-c", f"write -q -P 0x42 {p} 1000")])
    reads = [w for p in places for w in ("-c", f"read -P 0x42 {p} 1000")]
    run([peer("qemu-io"), "-r", "-f", "vmdk", *reads, path])
    run([*OURS, "io", "-r", "-f", "vmdk", *reads, path])


def test_convert(peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(5)
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        file.truncate(50 << 20)
        for _ in range(40):
            file.seek(rng.randrange(50 << 20) // 512 * 512)
            file.write(rng.randbytes(rng.randrange(1, 100) * 512))
        file.truncate(50 << 20)
    path = tmp_path / "x.vmdk"
    options = ["-f", "raw", "-O", "vmdk", "-o", "subformat=seSparse"]
    run([*OURS, "convert", *options, source, path])
    run([peer("qemu-img"), "compare", "-q", "-f", "raw", "-F", "vmdk", source, path])
    agree(peer, path, bytearray(source.read_bytes()))
    extent = tmp_path / "x-sesparse.vmdk"
    assert extent.stat().st_blocks * 512 < 10 << 20


def test_a_broken_entry_is_told_of(peer: Peer, tmp_path: Path) -> None:
    """QEMU 10 answers a read through an entry of no known kind with the parent's bytes."""
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    run([peer("qemu-img"), "create", "-q", "-f", "vmdk", base, "1M"])
    run([peer("qemu-io"), "-f", "vmdk", "-c", "write -q -P 0x99 0 1M", base])
    create(top, 1 << 20, "-b", base, "-F", "vmdk")
    change(top, ["-c", "write -q -P 0x11 0 4k"])
    with (tmp_path / "top-sesparse.vmdk").open("r+b") as file:
        file.seek(6144 * 512)
        file.write(struct.pack("<Q", 5 << 60))
    run([peer("qemu-io"), "-r", "-f", "vmdk", "-c", "read -P 0x99 0 4k", top])
    text = run([*OURS, "io", "-r", "-f", "vmdk", "-c", "read -v 0 4k", top], status=1)
    assert "grain table entry" in text
    assert "ERROR" in run([*OURS, "check", "-f", "vmdk", top], status=2)


def test_a_journal_that_must_be_replayed(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    create(path, 1 << 20)
    with (tmp_path / "x-sesparse.vmdk").open("r+b") as file:
        file.seek(512 + 24)
        file.write(b"\1")
    run([peer("qemu-img"), "info", path], status=1)
    text = run([*OURS, "info", path], status=1)
    assert "journal" in text and "ESXi host" in text


def test_repair(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    create(path, 40 << 20)
    change(path, ["-c", "write -q -P 7 0 400k", "-c", "write -q -P 8 30M 5k"])
    with (tmp_path / "x-sesparse.vmdk").open("r+b") as file:
        file.seek(8192 * 512)
        file.write(b"\x0f\xff\xff\xff\xff")
        file.seek(10240 * 512)
        file.write(bytes(32))
    run([*OURS, "check", "-q", "-f", "vmdk", path], status=2)
    text = run([*OURS, "io", "-f", "vmdk", "-c", "write 1M 1k", path], status=1)
    assert "free bitmap" in text
    run([*OURS, "check", "-q", "-f", "vmdk", "-r", "all", path])
    change(path, ["-c", "write -q -P 9 1M 1k"])
    model = bytearray(40 << 20)
    model[: 400 << 10] = b"\7" * (400 << 10)
    model[30 << 20 : (30 << 20) + 5120] = b"\x08" * 5120
    model[1 << 20 : (1 << 20) + 1024] = b"\t" * 1024
    agree(peer, path, model)


def test_resize(peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(8)
    path = tmp_path / "x.vmdk"
    create(path, (17 << 20) + 512)
    model = bytearray((17 << 20) + 512)
    for size in ((20 << 20) + 1024, 16 << 20, (15 << 20) + 512, 40 << 20):
        ops = operations(rng, len(model), GRAIN, 10)
        change(path, io_arguments(ops))
        apply(model, ops, GRAIN)
        run([*OURS, "resize", "-q", "-f", "vmdk", "--shrink", path, str(size)])
        model = model[:size].ljust(size, b"\0")
        agree(peer, path, model)
    text = run([*OURS, "resize", "-q", "-f", "vmdk", path, "600M"], status=1)
    assert "room" in text
    agree(peer, path, model)


def test_commit(peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(9)
    size = 17 << 20
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    run([peer("qemu-img"), "create", "-q", "-f", "vmdk", base, str(size)])
    create(top, size, "-b", base, "-F", "vmdk")
    ops = operations(rng, size, GRAIN, 15, discard=False)
    change(top, io_arguments(ops))
    model = bytearray(size)
    apply(model, ops, GRAIN)
    run([*OURS, "commit", "-q", "-f", "vmdk", top])
    agree(peer, top, model)
    run([peer("qemu-img"), "convert", "-O", "raw", base, tmp_path / "base.raw"])
    assert_bytes((tmp_path / "base.raw").read_bytes(), model, "base")
    # The overlay is empty again, and goes on working.
    assert (tmp_path / "top-sesparse.vmdk").stat().st_size == 12288 * 512
    ops = operations(rng, size, GRAIN, 5, discard=False)
    change(top, io_arguments(ops))
    apply(model, ops, GRAIN)
    agree(peer, top, model)
