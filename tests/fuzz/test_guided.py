"""Random inputs of the fuzzer, and a short run of it."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.machine import watched
from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
RANDOM, GUIDED = 100, 150


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs(name: str) -> None:
    target, rng = TARGETS[name], random.Random(name)
    seeds = list(target.seeds())
    for _ in range(RANDOM):
        data = rng.choice(seeds)
        for _ in range(rng.randrange(1, 6)):
            data = (target.mutate or noise)(data, rng, lambda old: noise(old, rng, bytes))
        with watched():
            target.run(data)


def noise(data: bytes, rng: random.Random, _: object) -> bytes:
    """Some bytes are others."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 9)):
        if out:
            out[rng.randrange(min(len(out), 600))] = rng.randrange(256)
    return bytes(out)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="atheris has no wheel here"
)
def test_guided_inputs(tmp_path: Path, name: str = "vmdk") -> None:
    """The fuzzer finds its way: it keeps inputs that reach more than the seeds do."""
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.guided", name, str(GUIDED), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    said = [path.read_text() for path in (tmp_path / "found").glob("*.txt")]
    assert not result["found"], said
    assert result["executions"] == GUIDED
    assert len(list((tmp_path / "corpus").iterdir())) > len(set(TARGETS[name].seeds()))
