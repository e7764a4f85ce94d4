"""The pytest plugin, as another project would use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"
TEST = """
from diskwright.testing.subjects import subjects

def test_mine(conformance):
    conformance(next(s for s in subjects() if s.name == "memory"))

def test_seed(seeded_driver, recording_leaf):
    leaf = recording_leaf(b"abc", delay=5)
    (data,) = seeded_driver.run(leaf.read([1], [2]))
    assert data == b"bc"
"""


def test_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TEST)
    arguments = ["--diskwright-seed=7", "test_mine.py"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "diskwright.testing.plugin", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
