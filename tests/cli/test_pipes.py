"""``convert`` through pipes, into several targets, and with digests: beside the real tools."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import SOURCE, environment, ours

MIB = 1 << 20
SIZE = 6 * MIB + 512
ENV = {**environment(), "PYTHONPATH": str(SOURCE)}
DW = [sys.executable, "-m", "diskwright"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[bytes]:
    """Run ``script``, in which ``dw`` is our program."""
    quoted = " ".join(DW)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"dw() {{ {quoted} \"$@\"; }}; {script}"],
        cwd=cwd, capture_output=True, timeout=60, env=ENV,
    )  # fmt: skip


def content(seed: int = 1) -> bytes:
    chance = random.Random(seed)
    data = bytearray(SIZE)
    for at in (0, 70_000, 3 * MIB - 5, SIZE - 600):
        data[at : at + 300_000] = chance.randbytes(min(300_000, SIZE - at))
    return bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a.raw``, ``a.raw.gz`` and ``a.qcow2`` of one content."""
    found = tmp_path_factory.mktemp("pipes")
    (found / "a.raw").write_bytes(content())
    (found / "a.raw.gz").write_bytes(gzip.compress(content(), 1))
    diskwright.convert(found / "a.raw", found / "a.qcow2", target_format="qcow2", format="raw")
    return found


def reads(path: Path, fmt: str) -> bytes:
    """The disk as qemu-img reads it, where it is there."""
    if shutil.which("qemu-img"):
        raw = path.with_name(path.name + ".read")
        command = ["qemu-img", "convert", "-f", fmt, "-O", "raw", str(path), str(raw)]
        subprocess.run(command, check=True)
        return raw.read_bytes()
    with diskwright.open(path, format=fmt) as disk:
        return disk.read_at(0, disk.size)


@pytest.mark.parametrize(
    ("options", "fmt", "spooled"),
    [
        ("", "raw", False),
        ("", "qcow2", False),
        ("-c", "qcow2", False),
        ("-S 0", "qcow2", False),
        (f"--size {SIZE}", "vhdx", False),
        (f"--size {SIZE} -o subformat=streamOptimized", "vmdk", False),
        ("", "vhdx", True),
        ("-o preallocation=metadata", "qcow2", True),
    ],
)
def test_a_raw_disk_comes_in(
    folder: Path, tmp_path: Path, options: str, fmt: str, spooled: bool
) -> None:
    target = tmp_path / "b"
    found = shell(
        f"zcat a.raw.gz | TMPDIR={tmp_path} dw convert -f raw -O {fmt} {options} - {target}", folder
    )
    assert found.returncode == 0, found.stderr
    assert (b"is not known" in found.stderr) is spooled, found.stderr
    assert reads(target, fmt) == content()
    assert not list(tmp_path.glob("diskwright-*"))
    if fmt == "qcow2" and shutil.which("qemu-img"):
        subprocess.run(["qemu-img", "check", "-q", target], check=True)


@pytest.mark.parametrize(
    ("options", "fmt", "spooled"),
    [
        ("", "raw", False),
        ("", "qcow2", False),
        ("-c --digest", "qcow2", False),
        ("-S 0", "qcow2", True),
        ("-o subformat=streamOptimized", "vmdk", False),
    ],
)
def test_a_disk_goes_out(
    folder: Path, tmp_path: Path, options: str, fmt: str, spooled: bool
) -> None:
    target = tmp_path / "b"
    found = shell(f"dw convert -O {fmt} {options} a.qcow2 - | gzip -1 | zcat > {target}", folder)
    assert found.returncode == 0, found.stderr
    assert (b"meanwhile" in found.stderr) is spooled
    assert reads(target, fmt) == content()


def test_from_pipe_to_pipe_and_from_files(folder: Path, tmp_path: Path) -> None:
    wanted = hashlib.sha256(content()).hexdigest()
    for script in (
        "cat a.raw | dw convert -f raw - - | sha256sum",
        "dw convert - - < a.qcow2 | sha256sum",
        "cat a.qcow2 | dw convert -f qcow2 - - 2>/dev/null | sha256sum",
        "(dd bs=4096 count=1; dw convert -f raw - -) < a.raw 2>/dev/null | sha256sum",
        f"dw convert a.qcow2 - > {tmp_path}/c; sha256sum < {tmp_path}/c",
    ):
        assert shell(script, folder).stdout.split()[0].decode() == wanted, script


@pytest.mark.parametrize("wrong", [SIZE - 512, SIZE + 512, 0])
def test_another_size_than_was_said_names_both(folder: Path, tmp_path: Path, wrong: int) -> None:
    target = tmp_path / "b"
    found = shell(f"cat a.raw | dw convert -f raw --size {wrong} -O qcow2 - {target}", folder)
    assert found.returncode == 1
    assert str(wrong) in found.stderr.decode()
    if wrong > SIZE:
        assert str(SIZE) in found.stderr.decode()
    assert not target.exists()


def test_what_is_refused(folder: Path) -> None:
    for script, words in (
        ("cat a.raw | dw convert - b", b"-f raw"),
        ("dw convert -n -O raw a.raw - | cat", b"Nothing can be written into"),
        ("dw convert -O vmdk -o subformat=monolithicFlat a.raw - | cat", b"several files"),
        ("dw convert -f raw - b < /dev/ptmx", b"terminal"),
    ):
        found = shell(script, folder)
        assert found.returncode == 1 and words in found.stderr, (script, found.stderr)
    for line, words in (
        ("--size 1M a.raw b", b"standard input"),
        ("--also raw a.raw b", b"FORMAT:FILE"),
        ("--also nope:c a.raw b", b"Unknown file format 'nope'"),
        ("--also raw:./b a.raw b", b"target twice"),
        ("--also raw:c -O qcow2 -B a.raw -F raw a.qcow2 b", b"an overlay"),
        ("-C --digest -- a.raw b", b"copy offloading"),
    ):
        told = ours("convert", *line.split(), cwd=folder)
        assert told.status == 1 and words in told.err, (line, told.err)
    assert not (folder / "b").exists() and not (folder / "c").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [("a.raw", "only be the only source"), ("-O qcow2 -B a.raw -F raw", "layer")],
)
def test_what_a_raw_disk_in_a_pipe_is_not(folder: Path, options: str, words: str) -> None:
    found = shell(f"cat a.raw | dw convert -f raw {options} - b", folder)
    assert found.returncode == 1 and words in found.stderr.decode()
    assert not (folder / "b").exists()


def test_a_reader_that_goes_away_is_an_error(folder: Path) -> None:
    for fmt in ("raw", "qcow2", "vmdk -o subformat=streamOptimized"):
        found = shell(
            f"(dw convert -S 0 -O {fmt} a.raw -; echo $? >&2) | head -c 100 >/dev/null", folder
        )
        lines = found.stderr.decode().splitlines()
        assert lines[-1] == "1" and "standard output" in lines[-2], lines
        assert lines[-2].endswith("Broken pipe"), lines


def test_existing_targets_must_be_large_enough(folder: Path, tmp_path: Path) -> None:
    for extra, status in ((0, 0), (-512, 1)):
        target = tmp_path / f"b{extra}"
        target.write_bytes(b"\xff" * (SIZE + extra))
        found = shell(f"cat a.raw | dw convert -f raw -n -O raw - {target}", folder)
        assert found.returncode == status, found.stderr
        if not status:
            assert target.read_bytes() == content()


@pytest.mark.parametrize("where", ["in", "out"])
def test_an_interrupt_ends_the_wait_for_the_other_end(
    folder: Path, tmp_path: Path, where: str
) -> None:
    ends = os.pipe()
    words = ["convert", "-f", "raw", "-", "b"] if where == "in" else ["convert", "a.raw", "-"]
    std: dict[str, Any] = {"stdin": ends[0]} if where == "in" else {"stdout": ends[1]}
    (tmp_path / "a.raw").write_bytes(content() * 2)
    with subprocess.Popen(
        [*DW, *words], cwd=tmp_path, stderr=subprocess.PIPE, env=ENV, **std
    ) as process:
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    for end in ends:
        os.close(end)
    assert process.returncode == 130 and b"interrupted" in err


def test_several_targets_and_digests_by_one_reading(folder: Path, tmp_path: Path) -> None:
    further = [("qcow2", "b"), ("vhdx", "c"), ("vmdk", "d")]
    also = [word for fmt, name in further for word in ("--also", f"{fmt}:{name}")]
    shutil.copy(folder / "a.qcow2", tmp_path / "a")
    words = ["-O", "raw", *also, "--digest", "--digest=tree", "--digest=md5", "a", "r"]
    found = ours("convert", *words, cwd=tmp_path)
    assert found.status == 0, found.err
    assert (tmp_path / "r").read_bytes() == content()
    for fmt, name in further:
        assert reads(tmp_path / name, fmt) == content()
    told = ours("digest", "-a", "sha256", "-a", "tree", "-a", "md5", "r", cwd=tmp_path, name="dw")
    assert found.out == told.out
    assert found.out.split()[0].decode() == hashlib.sha256(content()).hexdigest()


def test_digests_go_where_the_disk_does_not(folder: Path, tmp_path: Path) -> None:
    wanted = hashlib.sha256(content()).hexdigest()
    found = shell("dw convert --digest=sha256 a.qcow2 -", folder)
    assert found.stdout == content() and found.stderr.decode() == f"{wanted}  -\n"
    found = shell("dw convert -p --digest=sha256 a.qcow2 -", folder)
    assert found.stdout == content() and b"(100.00/100%)" in found.stderr
    found = shell(f"dw convert --progress json --digest=sha256 a.qcow2 {tmp_path}/b", folder)
    assert json.loads(found.stdout) == {
        "filename": f"{tmp_path}/b", "virtual-size": SIZE, "digests": {"sha256": wanted},
    }  # fmt: skip


def test_digests_of_what_ends_within_a_sector_are_those_of_the_target(tmp_path: Path) -> None:
    found = shell("head -c 1000 /dev/zero | dw convert -f raw --digest=md5 - b; md5sum b", tmp_path)
    ours_, theirs = found.stdout.splitlines()
    assert ours_ == theirs


def test_from_python(folder: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    diskwright.convert(
        folder / "a.qcow2", tmp_path / "b", also={str(tmp_path / "c"): "qcow2"},
        digests=["sha256"], on_digests=told.append,
    )  # fmt: skip
    assert told[0].digests == {"sha256": hashlib.sha256(content()).hexdigest()}
    assert (tmp_path / "b").read_bytes() == content() == reads(tmp_path / "c", "qcow2")


def test_a_further_target_that_fails_fails_all(folder: Path, tmp_path: Path) -> None:
    for also, words in (("raw:/dev/full", b"'/dev/full'"), ("raw:none/c", b"none/c")):
        found = shell(f"dw convert --also {also} a.raw {tmp_path}/b", folder)
        assert found.returncode == 1 and words in found.stderr, found.stderr
        assert not (tmp_path / "b").exists()


@pytest.mark.long
def test_memory_is_bounded(tmp_path: Path) -> None:
    script = (
        "head -c 2G /dev/zero | tr '\\0' x |"
        " dw convert -f raw --also qcow2:c --digest=tree -O qcow2 - b; rm -f b c"
    )
    assert shell(script, tmp_path).returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 150 << 10
