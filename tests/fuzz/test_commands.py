"""Hostile images through the whole program: a result, or a plain error."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from cli.support import Result, ours
from fuzz.mutants import mutants
from fuzz.samples import FORMATS, samples

LIMITS = ("--max-time", "20", "--max-memory", "256M")


def run(folder: Path, *words: str) -> Result:
    done = ours(*words[:1], *LIMITS, *words[1:], cwd=folder, name="diskwright")
    assert done.status in (0, 1, 2, 3, 63), done.err
    assert b"Traceback" not in done.err
    if done.status == 1:
        assert done.err.startswith(b"diskwright"), done.err
    return done


@pytest.mark.parametrize("format", FORMATS)
def test_the_commands_end_in_a_plain_error(format: str, tmp_path: Path) -> None:
    known: set[str] = set()
    found = [mutant for sample in samples(format) for mutant in mutants(sample, known)]
    step = max(len(found) // 24, 1)
    opened = 0
    for mutant in found[step // 2 :: step]:
        sample = mutant.sample
        for name, data in mutant.files().items():
            if name:
                (tmp_path / name).write_bytes(bytes(data))
        opened += not run(tmp_path, "info", sample.image).status
        run(tmp_path, "map", sample.image)
        run(tmp_path, "check", sample.image)
        run(tmp_path, "convert", "-f", format, "-O", "qcow2", sample.image, "out.qcow2")
        run(tmp_path, "check", "-r", "all", sample.image)
    assert opened > 5


def test_a_fuzzed_image_from_the_field_is_refused(fixtures_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "afl5.img").write_bytes(
        bz2.decompress((fixtures_dir / "afl5.img.bz2").read_bytes())
    )
    for verb in ("info", "check", "map"):
        assert run(tmp_path, verb, "afl5.img").status
