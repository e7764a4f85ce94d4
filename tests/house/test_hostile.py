"""Hostile bytes: every field of an image at its borders ends in a result or a plain error."""

from __future__ import annotations

import bz2
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from house import featured
from house.hostile_worker import (
    ALL_KINDS,
    KINDS,
    LIMIT_BYTES,
    LIMIT_SECONDS,
    VHDX_KINDS,
    mutants,
)
from house.tinyqcow2 import Tiny
from house.tinyvhdx import TinyVhdx

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("hostile_worker.py")
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def run_worker(
    kind: str, pairs: int, first: int = 0, every: int = 1, timeout: float = 110, least: int = 100
) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps([kind, pairs, first, every])],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout)
    assert not result["wrong"], "\n".join(result["wrong"][:5])
    assert result["count"] > least
    seconds, said = result["slowest"]
    assert seconds < LIMIT_SECONDS, said
    assert result["peak_mib"] < LIMIT_BYTES >> 20


@pytest.mark.parametrize("kind", KINDS)
def test_fields_at_their_borders(kind: str) -> None:
    every = {"largest clusters": 48, "snapshot": 6, "dirty": 2, "packed": 2}
    run_worker(kind, pairs=60, every=every.get(kind, 1))


@pytest.mark.parametrize("kind", VHDX_KINDS)
def test_fields_of_vhdx_at_their_borders(kind: str) -> None:
    run_worker(kind, pairs=40, first=5, every=150)


@pytest.mark.parametrize("kind", featured.KINDS)
def test_fields_of_features_at_their_borders(kind: str, peer: Callable[[str], str]) -> None:
    peer("qemu-img")  # which makes the images
    run_worker(kind, pairs=20, first=3, every=60, least=20)


@pytest.mark.long
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_many_pairs_of_fields(kind: str) -> None:
    run_worker(kind, pairs=4000, timeout=3500)


@pytest.mark.parametrize("kind", ["v3", "v2", "smallest clusters", "packed", "snapshot"])
def test_the_untouched_image_is_good(kind: str, tmp_path: Path, peer: Callable[[str], str]) -> None:
    """The mutants start from an image with which qemu-img finds nothing wrong."""
    tiny = Tiny(**KINDS[kind])  # type: ignore[arg-type]
    image, raw = tmp_path / "tiny.qcow2", tmp_path / "tiny.raw"
    image.write_bytes(tiny.data)
    raw.write_bytes(tiny.model)
    checked = subprocess.run([peer("qemu-img"), "check", image], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    subprocess.run(
        [peer("qemu-img"), "compare", "-f", "raw", "-F", "qcow2", raw, image], check=True
    )


@pytest.mark.parametrize(
    "kind", [kind for kind in VHDX_KINDS if not kind.endswith(("parent", "4096"))]
)
def test_the_untouched_vhdx_is_good(kind: str, tmp_path: Path, peer: Callable[[str], str]) -> None:
    tiny = TinyVhdx(**VHDX_KINDS[kind])
    image, raw = tmp_path / "tiny.vhdx", tmp_path / "tiny.raw"
    image.write_bytes(tiny.data)
    replayed = subprocess.run(
        [peer("qemu-img"), "check", "-r", "all", image], capture_output=True, text=True
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    if tiny.size < 1 << 30 and "log" not in kind:
        raw.write_bytes(tiny.model)
        subprocess.run(
            [peer("qemu-img"), "compare", "-f", "raw", "-F", "vhdx", raw, image], check=True
        )


@pytest.mark.parametrize("verb", ["info", "map", "check"])
@pytest.mark.parametrize("kind", ["v3", "packed", "vhdx", "vhdx with a log"])
def test_the_commands_end_in_a_plain_error(kind: str, verb: str, tmp_path: Path) -> None:
    every, first = (1300, 7) if kind in VHDX_KINDS else (131, 7)
    chosen = list(mutants(kind, 40, first, every))
    assert len(chosen) > 3
    for said, data in chosen:
        image = tmp_path / "image"
        image.write_bytes(data)
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", verb, str(image)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=ENV,
        )
        assert "Traceback" not in done.stderr, f"{said}: {done.stderr}"
        assert done.returncode in (0, 1, 2, 3, 63), said
        if done.returncode == 1:
            assert done.stderr.startswith("diskwright"), f"{said}: {done.stderr}"


def test_a_fuzzed_image_from_the_field_is_refused(fixtures_dir: Path, tmp_path: Path) -> None:
    image = tmp_path / "afl5.img"
    image.write_bytes(bz2.decompress((fixtures_dir / "afl5.img.bz2").read_bytes()))
    for verb in ("info", "check", "map"):
        done = subprocess.run(
            [sys.executable, "-m", "diskwright", verb, str(image)],
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=ENV,
        )
        assert done.returncode != 0
        assert done.stderr.strip() and "Traceback" not in done.stderr
