"""Checks of the same images by qemu-img and by us: the same numbers and exit statuses."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is not installed"
)
KEYS = (
    "image-end-offset", "total-clusters", "check-errors", "corruptions", "leaks",
    "allocated-clusters", "fragmented-clusters", "compressed-clusters",
)  # fmt: skip


def qemu(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, check=False)


def ours(*args: str) -> subprocess.CompletedProcess[str]:
    return qemu(sys.executable, "-m", "diskwright", *args)


def image(rng: random.Random, path: Path) -> None:
    """A random image, with snapshots, bitmaps or compressed clusters by chance."""
    bits = rng.choice((9, 12, 14, 16))
    options = [f"cluster_size={1 << bits}"]
    if bits >= 14 and rng.random() < 0.4:
        options.append("extended_l2=on")
    elif rng.random() < 0.3:
        options.append("compat=0.10")
    if "compat=0.10" not in options:
        options.append(f"refcount_bits={rng.choice((8, 16, 32, 64))}")
    size = f"{rng.randrange(1, 8)}M"
    flags = ["-o", ",".join(options)]
    assert not qemu("qemu-img", "create", "-q", "-f", "qcow2", *flags, str(path), size).returncode
    for turn in range(3):
        commands = []
        for _ in range(rng.randrange(1, 5)):
            at, length = rng.randrange(1 << 20) & ~511, rng.randrange(1, 200) * 512
            verb = rng.choice(("write -P 7", "write -P 9", "write -z", "discard"))
            commands += ["-c", f"{verb} {at} {min(length, (1 << 20) - at)}"]
        commands += ["-c", f"write -c -P 5 {turn << bits} {1 << bits}"]
        qemu("qemu-io", *commands, str(path))
        if rng.random() < 0.4:
            qemu("qemu-img", "snapshot", "-c", f"s{turn}", str(path))
        if rng.random() < 0.3 and "compat=0.10" not in options:
            qemu("qemu-img", "bitmap", "--add", str(path), f"b{turn}")


def damage(rng: random.Random, path: Path) -> None:
    """Raise the counts of some clusters: leaks that every repair gives back."""
    data = bytearray(path.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 48)
    (block,) = struct.unpack_from(">Q", data, table)
    version, order = struct.unpack_from(">I", data, 4)[0], struct.unpack_from(">I", data, 96)[0]
    width = 1 << order - 3 if version > 2 else 2
    for cluster in rng.sample(range(1, 20), 3):
        at = block + cluster * width + width - 1
        data[at] += 1
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_the_same_numbers(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "image.qcow2"
    image(rng, path)
    for damaged in (False, True):
        if damaged:
            damage(rng, path)
        theirs = qemu("qemu-img", "check", "--output=json", str(path))
        mine = ours("check", "--output=json", str(path))
        assert mine.returncode == theirs.returncode
        old, new = json.loads(theirs.stdout), json.loads(mine.stdout)
        assert {k: new.get(k) for k in KEYS} == {k: old.get(k) for k in KEYS}
    copy = tmp_path / "copy.qcow2"
    shutil.copy(path, copy)
    fix = rng.choice(("leaks", "all"))
    theirs = qemu("qemu-img", "check", "-r", fix, str(copy))
    mine = ours("check", "-r", fix, str(path))
    assert mine.returncode == theirs.returncode
    for file in (path, copy):
        assert qemu("qemu-img", "check", str(file)).returncode == 0
        assert ours("check", str(file)).returncode == 0
