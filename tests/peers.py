"""Programs of others that the tests compare with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

# Debian's package for each program.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdkit": "nbdkit",
    "nbd-client": "nbd-client",
    "nbd-server": "nbd-server",
    "fio": "fio",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "sfdisk": "fdisk",
    "7z": "p7zip-full",
    "strace": "strace",
    "zsh": "zsh",
    "fish": "fish",
}


def must_be_there() -> bool:
    """True where a missing peer is a failure: in CI, and where we could have installed it."""
    if os.environ.get("CI") == "true":
        return True
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def missing(what: str, package: str) -> None:
    text = f"{what} is not installed (Debian package {package}; `make peers` installs it)"
    if must_be_there():
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def find_peer(name: str) -> str:
    """The path of a program of others.  Without it the test skips where it cannot be installed,
    and fails elsewhere."""
    path = shutil.which(name)
    if path is None:
        missing(name, PACKAGES.get(name, name))
    assert path is not None
    if name in ("qemu-img", "qemu-io", "qemu-nbd"):
        line = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"\b(\d+)\.\d", line)
        if found is None or int(found[1]) < 10:
            missing(f"{name} 10 or later (found: {line.splitlines()[:1]})", "qemu-utils")
    return path
