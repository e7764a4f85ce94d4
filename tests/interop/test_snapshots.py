"""Random sequences of writes, snapshots and resizes by our tool and by QEMU's, in turns on one
image; a model says what disk and snapshots hold."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import OURS, run

OPTIONS = [
    "cluster_size=512",
    "cluster_size=4096,refcount_bits=8",
    "cluster_size=65536,lazy_refcounts=on",
    "cluster_size=512,compat=0.10",
    "cluster_size=65536,extended_l2=on",
]
STEPS = 7


class Turns:
    """One image, and what it must hold."""

    def __init__(self, folder: Path, tools: list[tuple[list[str], list[str]]], seed: int) -> None:
        self.rng = random.Random(seed)
        self.tools = tools
        self.path = folder / "disk.qcow2"
        self.out = folder / "out.raw"
        self.model = bytearray(1 << 20)
        self.held: dict[str, bytes] = {}
        self.number = 0
        self.fixed = False
        """Version 2 is not resized."""

    def step(self) -> None:
        rng = self.rng
        image, io = rng.choice(self.tools)
        kinds = ["write", "write", "create", "apply", "delete"]
        what = rng.choice(kinds if self.fixed else [*kinds, "resize"])
        if what == "create" or not self.held:
            self.number += 1
            name = f"snapshot {self.number}"
            run([*image, "snapshot", "-c", name, self.path])
            self.held[name] = bytes(self.model)
        elif what == "write":
            words = []
            for _ in range(6):
                start = rng.randrange(len(self.model) // 512) * 512
                length = min(rng.choice([512, 3072, 65536]), len(self.model) - start)
                pattern = rng.randrange(256)
                self.model[start : start + length] = bytes([pattern]) * length
                words += ["-c", f"write -P {pattern} {start} {length}"]
            run([*io, "-f", "qcow2", *words, self.path])
        elif what == "apply":
            name = rng.choice(list(self.held))
            run([*image, "snapshot", "-a", name, self.path])
            self.model = bytearray(self.held[name])
        elif what == "delete":
            name = rng.choice(list(self.held))
            run([*image, "snapshot", "-d", name, self.path])
            del self.held[name]
        else:
            size = rng.randrange(1, 2048) * 512
            run([*image, "resize", "-q", "--shrink", "-f", "qcow2", self.path, str(size)])
            self.model = self.model[:size].ljust(size, b"\0")

    def look(self, image: list[str]) -> None:
        run([*image, "check", self.path])
        run([*image, "convert", "-O", "raw", self.path, self.out])
        assert self.out.read_bytes() == self.model
        for name, content in self.held.items():
            run([*image, "convert", "-O", "raw", "-l", name, self.path, self.out])
            found = self.out.read_bytes()
            # QEMU's tool shows a snapshot in the size that the disk has now.
            assert found[: len(content)] == content[: len(found)], name


@pytest.mark.parametrize("options", OPTIONS)
def test_in_turns(options: str, tmp_path: Path, peer: Callable[[str], str]) -> None:
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    tools = [([qemu_img], [qemu_io]), (OURS, [*OURS, "io"])]
    turns = Turns(tmp_path, tools, len(options))
    turns.fixed = "0.10" in options
    run([qemu_img, "create", "-q", "-f", "qcow2", "-o", options, turns.path, "1M"])
    for _ in range(STEPS):
        turns.step()
    turns.look([qemu_img])
    turns.look(OURS)


def test_listings_are_the_same(tmp_path: Path, peer: Callable[[str], str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img = peer("qemu-img")
    run([*OURS, "create", "-q", "-f", "qcow2", path, "1M"])
    for tool, name in ((OURS, "one"), ([qemu_img], "ü" * 20), (OURS, "")):
        run([*tool, "snapshot", "-c", name, path])
    for words in (["snapshot", "-l"], ["snapshot"], ["info"], ["info", "--output=json"]):
        assert run([*OURS, *words, path]) == run([qemu_img, *words, path])


def test_vm_state_both_ways(tmp_path: Path, peer: Callable[[str], str]) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    run([qemu_img, "create", "-q", "-f", "qcow2", path, "1M"])
    run([*OURS, "io", "-c", "write -b -P 9 1k 70656", path])
    run([qemu_img, "snapshot", "-c", "one", path])
    run([qemu_io, "-c", "write -b -P 7 0 1M", path])
    run([*OURS, "snapshot", "-c", "two", path])
    for name, check in (("one", "read -b -P 9 1k 70656"), ("two", "read -b -P 7 0 1M")):
        for one, other in (([qemu_img], [*OURS, "io"]), (OURS, [qemu_io])):
            run([*one, "snapshot", "-a", name, path])
            run([*other, "-c", check, path])
    # What was saved behind the disk is no part of what it grows into.
    run([*OURS, "resize", "-q", "-f", "qcow2", path, "2G"])
    run([*OURS, "io", "-c", "read -P 0 512M 2M", path])
    run([qemu_img, "check", path])
