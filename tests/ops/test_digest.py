"""Digests of disks, beside hashlib's of their bytes and a tree that is computed by definition."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diskwright
from cli.support import ours
from diskwright import aio
from diskwright.errors import UsageError
from diskwright.ops.digest import ALGORITHMS, BLOCK, Content, Tree
from diskwright.ops.progress import Progress

K = 1 << 10


def tree_of(data: bytes) -> str:
    """By definition."""
    leaves = [data[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(data), BLOCK)]
    wanted = 1
    while wanted < len(leaves):
        wanted *= 2
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    blank = hashlib.sha256(b"\0" + bytes(BLOCK)).digest()
    level += [blank] * (wanted - len(level))
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs]
    return hashlib.sha256(b"\2" + len(data).to_bytes(8, "big") + level[0]).hexdigest()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * BLOCK)), max_size=12), st.integers())
def test_pieces_of_any_size_make_the_same_digests(pieces: Any, seed: int) -> None:
    chance = random.Random(seed)
    content = bytearray()
    summers = [Tree(), Content("sha256")]
    for zero, length in pieces:
        data = bytes(length) if zero else chance.randbytes(length)
        for one in summers:
            if zero:
                one.zeroes(length)
            else:
                one.update(memoryview(data))
        content += data
    assert summers[0].hexdigest() == tree_of(bytes(content))
    assert summers[1].hexdigest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [0, 512, BLOCK, BLOCK + 512, (3 << 20) + 512])
def test_of_an_image(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=size)
    data = bytearray(size)
    with diskwright.open(path, writable=True) as disk:
        for at in range(0, size, 700 * K):
            part = random.Random(at).randbytes(min(3000, size - at))
            disk.write_at(at, part)
            data[at : at + len(part)] = part
        disk.zero(0, size // 1024)
        data[: size // 1024] = bytes(size // 1024)
    seen: list[Progress] = []
    found = diskwright.digest(path, algorithms=ALGORITHMS, progress=seen.append)
    assert found.size == size and seen[-1] == (size, size, True)
    for name in ALGORITHMS:
        wanted = tree_of(data) if name == "tree" else hashlib.new(name, data).hexdigest()
        assert found.digests[name] == wanted
    diskwright.convert(path, tmp_path / "a.raw", target_format="raw")
    raw = diskwright.digest(tmp_path / "a.raw", algorithms=["tree"], format="raw")
    assert (raw.size, raw.digests) == (size, {"tree": found.digests["tree"]})
    assert asyncio.run(aio.digest(path)).digests == {"sha256": found.digests["sha256"]}


def test_the_tree_of_a_huge_disk_costs_its_data(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    diskwright.create(path, format="qcow2", size=64 << 40)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(63 << 40, b"x" * BLOCK)
    one, tree = diskwright.digest(path, algorithms=["tree"]).digests["tree"], Tree()
    tree.zeroes(63 << 40)
    tree.update(memoryview(b"x" * BLOCK))
    tree.zeroes((1 << 40) - BLOCK)
    assert one == tree.hexdigest()


def test_the_verb(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * BLOCK)
    (tmp_path / "a").write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    done = ours("digest", "-f", "raw", "a", cwd=tmp_path, name="diskwright")
    assert (done.status, done.out) == (0, f"{sha}  a\n".encode())
    words = ("digest", "-f", "raw", "-a", "tree", "-a", "sha256", "--output=json", "a")
    told = json.loads(ours(*words, cwd=tmp_path, name="diskwright").out)
    assert list(told) == ["filename", "virtual-size", "digests"]
    assert list(told["digests"].items()) == [("tree", tree_of(data)), ("sha256", sha)]
    done = ours("digest", "-f", "raw", "-p", "a", cwd=tmp_path, name="diskwright")
    assert done.out.endswith(b"(100.00/100%)\r\n" + f"{sha}  a\n".encode())
    done = ours("digest", "-a", "crc", "a", cwd=tmp_path, name="diskwright")
    assert done.status == 1 and b"Unknown digest 'crc'" in done.err
    assert ours("digest", "none", cwd=tmp_path, name="diskwright").status == 1
    with pytest.raises(UsageError):
        diskwright.digest(tmp_path / "a", algorithms=["crc"])
