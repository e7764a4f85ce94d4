"""Random work on a differencing VHDX over a parent of another size and other blocks, then commit,
rebase or resize: beside a model, QEMU and libvhdi."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diskwright

from .test_vhdx import libvhdi_bytes
from .tools import OURS, assert_bytes, run

MIB = 1 << 20
LENGTHS = (1, 511, 512, 4096, 5000, 70_001, MIB, MIB + 777, 3 * MIB)


def work(path: Path, model: bytearray, rng: random.Random, turns: int) -> None:
    """Writes, zeroes and discards at any offset; a discarded byte is what it was, or zero."""
    size = len(model)
    with diskwright.open(path, writable=True, policy="trusted") as disk:
        for _ in range(turns):
            length = min(rng.choice(LENGTHS), size)
            offset = rng.randrange(size - length + 1)
            what = rng.random()
            old = bytes(model[offset : offset + length])
            if what < 0.55:
                new = rng.randbytes(length)
                disk.write_at(offset, new)
            elif what < 0.8:
                new = bytes(length)
                disk.zero(offset, length, unmap=what < 0.7)
            elif what < 0.9:
                disk.discard(offset, length)
                new = disk.read_at(offset, length)
                assert all(a in (b, 0) for a, b in zip(new, old, strict=True))
            else:
                disk.flush()
                new = disk.read_at(offset, length)
                assert new == old
            model[offset : offset + length] = new
        assert_bytes(disk.read_at(0, size), model, "ours")


def bytes_of(path: Path) -> bytes:
    with diskwright.open(path, policy="trusted") as disk:
        return disk.read_at(0, disk.size)


@pytest.mark.parametrize(
    ("end", "larger"),
    [("commit", -1), ("commit", 1), ("rebase", 1), ("flatten", -1), ("resize", 1)],
)
def test_a_child_and_its_parent(
    end: str, larger: int, peer: Callable[[str], str], tmp_path: Path, libvhdi: Any
) -> None:
    rng = random.Random(f"{end} {larger}")
    qemu_img = peer("qemu-img")
    base, child, other = (tmp_path / name for name in ("base.vhdx", "child.vhdx", "other.vhdx"))
    sector = 4096 if end == "resize" else 512
    create: list[str | Path] = [*OURS, "create", "-q", "-f", "vhdx"]
    size = rng.randrange(4 * MIB, 9 * MIB) // sector * sector
    longer = size + larger * rng.randrange(1, 3 * MIB) // sector * sector
    run([*create, "-o", f"block_size=2M,logical_sector_size={sector}", base, str(size)])
    below = bytearray(size)
    work(base, below, rng, 10)
    over: list[str | Path] = ["-b", base, "-F", "vhdx"]
    run([*create, *over, "-o", f"block_size={rng.choice((1, 4))}M", child, str(longer)])
    model = bytearray(below[:longer].ljust(longer, b"\0"))
    for _ in range(2):
        work(child, model, rng, 15)
        run([*OURS, "check", "-q", child])
    # libvhdi reads from a parent only what lies in it.
    if longer <= size:
        assert_bytes(libvhdi_bytes(libvhdi, child, base), model, "libvhdi")
    if end == "commit":
        run([*OURS, "commit", "-q", child])
        assert_bytes(bytes_of(base)[:longer], model, "the parent")
        run([qemu_img, "check", "-q", base])
        # Of an image without sector bitmaps, as the child is now, libvhdi reads the file's start.
        assert_bytes(libvhdi_bytes(libvhdi, base)[:longer], model, "libvhdi")
    elif end == "rebase":
        run([*create, other, str(size)])
        work(other, bytearray(size), rng, 8)
        run([*OURS, "rebase", "-q", "-b", other, "-F", "vhdx", child])
    elif end == "flatten":
        run([*OURS, "rebase", "-q", "-b", "", child])
        run([qemu_img, "check", "-q", child])
        assert_bytes(libvhdi_bytes(libvhdi, child), model, "libvhdi")
    else:
        for more in (3 * MIB + sector, -2 * MIB):
            run([*OURS, "resize", "-q", "--shrink", child, str(len(model) + more)])
            model = bytearray(model[: len(model) + more].ljust(len(model) + more, b"\0"))
            work(child, model, rng, 6)
    run([*OURS, "check", "-q", base])
    run([*OURS, "check", "-q", child])
    assert_bytes(bytes_of(child), model, "the child")
