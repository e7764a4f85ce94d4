"""Every field of every format at its borders ends in a result or a plain error; and nothing that a
format declares is left out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.attack import MODES, attack
from fuzz.fields import declared, modules, watched
from fuzz.machine import MOST_SECONDS
from fuzz.samples import FORMATS, samples

ROOT = Path(__file__).resolve().parents[2]
MOST_MIB = 512
PARTS = [(name, part, parts) for name, parts in
         {"raw": 1, "qcow2": 3, "luks": 1, "vhdx": 2, "vmdk": 2}.items()
         for part in range(parts)]  # fmt: skip


def borders(format: str, part: int, parts: int, every: str, timeout: float) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.borders_worker", format, str(part), str(parts), every],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert not result["wrong"], "\n".join(result["wrong"][:5])
    assert result["executions"] > 50
    # Most mutants get behind opening, or they would show nothing.
    assert result["opened"] > result["executions"] // 4
    seconds, said = result["slowest"]
    assert seconds < MOST_SECONDS, said
    assert result["peak"] < MOST_MIB


@pytest.mark.parametrize(("format", "part", "parts"), PARTS)
def test_fields_at_their_borders(format: str, part: int, parts: int) -> None:
    borders(format, part, parts, "few", 110)


@pytest.mark.long
@pytest.mark.parametrize("format", FORMATS)
def test_fields_at_every_border(format: str) -> None:
    borders(format, 0, 1, "every", 3500)


@pytest.mark.parametrize("format", FORMATS)
def test_samples_are_sound(format: str) -> None:
    """What mutants are made of goes through everything."""
    for sample in samples(format):
        for mode in MODES[format]:
            assert attack(sample, sample.files, mode), (sample, mode)


# Structures that nothing on disk is decoded by, and why.
_UNUSED = {
    "vmdk.stream.writer.GRAIN_HEADER": "written only",
    "vmdk.stream.writer.MARKER": "written only",
    "qcow2.header.FEATURE_NAME": "written only; names are taken from the bytes",
    "qcow2.salvage.evidence._VALUE": "64 words at once of what may be a table",
    "qcow2.repair.dropping.ENTRY": "of a snapshot, where it cannot be parsed",
}


def test_no_structure_is_forgotten() -> None:
    """Each structure that a format declares is decoded somewhere in a sample, so that its fields
    are found; a new one without a sample fails here."""
    reached = set().union(*(watched(s).seen for name in FORMATS for s in samples(name)))
    assert sorted(declared().keys() - reached) == sorted(_UNUSED)


def test_every_structure_is_declared() -> None:
    """Nothing is decoded by a structure that has no name."""
    for module in modules():
        assert module.__file__ is not None
        text = Path(module.__file__).read_text()
        assert not re.search(r"struct\.(iter_)?unpack", text), module.__name__
