"""qemu-img as an oracle, where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

# Where everything can be installed a missing oracle is a failure, not a skip.
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None and "CI" not in os.environ, reason="qemu-img not installed"
)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, timeout=60)


def ok(*args: str) -> str:
    done = run(*args)
    assert done.returncode == 0, (args, done.stdout, done.stderr)
    return done.stdout


def check(path: Path) -> dict[str, Any]:
    """`qemu-img check`'s report; asserts that it found nothing at all."""
    done = run("qemu-img", "check", "--output=json", str(path))
    report: dict[str, Any] = json.loads(done.stdout or "{}")
    assert done.returncode == 0, (done.stdout, done.stderr)
    return report


def raw(path: Path, out: Path) -> bytes:
    """The guest's bytes as qemu-img reads them."""
    ok("qemu-img", "convert", "-O", "raw", str(path), str(out))
    return out.read_bytes()
