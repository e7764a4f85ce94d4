"""What the graph's tests share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from diskwright.engine.kernel import Driver

T = TypeVar("T")

Run = Callable[[Callable[[Driver], Coroutine[Any, Any, T]]], T]


def run(make: Callable[[Driver], Coroutine[Any, Any, T]]) -> T:
    """Run one coroutine on a driver of its own, with a limit on nothing."""
    driver = Driver()
    try:
        return driver.run(make(driver))
    finally:
        driver.close()


def shell(folder: Path, *command: str, ok: bool = True) -> str:
    """A program's output; it must succeed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="surrogateescape", timeout=60
    )
    if ok:
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def descriptors() -> int:
    """How many files this process has open (0 where it cannot tell)."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
