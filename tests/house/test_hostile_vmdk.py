"""Hostile bytes of VMDK: headers, directories, tables and descriptors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from house.hostile_worker import LIMIT_SECONDS
from house.test_hostile import ENV, run_worker
from house.tinyvmdk import Reading
from house.vmdk_mutants import KINDS, mutants, tiny


@pytest.mark.parametrize("kind", KINDS)
def test_fields_at_their_borders(kind: str) -> None:
    run_worker(kind, pairs=80, first=1, every=6)


@pytest.mark.parametrize("kind", ["vmdk", "vmdk, three entries in a table", "vmdk, one directory"])
def test_the_untouched_image_is_good(kind: str, tmp_path: Path, peer: Callable[[str], str]) -> None:
    """The mutants start from an image with which qemu-img finds nothing wrong."""
    image, raw = tmp_path / "tiny.vmdk", tmp_path / "tiny.raw"
    image.write_bytes(tiny(kind))
    raw.write_bytes(Reading(tiny(kind)).content())
    subprocess.run([peer("qemu-img"), "check", "-q", image], check=True)
    subprocess.run(
        [peer("qemu-img"), "compare", "-q", "-f", "raw", "-F", "vmdk", raw, image], check=True
    )


@pytest.mark.parametrize("verb", ["info", "map", "check", "repair"])
def test_the_commands_end_in_a_plain_error(verb: str, tmp_path: Path) -> None:
    chosen = [m for kind in KINDS for n, m in enumerate(mutants(kind, 40)) if n % 400 == 7]
    assert len(chosen) > 8
    words = ["check", "-r", "all"] if verb == "repair" else [verb]
    for said, data in chosen:
        image = tmp_path / "image.vmdk"
        image.write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", *words, str(image)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=ENV,
        )
        assert "Traceback" not in done.stderr, f"{said}: {done.stderr}"
        assert done.returncode in (0, 1, 2, 3, 63), said
        if done.returncode == 1:
            assert done.stderr.startswith("diskwright"), f"{said}: {done.stderr}"
