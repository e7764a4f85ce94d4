"""Losses of power at every moment of random workloads, here and in qemu-img.

``DISKWRIGHT_CRASHES`` sets the workloads of each kind of image, ``--long`` makes it 60.  Whatever
was given back is poisoned on the disk, and of every other qcow2 image so is all that was not handed
out yet: the disk, its snapshots and their VM state never show a byte of it, nor any other that the
guest did not write there.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import NeedMeta
from diskwright.formats.qcow2.format import Qcow2
from races.mutants import MUTANTS, applied
from races.pool import executor, show

from .explorer import Saved, explore
from .kits import FEATURES, QCOW2, VHDX, VMDK, Kit

SEEDS = int(os.environ.get("DISKWRIGHT_CRASHES", "2"))
LONG = int(os.environ.get("DISKWRIGHT_CRASHES", "60"))


def one(job: tuple[str, int, int, int]) -> tuple[Counter[str], list[Saved], str]:
    """In a worker."""
    return explore(*job)


def openable(kind: str) -> bool:
    """Other programs can open such an image by itself."""
    return Kit(kind, random.Random(0)).others


def run(
    kinds: tuple[str, ...], seeds: int, first: int, each: int, keep: int
) -> tuple[Counter[str], list[Saved]]:
    # Of what qemu-img cannot open, and of single features, a third is enough.
    many = [kind for kind in kinds if openable(kind) and kind not in FEATURES]
    count = {kind: seeds if kind in many else max(seeds // 3, 1) for kind in kinds}
    jobs = [
        (kind, seed, each, keep) for kind in kinds for seed in range(first, first + count[kind])
    ]
    total: Counter[str] = Counter()
    saved: list[Saved] = []
    problems = []
    with executor() as pool:
        for stats, kept, problem in pool.map(one, jobs):
            total.update(stats)
            saved += kept
            if problem:
                problems.append(problem)
    assert not problems, "\n".join(problems)
    return total, saved


def told(total: Counter[str]) -> str:
    work = ", ".join(f"{total[k]} {k}" for k in ("write", "zero", "discard", "resize", "flush"))
    return f"{total['states']} states of {total['workloads']} workloads ({work})"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is one: qemu-img flushes hundreds of small images."""
    if Path("/dev/shm").is_dir():
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            yield Path(folder)
    else:
        yield tmp_path


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kinds", "seeds", "keep", "least"),
    [
        pytest.param(QCOW2, SEEDS, 12, 1000 * SEEDS, id="qcow2"),
        pytest.param(VHDX, 2 * SEEDS, 30, 250, id="vhdx"),
        pytest.param(VMDK, 2 * SEEDS, 15, 500, id="vmdk"),
    ],
)
def test_crash_states(
    kinds: tuple[str, ...],
    seeds: int,
    keep: int,
    least: int,
    peer: Callable[[str], str],
    memory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    total, saved = run(kinds, seeds, 0, 1, keep)
    assert total["states"] >= least
    assert total["resize"] > 0 and total["discard"] > 0
    qemu_img = peer("qemu-img")

    def agrees(numbered: tuple[int, Saved]) -> str:
        return in_qemu(qemu_img, memory / str(numbered[0]), numbered[1])

    with ThreadPoolExecutor(2) as pool:
        problems = [text for text in pool.map(agrees, enumerate(saved)) if text]
    show(capsys, f"crashes: {told(total)}; {len(saved)} of them opened in qemu-img, too")
    assert not problems, "\n".join(problems)
    assert len(saved) >= 100


@pytest.mark.long
@pytest.mark.timeout(0)
def test_crash_states_long(capsys: pytest.CaptureFixture[str]) -> None:
    total, _ = run(QCOW2 + VHDX + VMDK, LONG, 1000, 4, 0)
    show(capsys, f"crashes: {told(total)}")


def in_qemu(qemu_img: str, folder: Path, saved: Saved) -> str:
    """Check the image with qemu-img and compare the bytes that it reads; what is wrong."""
    what = f"{saved.kind} seed {saved.seed} at {saved.moment}"
    folder.mkdir()
    if saved.base:
        (folder / "base").write_bytes(saved.base.ljust(-(-len(saved.base) // 512) * 512, b"\0"))
    if saved.data is not None:
        (folder / "data").write_bytes(saved.data)
    image = folder / f"image.{saved.format}"
    image.write_bytes(zlib.decompress(saved.image))

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [qemu_img, *arguments], cwd=folder, capture_output=True, text=True, timeout=60
        )

    if saved.dirty:  # whoever opens it for writing makes its counts anew, or replays its log
        call("check", "-q", "-r", "all", image.name)
    check = call("check", "-q", image.name)
    if check.returncode not in (0, 3):
        return f"{what}: check: {check.returncode} {check.stdout}{check.stderr}"
    convert = call("convert", "-O", "raw", image.name, "out")
    if convert.returncode:
        return f"{what}: convert: {convert.stderr}"
    content, ours = (folder / "out").read_bytes(), saved.content
    if len(content) in saved.sizes:
        # A VMDK tells its size in two places. Between them either program may believe the other.
        common = min(len(content), len(ours))
        content, ours = content[:common], ours[:common]
    for file in folder.iterdir():
        file.unlink()
    if content != ours:
        pairs = zip(content, ours, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), -1)
        lengths = f"{len(content)} and {len(ours)} bytes"
        return f"{what}: qemu-img reads other bytes at {at:#x} ({lengths})"
    return ""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        "metadata are written before the data are flushed",
        "no barriers between the groups",
        "the groups are written backwards",
        "freed space is used before the metadata are on disk",
    ],
)
def test_a_broken_rule_shows(name: str) -> None:
    one_of = next(m for m in MUTANTS if m.name == name)
    with applied(one_of):
        for seed in range(12):
            for kind in ("wide", "backing"):
                if explore(kind, seed, 1, 0)[2]:
                    return
    raise AssertionError("no crash state was wrong")


@pytest.mark.parametrize("kind", ["plain", "extended", "snapshots"])
def test_what_a_free_cluster_holds_would_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cluster that is handed out is taken to be zeroes."""
    choose, take = Qcow2.choose, Qcow2.take

    def careless(self: Qcow2, count: int) -> Any:
        found = choose(self, count)
        return found if isinstance(found, NeedMeta) else [(a, b, True) for a, b, _ in found]

    def taken(self: Qcow2, chosen: Any) -> Any:
        for start, end, _ in chosen:
            self.free.remove(start, end)
        return take(self, chosen)

    monkeypatch.setattr(Qcow2, "choose", careless)
    monkeypatch.setattr(Qcow2, "take", taken)
    assert any(explore(kind, seed, 1, 0)[2] for seed in range(12))
