"""Random sequences of commands, ours and QEMU's, on parallel copies of one chain of images.

Both sides carry out the same commands; after each one the disks must have the same bytes and
QEMU must find no damage.  ``SEED`` and ``SEQUENCES`` in the environment choose others and more.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import OURS, TRUSTED, geometry, io_arguments, operations

SEED = int(os.environ.get("SEED", "20260"))
LONG = "SEQUENCES" in os.environ  # otherwise the time is bounded
SEQUENCES = int(os.environ.get("SEQUENCES", "8"))
SECONDS = 30.0
STEPS = 7
BASE, MIDDLE, TOP, COPY = "base.img", "middle.img", "top.img", "copy.img"


class Side:
    """One of the two copies, and the tools that work on it."""

    def __init__(self, folder: Path, image_tool: list[str], io_tool: list[str]) -> None:
        self.folder, self.image_tool, self.io_tool = folder, image_tool, io_tool
        folder.mkdir()

    def run(self, words: list[str]) -> tuple[int, str]:
        tool = self.io_tool if words[0] == "io" else self.image_tool
        done = subprocess.run(
            [*tool, *(words[1:] if words[0] == "io" else words)],
            cwd=self.folder,
            env=TRUSTED,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        return done.returncode, done.stdout.decode(errors="replace")


class TheirLimit(Exception):
    """The sequence cannot go on: there is nothing to compare with any more."""


class Sequence:
    """A chain of up to three layers and the commands that it has seen so far."""

    def __init__(self, folder: Path, qemu_img: str, qemu_io: str, seed: int) -> None:
        self.qemu_img, self.seed = qemu_img, seed
        self.rng = random.Random(seed)
        self.theirs = Side(folder / "theirs", [qemu_img], [qemu_io])
        self.mine = Side(folder / "mine", OURS, [*OURS, "io"])
        self.log: list[list[str]] = []
        self.parents: dict[str, str | None] = {}
        self.formats: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.clusters: dict[str, int] = {}

    def fail(self, text: str) -> None:
        lines = "\n".join("  " + " ".join(map(repr, words)) for words in self.log)
        pytest.fail(f"SEED={self.seed}: {text}\n{lines}", pytrace=False)

    def both(self, *words: str, changed: tuple[str, ...]) -> None:
        """The same command on both sides must end the same way and leave the same disks; those
        in ``changed`` are looked at."""
        self.log.append(list(words))
        theirs, mine = self.theirs.run(list(words)), self.mine.run(list(words))
        if theirs[0] and not mine[0] and "Operation not supported" in theirs[1]:
            raise TheirLimit  # zeroes into a layer of version 2: theirs gives up, ours writes them
        if theirs[0] < 0 and mine[0] == 0:
            raise TheirLimit  # a signal: it crashes now and then while it rebases
        if "Traceback" in mine[1] or mine[0] != theirs[0]:
            self.fail(f"ended with {mine} for {theirs}")
        for name in changed:
            self.compare(name)

    def compare(self, name: str) -> None:
        fmt = self.formats[name]
        digests = []
        for side in (self.mine, self.theirs):
            out = side.folder / "flat.raw"
            code, text = Side.run(
                _reader(side, self.qemu_img), ["convert", "-f", fmt, "-O", "raw", name, out.name]
            )
            if code:
                self.fail(f"{side.folder.name}/{name} cannot be read: {text}")
            digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
        if digests[0] != digests[1]:
            self.fail(f"{name} differs")
        if fmt == "qcow2":
            code, text = _reader(self.mine, self.qemu_img).run(["check", name])
            if code:
                self.fail(f"{name} is damaged: {text}")

    # -- commands
    def create(self, name: str, parent: str | None) -> None:
        shape = geometry(self.rng, backing=parent is not None)
        self.formats[name] = "raw" if parent is None and self.rng.random() < 0.3 else "qcow2"
        size = min(shape.size, 24 << 20)
        if parent is not None:
            size = max(512, self.sizes[parent] + self.rng.choice((0, 0, 65536, 1 << 20, -65536)))
            size = min(size, shape.cluster_size << 13)
        self.sizes[name], self.clusters[name] = size, shape.cluster_size
        words = ["create", "-q", "-f", self.formats[name]]
        if self.formats[name] == "qcow2":
            extended = shape.compat != "0.10" and shape.cluster_size >= 16384
            extended = extended and self.rng.random() < 0.5
            words += ["-o", shape.options() + (",extended_l2=on" if extended else "")]
        if parent is not None:
            words += ["-b", parent, "-F", self.formats[parent]]
        self.parents[name] = parent
        self.both(*words, name, str(size), changed=(name,))

    def write(self, name: str) -> None:
        size = self.sizes[name]
        # What a discard leaves in an image without zero clusters is up to each tool.
        ops = operations(self.rng, size, self.clusters[name], 6, discard=False)
        cache = self.rng.choice(("writeback", "writethrough", "none", "unsafe"))
        words = ["io", "-t", cache, "-f", self.formats[name], *io_arguments(ops)]
        if self.parents[name] is None and self.formats[name] == "qcow2":
            cluster = self.clusters[name]
            words += ["-c", f"discard -q 0 {min(cluster, size)}"]
        self.both(*words, name, changed=tuple({name, TOP} & self.parents.keys()))

    def resize(self, name: str) -> None:
        size = self.sizes[name]
        wanted = max(
            512, (size + self.rng.choice((512, 65536, 1 << 20, -512, -65536))) // 512 * 512
        )
        self.sizes[name] = min(wanted, self.clusters[name] << 13)
        words = ["resize", "-q", "-f", self.formats[name], "--shrink", name, str(self.sizes[name])]
        self.both(*words, changed=(name,))

    def commit(self) -> None:
        keep = self.rng.choice(((), ("-d",)))
        parent = self.parents[TOP]
        assert parent is not None
        self.both("commit", "-q", *keep, "-f", "qcow2", TOP, changed=(TOP, parent))
        self.sizes[parent] = max(self.sizes[parent], self.sizes[TOP])

    def rebase(self) -> None:
        parent = self.rng.choice((None, BASE, MIDDLE))
        words = ["-b", parent or ""] + (["-F", self.formats[parent]] if parent else [])
        self.both("rebase", "-q", "-f", "qcow2", *words, TOP, changed=(TOP,))
        self.parents[TOP] = parent

    def convert(self) -> None:
        fmt = self.rng.choice(("raw", "qcow2"))
        words = ["convert", "-f", "qcow2", "-O", fmt]
        words += self.rng.choice(([], ["-W"], ["-m", "16", "-W"], ["-m", "1"]))
        words += self.rng.choice(([], ["-S", "0"], ["-S", "64k"], ["-t", "none"], ["-T", "none"]))
        if fmt == "qcow2":
            words += ["-o", f"cluster_size={1 << self.rng.randrange(12, 19)}"]
        self.formats[COPY] = fmt
        self.both(*words, TOP, COPY, changed=(COPY,))

    def step(self) -> None:
        kind = self.rng.choice(("write", "write", "write", "resize", "commit", "rebase", "convert"))
        if kind == "write":
            self.write(self.rng.choice((TOP, TOP, TOP, MIDDLE, BASE)))
        elif kind == "resize":
            self.resize(TOP)
        elif kind == "convert":
            self.convert()
        elif kind == "rebase":
            self.rebase()
        elif self.parents[TOP] is not None:
            self.commit()


def _reader(side: Side, qemu_img: str) -> Side:
    """QEMU's tool over the files of ``side``."""
    reader = object.__new__(Side)
    reader.folder, reader.image_tool, reader.io_tool = side.folder, [qemu_img], []
    return reader


def test_random_sequences_leave_what_qemu_leaves(
    tmp_path: Path, peer: Callable[[str], str]
) -> None:
    begun = time.monotonic()
    for number in range(SEQUENCES):
        if not LONG and time.monotonic() - begun > SECONDS:
            break
        seed = SEED + number
        folder = tmp_path / str(seed)
        folder.mkdir()
        sequence = Sequence(folder, peer("qemu-img"), peer("qemu-io"), seed)
        try:
            sequence.create(BASE, None)
            sequence.write(BASE)
            sequence.create(MIDDLE, BASE)
            sequence.create(TOP, MIDDLE)
            for _ in range(STEPS):
                sequence.step()
                if not LONG and time.monotonic() - begun > SECONDS:
                    return
        except TheirLimit:
            continue
