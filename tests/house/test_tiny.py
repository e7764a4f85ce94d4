"""The images that tests write byte by byte are good ones: QEMU finds nothing wrong with them, and
reads what they should hold."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from house.tinyqcow2 import Tiny
from house.tinyvhdx import FULL, MIB, TinyVhdx
from house.tinyvmdk import Reading, hosted

QCOW2: list[dict[str, Any]] = [
    {}, {"version": 2}, {"cluster_bits": 9}, {"packed": True}, {"snapshot": True},
]  # fmt: skip
LOG = {3 * MIB: (4 * MIB | FULL).to_bytes(4096, "little"), 3 * MIB + 4096: None}
VHDX: list[dict[str, Any]] = [
    {}, {"fixed": True, "blocks": dict.fromkeys(range(4), (FULL, b"f"))}, {"log": LOG},
]  # fmt: skip
VMDK: list[dict[str, Any]] = [{}, {"grain": 8, "entries": 3}, {"copy": False}]


def compared(
    peer: Callable[[str], str], folder: Path, format: str, file: bytes, raw: bytes
) -> None:
    (folder / "image").write_bytes(file)
    (folder / "raw").write_bytes(raw)
    words = [peer("qemu-img"), "compare", "-q", "-f", "raw", "-F", format, "raw", "image"]
    subprocess.run(words, check=True, cwd=folder)


def checked(peer: Callable[[str], str], folder: Path, format: str, file: bytes, *fix: str) -> None:
    (folder / "image").write_bytes(file)
    words = [peer("qemu-img"), "check", "-q", *fix, "-f", format, "image"]
    subprocess.run(words, check=True, cwd=folder)


@pytest.mark.parametrize("options", QCOW2, ids=str)
def test_qcow2(options: dict[str, Any], tmp_path: Path, peer: Callable[[str], str]) -> None:
    tiny = Tiny(**options)
    checked(peer, tmp_path, "qcow2", tiny.data)
    compared(peer, tmp_path, "qcow2", tiny.data, tiny.model)


@pytest.mark.parametrize("options", VHDX, ids="-".join)
def test_vhdx(options: dict[str, Any], tmp_path: Path, peer: Callable[[str], str]) -> None:
    tiny = TinyVhdx(**options)
    checked(peer, tmp_path, "vhdx", tiny.data, "-r", "all")  # which replays a log
    if "log" not in options:
        compared(peer, tmp_path, "vhdx", tiny.data, tiny.model)


@pytest.mark.parametrize("options", VMDK, ids=str)
def test_vmdk(options: dict[str, Any], tmp_path: Path, peer: Callable[[str], str]) -> None:
    file = hosted(400 << 10, **options)
    checked(peer, tmp_path, "vmdk", file)
    compared(peer, tmp_path, "vmdk", file, Reading(file).content())
