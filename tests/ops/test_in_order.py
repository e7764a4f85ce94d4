"""qcow2 through a pipe in order: what leads to data stands before them, and nothing is spooled."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import ImageError
from diskwright.formats.qcow2 import ordered
from diskwright.ops.convert import Settings, convert
from diskwright.ops.images import ImageSpec
from diskwright.ops.inorder import InOrder
from diskwright.ops.pipes import Pipe

MIB = 1 << 20


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Data that can be compressed and data that cannot, holes at odd places, an odd length."""
    chance = random.Random(7)
    content = bytearray(6 * MIB + 512)
    for start, size in ((0, 70_000), (300_000, 9), (MIB, 300_000), (5 * MIB - 3, 900)):
        content[start : start + size] = chance.randbytes(size)
    content[2 * MIB : 3 * MIB] = (b"compress me, " * MIB)[:MIB]
    content[-700:] = b"z" * 700
    return bytes(content)


def sent(
    folder: Path, disk: bytes, settings: Settings, progress: list[tuple[int, int]] | None = None
) -> tuple[Path, list[str]]:
    """The image that went through a pipe (a file in its place), and what was said of spooling."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(disk)
    told: list[str] = []
    driver = Driver()
    with open(target, "wb") as file:
        pipe = Pipe(file.fileno(), ImageSpec("out", "-", "qcow2", "unsafe"))
        try:
            driver.run(
                convert(
                    driver, [ImageSpec("in", str(source), "raw")], pipe, settings,
                    on_spool=told.append,
                    on_progress=None if progress is None else lambda *now: progress.append(now),
                )
            )  # fmt: skip
        finally:
            driver.close()
    return target, told


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compat": "0.10"},
        {"cluster_size": 512},
        {"cluster_size": 2 * MIB},
        {"refcount_bits": 1},
        {"refcount_bits": 4, "cluster_size": 4096},
        {"refcount_bits": 64, "extended_l2": True, "lazy_refcounts": True},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()) or "default",
)
def test_it_is_sound_and_the_same(
    tmp_path: Path, disk: bytes, options: dict[str, object], compress: bool
) -> None:
    target, told = sent(tmp_path, disk, Settings(options=options, compress=compress))
    assert not told
    found = diskwright.check(target, format="qcow2")
    assert found.ok and bool(found.compressed_clusters) is compress
    with diskwright.open(target, format="qcow2") as image:
        assert image.read_at(0, image.size) == disk
    if shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
        command = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*command, target, tmp_path / "source"], check=True)


@pytest.mark.parametrize("size", [0, 512, 3 * MIB])
def test_nothing_but_zeroes(tmp_path: Path, size: int) -> None:
    target, _ = sent(tmp_path, bytes(size), Settings(compress=True))
    assert diskwright.check(target, format="qcow2").ok
    with diskwright.open(target, format="qcow2") as image:
        assert image.size == size and not any(part.data for part in image.extents())


def test_more_refcounts_than_fit_into_a_block_or_their_blocks_into_a_table(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(3 * MIB)
    options = {"cluster_size": 512, "refcount_bits": 64}
    target, _ = sent(tmp_path, content, Settings(options=options))
    assert diskwright.check(target, format="qcow2").ok


@pytest.mark.parametrize(
    "settings",
    [Settings(sparse=0), Settings(salvage=True), Settings(options={"preallocation": "metadata"})],
    ids=["allocated", "salvage", "preallocated"],
)
def test_what_goes_by_a_file(tmp_path: Path, disk: bytes, settings: Settings) -> None:
    target, told = sent(tmp_path, disk, settings)
    assert told and diskwright.check(target, format="qcow2").ok


def test_too_many_parts_go_by_a_file(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "_MOST", 3)
    target, told = sent(tmp_path, disk, Settings(compress=True))
    assert told and diskwright.check(target, format="qcow2").ok


def test_both_passes_are_progress(tmp_path: Path, disk: bytes) -> None:
    told: list[tuple[int, int]] = []
    sent(tmp_path, disk, Settings(), told)
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize(
    ("at", "data", "compress", "seen"),
    [
        (4 * MIB, b"more", False, False),
        (4 * MIB, b"more", True, False),
        (300_000, bytes(9), False, False),
        (2 * MIB, b"something quite different", True, False),
        (2 * MIB, b"the same length", False, True),
    ],
    ids=["more", "more-packed", "less", "longer", "touched"],
)
def test_a_source_that_changes_in_between_is_an_error(
    tmp_path: Path, disk: bytes, monkeypatch: pytest.MonkeyPatch,
    at: int, data: bytes, compress: bool, seen: bool,
) -> None:  # fmt: skip
    look = InOrder.look

    async def looked(self: InOrder, *arguments: object) -> bool:
        found = await look(self, *arguments)  # type: ignore[arg-type]
        source = tmp_path / "source"
        times = source.stat()
        with open(source, "r+b") as file:
            file.seek(at)
            file.write(data)
        if not seen:  # whoever sets the time back is found out as well
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
        return found

    monkeypatch.setattr(InOrder, "look", looked)
    with pytest.raises(ImageError, match="was changed while it was read"):
        sent(tmp_path, disk, Settings(compress=compress))
