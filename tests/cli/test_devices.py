"""Block devices on the command line."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cli.support import ours


def test_a_device_is_not_said_to_have_shrunk(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    try:
        made = subprocess.run(
            ["losetup", "-f", "--show", str(backing)], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("losetup is not installed")
    if made.returncode:
        pytest.skip(f"no loop device can be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        found = ours("resize", "-f", "raw", "--shrink", device, "64k")
        assert (found.status, found.err) == (1, b"qemu-img: Cannot resize device files\n")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
