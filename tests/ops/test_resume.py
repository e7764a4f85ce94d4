"""``convert --resume``: stopped anywhere, by anything, the same command goes on."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.support import command, environment, ours
from diskwright.engine.kernel import Driver
from diskwright.errors import ImageError, UsageError
from diskwright.ops import outputs
from diskwright.ops import resume as resuming
from diskwright.ops.convert import Settings, convert
from diskwright.ops.gates import gate_of
from diskwright.ops.images import ImageSpec
from diskwright.ops.resume import Resumed
from diskwright.protocols.filenode import FileNode

PART = 1 << 18
SIZE = 24 * PART

Convert = Callable[..., list[Resumed]]


class Stop(OSError):
    """What ends a run in the middle."""


@functools.cache
def disk(part: int = PART) -> bytes:
    """Data with a hole, with zeroes inside the data, and bytes that can be compressed."""
    rng = random.Random(1)
    content = bytearray(24 * part)
    content[: 9 * part] = rng.randbytes(9 * part)
    content[3 * part : 3 * part + 70_000] = bytes(70_000)
    content[15 * part : 21 * part] = (rng.randbytes(2048) + bytes(2048)) * (6 * part // 4096)
    return bytes(content)


def stored(path: Path, part: int = PART) -> Path:
    content = disk(part)
    with open(path, "wb") as file:
        for at in range(0, len(content), part):
            if content.count(0, at, at + part) < part:
                file.seek(at)
                file.write(content[at : at + part])
        file.truncate(len(content))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return stored(tmp_path / "source")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """For a program of its own, which copies in larger pieces."""
    return stored(tmp_path / "source", 1 << 20)


@pytest.fixture
def run(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Converts ``source`` to ``out`` in small pieces; ``stop`` ends it after so many bytes."""
    monkeypatch.setattr(outputs, "BUFFER", PART)
    monkeypatch.setattr(outputs, "_PACKED", PART)

    def convert_it(
        fmt: str = "qcow2", stop: int | None = None, read: Any = None, **settings: Any
    ) -> list[Resumed]:
        told: list[Resumed] = []

        def progress(done: int, total: int) -> None:
            if stop is not None and done >= stop:
                raise Stop

        source_spec = ImageSpec(
            "source", read or str(source), None if read else "raw", gate=gate_of("local")
        )
        target = ImageSpec("out", str(tmp_path / "out"), fmt, gate=gate_of("local"))
        driver = Driver()
        try:
            driver.run(
                convert(
                    driver,
                    [source_spec],
                    target,
                    Settings(resume=True, **settings),
                    on_progress=progress,
                    on_resumed=told.append,
                )
            )
        except Stop:
            assert stop is not None
        else:
            assert stop is None
        finally:
            driver.close()
        return told

    return convert_it


def lines(journal: Path) -> list[dict[str, Any]]:
    """What a journal says, read as its documentation has it."""
    found = []
    for line in journal.read_bytes().splitlines(keepends=True):
        mark, _, text = line.partition(b" ")
        if line[-1:] != b"\n" or mark != b"%08x" % zlib.crc32(text[:-1]):
            break
        found.append(json.loads(text))
    return found


def covered(journal: Path) -> int:
    """The bytes that the last whole line covers."""
    return max([line.get("end", 0) for line in lines(journal)], default=0)


def whole(folder: Path, fmt: str) -> None:
    """The target is what it shall be, and nothing is left."""
    told = ours("compare", "-f", "raw", "-F", fmt, "source", "out", cwd=folder)
    assert told.status == 0, told
    assert ours("check", "-f", fmt, "out", cwd=folder).status in (0, 63)
    assert not (folder / "out.resume").exists()


KINDS: dict[str, tuple[str, list[str]]] = {
    "raw": ("raw", []),
    "qcow2": ("qcow2", []),
    "packed": ("qcow2", ["-c"]),
    "any order": ("qcow2", ["-W"]),
    "verify": ("qcow2", ["--resume=verify"]),
    "subclusters": ("qcow2", ["-o", "extended_l2=on"]),
    "preallocated": ("qcow2", ["-o", "preallocation=metadata"]),
    "data file": ("qcow2", ["-o", "data_file=data"]),
    "offloaded": ("raw", ["-C"]),
    "all allocated": ("raw", ["-S", "0"]),
    "vhdx": ("vhdx", []),
    "vmdk": ("vmdk", []),
    "many files": ("vmdk", ["-o", "subformat=twoGbMaxExtentSparse"]),
    "flat": ("vmdk", ["-o", "subformat=monolithicFlat"]),
}
USED = re.compile(rb"Going on with 'out': (\d+) bytes of the disk are used again")


def killed(folder: Path, kind: str, kills: int, seed: int) -> None:
    """Start the command, kill it at a random moment, start it again; one that is done begins
    anew."""
    fmt, options = KINDS[kind]
    words = ["convert", "--resume", "-f", "raw", "-O", fmt, *options, "source", "out"]
    rng = random.Random(seed)
    journal = folder / "out.resume"
    known = 0
    while True:
        slow = ["-r", "8M"] if kills else []
        process = subprocess.Popen(
            [*command("diskwright"), *words[:1], *slow, *words[1:]], cwd=folder,
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        if kills:
            time.sleep(rng.uniform(0.1, 0.9))
            process.kill()
        out, err = process.communicate(timeout=60)
        told = USED.search(out)
        assert told is None or int(told[1]) >= known
        if process.returncode == 0:
            assert told is not None or not known
            whole(folder, fmt)
            if not kills:
                return
            os.unlink(folder / "out")
        else:
            assert process.returncode == -signal.SIGKILL, err
            kills -= 1
        known = covered(journal) if journal.exists() else 0


def test_killed_at_random_moments(tmp_path: Path, large: Path) -> None:
    killed(tmp_path, "qcow2", 4, 7)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_killed_often(tmp_path: Path, large: Path, kind: str) -> None:
    killed(tmp_path, kind, 20, 3)


@pytest.mark.parametrize(
    ("fmt", "settings"),
    [
        ("raw", {}),
        ("raw", {"sparse": 0}),
        ("raw", {"offload": True}),
        ("qcow2", {"compress": True}),
        ("qcow2", {"in_order": False}),
        ("qcow2", {"verify": True}),
        ("qcow2", {"options": {"preallocation": "metadata"}}),
        ("qcow2", {"options": {"extended_l2": "on"}}),
        ("vhdx", {}),
        ("vmdk", {}),
        ("vmdk", {"options": {"subformat": "twoGbMaxExtentSparse"}}),
    ],
)
def test_what_was_copied_is_used_again(
    tmp_path: Path, run: Convert, fmt: str, settings: dict[str, Any]
) -> None:
    for stop in (4 * PART, 12 * PART):
        run(fmt, stop, **settings)
    end = covered(tmp_path / "out.resume")
    assert 4 * PART <= end < SIZE
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        count_reads(patch, str(tmp_path / "source"), read)
        (told,) = run(fmt, **settings)
    assert told.offset >= end and 0 < told.data <= told.offset and not told.finished
    if not settings.get("verify") and not settings.get("offload"):
        assert sum(read) <= SIZE - end
    whole(tmp_path, fmt)
    assert [found.finished for found in run(fmt, **settings)] == [True]


def count_reads(patch: pytest.MonkeyPatch, path: str, read: list[int]) -> None:
    before = FileNode.read

    async def counted(self: FileNode, offsets: Any, lengths: Any, into: Any = None) -> Any:
        if self.filename == path:
            read.extend(lengths)
        return await before(self, offsets, lengths, into)

    patch.setattr(FileNode, "read", counted)


@pytest.mark.parametrize(
    ("fmt", "in_order"), [("raw", True), ("qcow2", True), ("qcow2", False), ("vhdx", True)]
)
def test_a_line_is_written_after_a_flush_of_what_it_covers(
    tmp_path: Path, run: Convert, monkeypatch: pytest.MonkeyPatch, fmt: str, in_order: bool
) -> None:
    """As it would be after a loss of power: of the target there is what had been written when the
    last sync began."""
    monkeypatch.setattr(resuming, "_SOONEST", 0)
    monkeypatch.setattr(resuming, "_LONGEST", 0)
    target, durable = str(tmp_path / "out"), str(tmp_path / "durable")
    sync, covers = FileNode._sync_file, resuming.Journal.covers
    seen: list[int] = []

    def synced(self: FileNode, fd: int, new: bool) -> None:
        if self.filename == target:
            shutil.copyfile(target, durable)
        sync(self, fd, new)

    async def line(self: resuming.Journal, what: resuming.Covered) -> None:
        shutil.copyfile(durable, tmp_path / f"at {what.end}")
        seen.append(what.end)
        await covers(self, what)

    monkeypatch.setattr(FileNode, "_sync_file", synced)
    monkeypatch.setattr(resuming.Journal, "covers", line)
    run(fmt, in_order=in_order, rate=16 << 20)
    assert len(seen) > (0 if fmt == "vhdx" else 1)
    content = disk()
    for end in seen:
        name = f"at {end}"
        done = ours("convert", "-f", fmt, "-O", "raw", name, "raw", cwd=tmp_path)
        assert done.status == 0, done
        assert (tmp_path / "raw").read_bytes()[:end] == content[:end]
        os.unlink(tmp_path / name)


def test_a_read_error_and_a_full_disk_leave_what_was_done(
    tmp_path: Path, run: Convert, source: Path
) -> None:
    config = tmp_path / "config"
    config.write_text('[inject-error]\nevent = "none"\nsector = "8000"\n')
    words = ("convert", "--resume", "-O", "qcow2")
    done = ours(*words, "-f", "raw", f"blkdebug:{config}:{source}", "out", cwd=tmp_path)
    assert done.status == 1 and b"error while reading" in done.err, done
    assert b"run the command again to go on" in done.err
    limit = ("prlimit", f"--fsize={12 * PART}")
    done = ours("convert", "--resume", "-f", "raw", "-O", "qcow2", "source", "out", cwd=tmp_path,
                prefix=limit)  # fmt: skip
    assert done.status != 0
    (told,) = run()
    assert told.offset >= 8 * PART
    whole(tmp_path, "qcow2")


def test_a_journal_that_was_cut_anywhere(tmp_path: Path, run: Convert) -> None:
    run(stop=4 * PART)
    run(stop=8 * PART)
    journal, out = tmp_path / "out.resume", tmp_path / "out"
    text = journal.read_bytes()
    image = out.read_bytes()
    made = len(b"".join(text.splitlines(keepends=True)[:2]))
    last = len(text.rstrip(b"\n").rpartition(b"\n")[0]) + 1
    for length in (0, 5, 30, made - 1, made, made + 3, last, len(text) - 1, len(text)):
        with open(out, "r+b") as file:  # it stays the same file
            file.truncate(0)
            file.write(image)
        for tail in (b"", bytes(40), b"\xff" * 300 + b"\n"):
            if length < 100 and tail[:1] == b"\xff":
                continue
            journal.write_bytes(text[:length] + tail)
            end = covered(journal)
            if not length:
                with pytest.raises(UsageError, match="made by something else"):
                    run(stop=16 * PART)
                continue
            found = [] if length < made else [end]
            if length > 100:
                assert [told.offset for told in run(stop=0 if length >= made else PART)] == found
    run()
    whole(tmp_path, "qcow2")


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, run: Convert) -> None:
    for content in (b"notes of mine\n", b"x" * 5000):
        (tmp_path / "out.resume").write_bytes(content)
        with pytest.raises(ImageError, match="no journal"):
            run()
        assert ours("convert", "-O", "qcow2", "source", "out", cwd=tmp_path).status == 0
        assert (tmp_path / "out.resume").read_bytes() == content
        os.unlink(tmp_path / "out")


def test_a_journal_goes_when_its_target_is_made_anew(tmp_path: Path, run: Convert) -> None:
    run(stop=8 * PART)
    assert (tmp_path / "out.resume").exists()
    assert ours("create", "-f", "qcow2", "out", "1M", cwd=tmp_path).status == 0
    assert not (tmp_path / "out.resume").exists()
    with pytest.raises(UsageError, match="another disk than the source"):
        run()


def changed_time(path: Path) -> None:
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def changed_size(path: Path) -> None:
    facts = path.stat()
    with open(path, "ab") as file:
        file.write(b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def changed_inode(path: Path) -> None:
    shutil.copy2(path, f"{path}.copy")
    os.rename(f"{path}.copy", path)


@pytest.mark.parametrize("layer", ["base", "middle", "top"])
@pytest.mark.parametrize("change", [changed_time, changed_size, changed_inode])
def test_a_layer_that_changed_is_noticed(
    tmp_path: Path, source: Path, run: Convert, layer: str, change: Callable[[Path], None]
) -> None:
    os.rename(source, tmp_path / "base")
    for name, below, fmt in (("middle", "base", "raw"), ("top", "middle", "qcow2")):
        done = ours("create", "-f", "qcow2", "-b", below, "-F", fmt, name, cwd=tmp_path)
        assert done.status == 0
    top = str(tmp_path / "top")
    read = {"driver": "qcow2", "file": {"driver": "file", "filename": top}}
    run(stop=8 * PART, read=read)
    before = (tmp_path / "out").read_bytes(), (tmp_path / "out.resume").read_bytes()
    change(tmp_path / layer)
    with pytest.raises(UsageError, match=f"{layer}' has changed since .* was begun"):
        run(read=read)
    assert before == ((tmp_path / "out").read_bytes(), (tmp_path / "out.resume").read_bytes())


def test_verify_reads_what_the_source_holds(tmp_path: Path, source: Path, run: Convert) -> None:
    run(stop=8 * PART, verify=True)
    changed_time(source)
    changed_inode(source)
    run(stop=16 * PART, verify=True)
    with open(source, "r+b") as file:
        file.seek(5 * PART + 1)
        file.write(b"another")
    with pytest.raises(UsageError, match="source has changed"):
        run(verify=True)
    with open(source, "r+b") as file:
        file.seek(5 * PART)
        file.write(disk()[5 * PART : 5 * PART + 100])
        file.seek(20 * PART)  # behind what was copied: the new bytes are what counts
        file.write(bytes(PART))
    run(verify=True)
    whole(tmp_path, "qcow2")


def test_a_source_without_a_time_needs_verify(tmp_path: Path, run: Convert) -> None:
    read = {"driver": "null-co", "size": 4 * PART, "read-zeroes": True}
    with pytest.raises(UsageError, match="use --resume=verify"):
        run(read=read)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.resume").exists()
    assert run(read=read, verify=True) == []
    assert [told.finished for told in run(read=read, verify=True)] == [True]
    os.utime(tmp_path / "source", ns=(0, 0))
    with pytest.raises(UsageError, match="use --resume=verify"):
        run()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-O", "vmdk", "-o", "subformat=streamOptimized"], b"written in one pass"),
        (["-O", "qcow2", "-n"], b"cannot be used with -n"),
        (["-O", "qcow2", "-t", "unsafe"], b"is flushed"),
        (["-O", "qcow2", "--bitmaps"], b"bitmap"),
        (["-O", "qcow2", "--resume=verify", "-B", "source", "-F", "raw"], b"overlays"),
    ],
)
def test_what_is_refused_writes_nothing(
    tmp_path: Path, source: Path, words: list[str], text: bytes
) -> None:
    done = ours("convert", "--resume", "-f", "raw", *words, "source", "out", cwd=tmp_path)
    assert done.status == 1 and text in done.err, done
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_another_command_or_target_is_refused(tmp_path: Path, source: Path, run: Convert) -> None:
    run(stop=8 * PART)
    for settings in ({"compress": True}, {"options": {"compat": "0.10"}}, {"verify": True}):
        with pytest.raises(UsageError, match="was begun with another"):
            run(**settings)
    with pytest.raises(UsageError, match=r"another format \(qcow2, not raw\)"):
        run("raw")
    changed_inode(tmp_path / "out")
    with pytest.raises(UsageError, match="another file than the one that was begun"):
        run()
    os.unlink(tmp_path / "out")  # then there is nothing to lose
    assert run() == []
    whole(tmp_path, "qcow2")


def test_an_overlay_keeps_its_holes(tmp_path: Path, source: Path, run: Convert) -> None:
    os.rename(source, tmp_path / "base")
    words = ("create", "-f", "qcow2", "-b", "base", "-F", "raw", "source")
    assert ours(*words, cwd=tmp_path).status == 0
    for at in (1, 9, 20):
        ours(
            "-f",
            "qcow2",
            "-c",
            f"write -P {at} {at * PART} {2 * PART}",
            "source",
            cwd=tmp_path,
            name="qemu-io",
        )
    options = {"backing_file": "base", "backing_fmt": "raw"}
    read = {"driver": "qcow2", "file": {"driver": "file", "filename": str(source)}}
    for compress in (False, True):
        run(stop=4 * PART, read=read, options=options, compress=compress)
        (told,) = run(read=read, options=options, compress=compress)
        assert told.data >= 2 * PART
        assert ours("compare", "source", "out", cwd=tmp_path).status == 0
        allocated = json.loads(ours("map", "--output=json", "out", cwd=tmp_path).out)
        assert sum(part["length"] for part in allocated if part["depth"] == 0) == 6 * PART
        os.unlink(tmp_path / "out")


def test_two_at_once_are_refused(tmp_path: Path, large: Path) -> None:
    words = ["convert", "--resume", "-f", "raw", "-O", "qcow2", "source", "out"]
    process = subprocess.Popen(
        [*command("diskwright"), *words[:1], "-r", "10M", *words[1:]], cwd=tmp_path,
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        while not (tmp_path / "out.resume").exists() or not covered(tmp_path / "out.resume"):
            assert process.poll() is None
            time.sleep(0.02)
        done = ours(*words, cwd=tmp_path)
        assert done.status == 1 and b"another program is converting to" in done.err
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(
        rb" +\([0-9.]+/100%\)\n"
        rb"diskwright: interrupted: 'out' is a valid image, but not complete; "
        rb"run the command again to go on\n",
        err,
    ), err
    done = ours(*words, cwd=tmp_path)
    assert done.status == 0 and USED.search(done.out)
    whole(tmp_path, "qcow2")
    done = ours(*words, cwd=tmp_path)
    assert done.status == 0 and b"'out' is complete" in done.out


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("tool", ["ours", "theirs"])
def test_sigusr1_reports_once(
    tmp_path: Path, large: Path, peer: Callable[[str], str], tool: str
) -> None:
    program = command() if tool == "ours" else [peer("qemu-img")]
    process = subprocess.Popen(
        [*program, "convert", "-r", "20M", "-f", "raw", "-O", "raw", "source", "out"],
        cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (tmp_path / "out").exists() or not os.stat(tmp_path / "out").st_blocks:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out
    assert re.fullmatch(rb"    \([0-9.]+/100%\)\n", err), err


def test_killed_twice_while_it_makes_the_target(
    tmp_path: Path, run: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment the target is there and the journal says nothing."""
    journal = tmp_path / "out.resume"
    run(stop=4 * PART)
    first = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(first)  # as it was while the target was made
    writes = FileNode.write

    async def write(self: FileNode, *more: Any) -> None:
        if self.filename == str(journal):
            raise Stop
        await writes(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(FileNode, "write", write)
        run(stop=0)
    assert journal.read_bytes() == first
    run(stop=4 * PART)
    said, covered_before = [sorted(line)[0] for line in lines(journal)], covered(journal)
    assert said[:3] == ["conversion", "conversion", "target"]
    (told,) = run()
    assert told.offset == covered_before > 0
    whole(tmp_path, "qcow2")
