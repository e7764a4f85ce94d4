"""Overlays that grow with preallocation, over backing files of any length, as QEMU reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import OURS, run

MIB = 1 << 20


@pytest.mark.parametrize(
    ("mode", "backing", "compat", "size"),
    [
        ("metadata", 3 * MIB, "1.1", MIB),
        ("metadata", 3 * MIB, "0.10", MIB - 512 * 9),
        ("falloc", MIB, "1.1", MIB - 512 * 9),
        ("full", MIB + 512 * 5, "1.1", MIB),
    ],
)
def test_preallocated_growth(
    tmp_path: Path,
    peer: Callable[[str], str],
    mode: str,
    backing: int,
    compat: str,
    size: int,
) -> None:
    """What is new is allocated, and reads as zeroes; what was there is as it was."""
    qemu_img = peer("qemu-img")
    base, image, more = tmp_path / "base", tmp_path / "a.qcow2", MIB + 512 * 7
    base.write_bytes(random.Random(1).randbytes(backing))
    options = f"compat={compat}"
    run([qemu_img, "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", "-o", options, image,
         str(size)])  # fmt: skip
    run([*OURS, "resize", "-q", f"--preallocation={mode}", image, f"+{more}"])
    run([qemu_img, "convert", "-O", "raw", image, tmp_path / "out"])
    old = base.read_bytes()[:size].ljust(size, b"\0")
    assert (tmp_path / "out").read_bytes() == old + bytes(more)
    assert "No errors" in run([qemu_img, "check", image])
    told = json.loads(run([qemu_img, "map", "--output=json", image]))
    new = [part for part in told if part["start"] + part["length"] > size + 65535 & -65536]
    assert new and all("offset" in part and part["depth"] == 0 for part in new)
