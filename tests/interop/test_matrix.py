"""All that qcow2 can do, together: random shapes of images and random operations on them.

Each operation is done by our tool and by QEMU's on a copy of one image.  Both must do it or both
refuse, and both tools must find both results whole, with the bytes of the model and the same
bitmaps; the sequence goes on with one of the two.  ``MATRIX_SEED`` and ``MATRIX`` in the
environment choose other seeds and more of them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from interop.shapes import Shape
from interop.steps import Steps
from interop.tools import TRUSTED

SEED = int(os.environ.get("MATRIX_SEED", "7000"))
LONG = "MATRIX" in os.environ
SEEDS = int(os.environ.get("MATRIX", "6"))
SECONDS = 10.0
STEPS = 10


class Ours:
    """Our commands, by a process that has everything loaded."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=TRUSTED,
            text=True,
        )

    def __call__(self, folder: Path, words: list[str]) -> tuple[int, str]:
        assert self.server.stdin is not None and self.server.stdout is not None
        job = {"out": str(self.out), "folder": str(folder), "words": words}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return status, self.out.read_text(errors="replace")

    def close(self) -> None:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.close()
        self.server.stdout.close()
        self.server.wait(30)


class Theirs:
    """QEMU's."""

    def __init__(self, tools: dict[str, str]) -> None:
        self.tools = tools

    def __call__(self, folder: Path, words: list[str]) -> tuple[int, str]:
        tool = {"io": "qemu-io", "nbdinfo": "nbdinfo", "serve": "qemu-nbd"}.get(words[0])
        command = (
            [self.tools["qemu-img"], *words] if tool is None else [self.tools[tool], *words[1:]]
        )
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=TRUSTED,
            timeout=120,
        )
        return done.returncode, done.stdout.decode(errors="replace")


@pytest.fixture
def both(tmp_path: Path, peer: Callable[[str], str]) -> Iterator[tuple[Ours, Theirs]]:
    ours = Ours(tmp_path / "printed")
    tools = {name: peer(name) for name in ("qemu-img", "qemu-io", "nbdinfo")}
    tools["qemu-nbd"] = str(Path(tools["qemu-img"]).with_name("qemu-nbd"))
    try:
        yield ours, Theirs(tools)
    finally:
        ours.close()


@pytest.mark.timeout(0 if LONG else 120)
def test_shapes_and_operations(tmp_path: Path, both: tuple[Ours, Theirs]) -> None:
    begun = time.monotonic()
    problems = []
    for seed in range(SEED, SEED + SEEDS):
        folder = tmp_path / "matrix"
        matrix = Steps(folder, *both, random.Random(seed))
        try:
            if matrix.create(Shape.drawn(matrix.rng)):
                for _ in range(STEPS):
                    matrix.step()
                    if not LONG and time.monotonic() - begun > SECONDS:
                        return
            if LONG:
                print(f"{seed}: {len(matrix.log)} operations, {time.monotonic() - begun:.0f} s")
        except AssertionError as wrong:
            problems.append(f"MATRIX_SEED={seed}: {wrong}\n{matrix.told()}")
            if LONG:
                print(problems[-1], flush=True)
                shutil.rmtree(tmp_path.parent / f"bad{seed}", ignore_errors=True)
                shutil.copytree(folder, tmp_path.parent / f"bad{seed}")
            if len(problems) == 40 or not LONG:
                break
        except subprocess.TimeoutExpired as hung:  # QEMU's amend does, now and then
            print(f"MATRIX_SEED={seed}: {hung}\n{matrix.told()}", flush=True)
        shutil.rmtree(folder)
    if problems:
        pytest.fail("\n\n".join(problems), pytrace=False)
