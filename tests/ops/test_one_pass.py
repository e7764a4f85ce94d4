"""``convert`` into an image that is written in one pass: it is whole in the end, or not there."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import diskwright
from cli.support import ours
from diskwright.engine.kernel import Driver
from diskwright.errors import UsageError
from diskwright.ops.convert import Settings, TargetFailed, convert
from diskwright.ops.images import ImageSpec
from ops.tools import LISTING, known, unlisted

MIB = 1 << 20


@pytest.fixture(autouse=True)
def listing() -> Iterator[None]:
    with known(LISTING):
        yield


@pytest.fixture
def source(tmp_path: Path) -> bytes:
    """A disk with holes at odd places, and a length that is no multiple of the unit."""
    disk = bytearray(5 * MIB + 512)
    rng = random.Random(4)
    for start in (0, 70_000, 3 * MIB - 9, len(disk) - 512):
        disk[start : start + 300] = rng.randbytes(300)
    (tmp_path / "a").write_bytes(disk)
    return bytes(disk)


def spec(path: Path, fmt: str = "raw", cache: str = "unsafe") -> ImageSpec:
    return ImageSpec(str(path), str(path), fmt, cache)


def run(driver: Driver, folder: Path, settings: Settings, *, cache: str = "unsafe") -> int:
    try:
        return driver.run(
            convert(driver, [spec(folder / "a")], spec(folder / "out", "listing", cache), settings)
        )
    finally:
        driver.close()


@pytest.mark.parametrize("cache", ["unsafe", "writeback", "none"])
def test_the_disk_is_in_it(tmp_path: Path, source: bytes, cache: str) -> None:
    (tmp_path / "out").write_bytes(b"x" * 6 * MIB)  # what was there is gone
    run(Driver(), tmp_path, Settings(), cache=cache)
    assert unlisted((tmp_path / "out").read_bytes(), len(source)) == source


def test_several_sources_and_progress(tmp_path: Path, source: bytes) -> None:
    driver, told = Driver(), []
    sources = [spec(tmp_path / "a"), spec(tmp_path / "a")]
    target = spec(tmp_path / "out", "listing")
    try:
        driver.run(
            convert(driver, sources, target, Settings(), on_progress=lambda *n: told.append(n))
        )
    finally:
        driver.close()
    assert unlisted((tmp_path / "out").read_bytes(), 2 * len(source)) == source * 2
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


def test_the_rate_is_kept(tmp_path: Path, source: bytes) -> None:
    driver = Driver()
    began = driver.now()
    (tmp_path / "a").write_bytes(random.Random(1).randbytes(3 * MIB))
    run(driver, tmp_path, Settings(rate=10 * MIB))
    assert driver.now() - began >= 0.25


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_one_leaves_nothing_that_looks_whole(tmp_path: Path, existed: bool) -> None:
    if existed:
        (tmp_path / "out").write_bytes(b"HEAD of an older one TAIL")
    (tmp_path / "a").write_bytes(b"x" * 4 * MIB)
    config = tmp_path / "config"
    config.write_text('[inject-error]\nevent = "read_aio"\nsector = "4096"\n')
    bad = f"blkdebug:{config}:{tmp_path / 'a'}"
    done = ours("convert", "-f", "raw", "-O", "listing", bad, "out", cwd=tmp_path)
    assert done.status == 1
    assert b"error while reading at byte 2097152: Input/output error" in done.err
    assert (tmp_path / "out").exists() == existed
    assert not existed or (tmp_path / "out").read_bytes() == b""


def test_salvage_reads_what_can_be_read(tmp_path: Path) -> None:
    disk = random.Random(2).randbytes(2 * MIB)
    (tmp_path / "a").write_bytes(disk)
    config = tmp_path / "config"
    config.write_text('[inject-error]\nevent = "read_aio"\nsector = "5"\n')
    bad = f"blkdebug:{config}:{tmp_path / 'a'}"
    done = ours("convert", "--salvage", "-f", "raw", "-O", "listing", bad, "out", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.err.count(b"error while reading offset 2560: Input/output error") == 1
    lost = bytearray(disk)
    lost[2560:3072] = bytes(512)
    assert unlisted((tmp_path / "out").read_bytes(), len(disk)) == lost


def test_an_interrupted_one_is_taken_back(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(random.Random(3).randbytes(8 * MIB))
    timer = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        done = ours("convert", "-r", "4M", "-O", "listing", "-f", "raw", "a", "out", cwd=tmp_path)
    finally:
        timer.join()
    assert done.status == 130
    assert b"interrupted: 'out' was taken back" in done.err
    assert not (tmp_path / "out").exists()


def test_no_backing_file(tmp_path: Path, source: bytes) -> None:
    with pytest.raises(TargetFailed) as failed:
        run(Driver(), tmp_path, Settings(options={"backing_file": "b", "backing_fmt": "raw"}))
    assert isinstance(failed.value.cause, UsageError)
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_its_own_target(tmp_path: Path, source: bytes) -> None:
    os.link(tmp_path / "a", tmp_path / "out")
    with pytest.raises(TargetFailed):
        run(Driver(), tmp_path, Settings())
    assert (tmp_path / "a").read_bytes() == source


def test_other_options_go_the_ordinary_way(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    run(Driver(), tmp_path, Settings(options={"subformat": "plain"}))
    assert (tmp_path / "out").read_bytes() == b"not a listing"


def test_from_python(tmp_path: Path, source: bytes) -> None:
    diskwright.convert(tmp_path / "a", tmp_path / "out", target_format="listing", format="raw")
    assert unlisted((tmp_path / "out").read_bytes(), len(source)) == source


@pytest.mark.parametrize(
    ("fmt", "message"),
    [
        ("raw", b"Compression not supported for this file format"),
    ],
)
def test_who_cannot_compress_says_so(
    tmp_path: Path, source: bytes, fmt: str, message: bytes
) -> None:
    done = ours("convert", "-c", "-f", "raw", "-O", fmt, "a", "out", cwd=tmp_path)
    assert (done.status, done.out) == (1, b"")
    assert done.err == b"qemu-img: " + message + b"\n"
    assert not (tmp_path / "out").exists()


def test_compressed_as_asked(tmp_path: Path, source: bytes) -> None:
    done = ours("convert", "-c", "-f", "raw", "-O", "listing", "a", "out", cwd=tmp_path)
    assert (done.status, done.out, done.err) == (0, b"", b"")
    assert unlisted((tmp_path / "out").read_bytes(), len(source)) == source
