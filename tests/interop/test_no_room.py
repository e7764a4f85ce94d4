"""Where there is too little of something: a full disk, little memory, a reader that goes."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from interop.tools import OURS, TRUSTED, run

Peer = Callable[[str], str]
MIB = 1 << 20
TARGETS = (
    ("raw", ""),
    ("qcow2", ""),
    ("qcow2", "preallocation=full"),
    ("qcow2", "data_file=data"),
    ("qcow2", "data_file=data,data_file_raw=on,preallocation=falloc"),
    ("vhdx", "subformat=dynamic"),
    ("vhdx", "subformat=fixed,preallocation=full"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=streamOptimized"),
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(12 * MIB))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 8 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize(("fmt", "options"), TARGETS)
def test_a_full_disk(fmt: str, options: str, disk: Path, small: Path) -> None:
    """A conversion that does not fit says so and leaves nothing."""
    words = ["-o", options] if options else []
    line = ["convert", "-f", "raw", "-O", fmt, *words, disk, small / "out.img"]
    said = run([*OURS, *line], status=1)
    assert "No space left on device" in said and said.count("\n") == 1
    assert list(small.iterdir()) == []


@pytest.mark.parametrize("fmt", ["vhdx", "vmdk"])
def test_a_disk_that_gets_full(fmt: str, peer: Peer, small: Path) -> None:
    """What was flushed stays, and writing where there is room goes on."""
    image = small / "disk.img"
    run([*OURS, "create", "-q", "-f", fmt, image, "20M"])
    commands = ("write -q -P 1 0 1M", "flush", "write -q -P 2 1M 16M", "write -q -P 3 0 64k")
    words = [word for line in (*commands, "flush", "read -P 3 0 64k") for word in ("-c", line)]
    said = run([*OURS, "io", "-f", fmt, *words, image], status=1)
    assert "write failed: No space left on device" in said and "read 65536" in said
    run([peer("qemu-img"), "check", "-q", "-f", fmt, image], status=(0, 3))
    run([*OURS, "check", "-q", "-f", fmt, image], status=(0, 3))
    for line in ("read -q -P 3 0 64k", "read -q -P 1 64k 960k"):
        run([peer("qemu-io"), "-r", "-f", fmt, "-c", line, image])


def test_an_overwritten_file_stays(disk: Path, small: Path) -> None:
    """What was there is not removed: it is the caller's file, though its content is gone."""
    target = small / "out.img"
    target.write_bytes(b"of somebody")
    run([*OURS, "convert", "-f", "raw", "-O", "vhdx", disk, target], status=1)
    assert target.exists()


@pytest.mark.skipif(not Path("/usr/bin/prlimit").exists(), reason="prlimit is not installed")
def test_a_compressed_source_within_a_gibibyte(disk: Path, peer: Peer, tmp_path: Path) -> None:
    """Of address space: as many units are unpacked at once as threads find room for."""
    words = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    source = tmp_path / "stream.vmdk"
    run([peer("qemu-img"), "convert", "-f", "raw", *words, disk, source])
    for fmt in ("raw", "vhdx"):
        limited = ["prlimit", "--as=1073741824", *OURS]
        run([*limited, "convert", "-m", "16", "-W", "-O", fmt, source, tmp_path / "out"])
        run([peer("qemu-img"), "compare", "-q", "-f", fmt, "-F", "raw", tmp_path / "out", disk])


@pytest.mark.parametrize("fmt", ["vhdx", "vmdk"])
def test_names_that_are_not_utf8(fmt: str, disk: Path, tmp_path: Path) -> None:
    name = b"disk-\xff\xe9." + fmt.encode()
    for line in (["convert", "-f", "raw", "-O", fmt, disk, name], ["check", "-q", name]):
        done = subprocess.run([*OURS, *line], cwd=tmp_path, env=TRUSTED, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run([*OURS, "info", name], cwd=tmp_path, env=TRUSTED, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"image: " + name + b"\n")


@pytest.mark.parametrize("verb", [["map", "--output=json"], ["info"], ["convert", "-p", "-Oraw"]])
def test_a_reader_that_goes(verb: list[str], disk: Path, tmp_path: Path) -> None:
    """A closed pipe is the end of it, without a word."""
    source = tmp_path / "disk.vmdk"
    run([*OURS, "convert", "-f", "raw", "-O", "vmdk", disk, source])
    target = ["out"] if verb[0] == "convert" else []
    process = subprocess.Popen(
        [*OURS, *verb, str(source), *target],
        cwd=tmp_path,
        env=TRUSTED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert b"Traceback" not in error and b"Exception" not in error
