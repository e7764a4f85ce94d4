"""Disks as files of the kernel's FUSE, used by other programs."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from monitor.running import OURS, SOURCE, daemon

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "diskwright"]


def _wanting() -> str:
    """What keeps these tests from being run."""
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed"
    if not shutil.which("fusermount3"):
        return "fusermount3 is not installed"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"no FUSE here: {error}"
    return ""


_reason = _wanting()
pytestmark = pytest.mark.skipif(bool(_reason), reason=_reason)


def run(*words: Any, status: int = 0) -> str:
    """A program's output; nobody waits for a mount for ever."""
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[tuple[Path, int]]:
    """The file and the process of a mounted ``disk.qcow2``."""
    file = folder / "file"
    file.touch()
    pid = folder / "pid"
    run(*PROGRAM, "mount", "--fork", "--pid-file", pid, *options, folder / "disk.qcow2", file)
    process = int(pid.read_text())
    try:
        yield file, process
    finally:
        subprocess.run(["fusermount3", "-u", "-z", file], stderr=subprocess.DEVNULL)
        ended(process)


def ended(process: int) -> None:
    for _ in range(500):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # whoever took it over has not waited for it yet
        time.sleep(0.02)
    raise AssertionError("it goes on")


def create(folder: Path, size: int = 16 * MIB) -> Path:
    image = folder / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, size)
    return image


def clean(image: Path) -> None:
    assert "No errors were found" in run("qemu-img", "check", image)


needs_peers = pytest.mark.skipif(
    not (shutil.which("mkfs.ext4") and shutil.which("qemu-img")),
    reason="e2fsprogs or qemu-img is not installed",
)


@needs_peers
def test_other_programs(tmp_path: Path) -> None:
    image = create(tmp_path)
    with mounted(tmp_path) as (file, process):
        run("mkfs.ext4", "-q", file)
        run("debugfs", "-w", "-R", f"write {__file__} test", file)
        run("e2fsck", "-fn", file)
        words = ("bs=64k", "count=16", "seek=200", "conv=notrunc", "oflag=direct", "status=none")
        (tmp_path / "random").write_bytes(os.urandom(MIB))
        run("dd", f"if={tmp_path}/random", f"of={file}", *words)
        run("cmp", "-n", MIB, "-i", f"0:{200 << 16}", tmp_path / "random", file)
        run("fallocate", "-p", "-o", 201 << 16, "-l", 64 << 10, file)
        with file.open("rb") as opened:
            opened.seek(201 << 16)
            assert opened.read(64 << 10) == bytes(64 << 10)
            assert os.lseek(opened.fileno(), 200 << 16, os.SEEK_HOLE) == 201 << 16
            assert os.lseek(opened.fileno(), 201 << 16, os.SEEK_DATA) == 202 << 16
        facts = file.stat()
        assert facts.st_size == 16 * MIB and facts.st_blocks * 512 < 4 * MIB
        run("truncate", "-s", "1M", file, status=1)
        assert "identical" in run(
            "qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", file, image
        )
        # Somebody has it open: they are told, and nothing waits for them.
        opened = os.open(file, os.O_RDONLY)
        os.kill(process, signal.SIGTERM)
        ended(process)
        with pytest.raises(OSError):
            os.pread(opened, 4096, 8 * MIB)
        with suppress(OSError):
            os.close(opened)
        assert file.stat().st_size == 0
    clean(image)


@needs_peers
def test_times_and_whole_files(tmp_path: Path) -> None:
    """What ``touch``, ``cp -p`` and ``tar`` set is there; what they leave alone is as it was."""
    image, source = create(tmp_path, MIB), tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    os.utime(source, ns=(1_500_000_000_000_000_001, 1_600_000_000_000_000_002))

    def times(file: Path) -> tuple[int, int]:
        facts = file.stat()
        return facts.st_atime_ns, facts.st_mtime_ns

    with mounted(tmp_path) as (file, _):
        run("touch", "-d", "2001-02-03 04:05:06.789", file)
        assert len(set(times(file))) == 1
        run("touch", "-a", file)
        accessed, written = times(file)
        assert accessed > 1_700_000_000 * 10**9 > written
        run("touch", "-m", "-d", "2002-02-03", file)
        assert times(file)[0] == accessed and times(file)[1] > written
        # A fixed length is a block device's: what is behind the end of the copy stays.
        with file.open("r+b") as opened:
            opened.seek(200_000)
            opened.write(b"behind it")
        run("cp", "-p", source, file)
        assert times(file)[1] == times(source)[1]
        content = file.read_bytes()
        assert content[:100_000] == source.read_bytes() and b"behind it" in content
        assert len(content) == MIB and file.stat().st_ctime > 1_700_000_000
    with mounted(tmp_path, "--growable") as (file, _):
        (tmp_path / "there").mkdir()
        source.rename(tmp_path / "there" / "file")
        run("tar", "-C", tmp_path / "there", "-cf", tmp_path / "tar", "file")
        run("tar", "-C", tmp_path, "--overwrite", "-xf", tmp_path / "tar")
        source = tmp_path / "there" / "file"
        assert times(file)[1] // 10**9 == times(source)[1] // 10**9
        assert file.read_bytes().rstrip(b"\0") == source.read_bytes().rstrip(b"\0")
        file.write_bytes(b"new")
        assert file.read_bytes() == b"new" + bytes(509)
    clean(image)


@needs_peers
def test_growing_and_a_kill(tmp_path: Path) -> None:
    image = create(tmp_path, MIB)
    with mounted(tmp_path, "--growable") as (file, process):
        with file.open("r+b", buffering=0) as opened:
            opened.seek(2 * MIB)
            opened.write(b"x" * 4096)
            os.fsync(opened.fileno())
        assert file.stat().st_size == 2 * MIB + 4096
        os.truncate(file, 3 * MIB)
        with file.open("r+b") as opened:
            os.fsync(opened.fileno())
        os.kill(process, signal.SIGKILL)
        ended(process)
        with pytest.raises(OSError):
            file.open("rb")
    assert file.stat().st_size == 0
    clean(image)
    with mounted(tmp_path, "-r") as (file, process):
        with file.open("rb") as opened:
            opened.seek(2 * MIB)
            assert opened.read() == b"x" * 4096 + bytes(MIB - 4096)
        with pytest.raises(OSError):
            file.open("r+b")
        run("fusermount3", "-u", file)
        ended(process)


@needs_peers
def test_an_export_of_a_daemon(tmp_path: Path) -> None:
    create(tmp_path, MIB)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    with daemon(OURS, tmp_path) as (process, (client,)):
        disk = {"driver": "file", "filename": "disk.qcow2"}
        client.do("blockdev-add", driver="qcow2", node_name="disk", file=disk)

        def refused(**options: Any) -> str:
            words = {"type": "fuse", "id": "e", "node-name": "disk", **options}
            reply = client.send("block-export-add", words)
            return str(reply["error"]["desc"])

        # As qemu-storage-daemon says it.
        assert refused() == "Parameter 'mountpoint' is missing"
        assert refused(mountpoint="c") == "Failed to stat 'c': No such file or directory"
        assert refused(mountpoint="/tmp") == "'/tmp' is not a regular file"
        common = {"type": "fuse", "node_name": "disk", "writable": True}
        client.do("block-export-add", id="a", mountpoint="a", **common)
        again = refused(mountpoint="a")
        assert again == "There already is a FUSE export on 'a'"
        assert "already" in refused(mountpoint="./a")
        client.do("block-export-add", id="b", mountpoint="b", **common)
        for there, here in (("a", "b"), ("b", "a")):  # neither is kept in memory
            with (tmp_path / here).open("r+b") as file:
                file.write(here.encode())
            with (tmp_path / there).open("rb") as file:
                assert file.read(1) == here.encode()
        client.do("block-export-del", id="a")
        assert (tmp_path / "a").stat().st_size == 0
        run("fusermount3", "-u", tmp_path / "b")
        while not client.events or client.events[-1]["data"] != {"id": "b"}:
            client.events.append(client.read())
        assert client.do("query-block-exports") == []
        client.do("block-export-add", id="a", mountpoint="a", **common)
        # It ends with an export that is in use; its folder is what it was.
        assert os.readlink(f"/proc/{process.pid}/cwd") == str(tmp_path)
    assert (tmp_path / "a").stat().st_size == 0
    assert json.loads(run("qemu-img", "check", "--output=json", tmp_path / "disk.qcow2"))
