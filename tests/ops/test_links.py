"""Overlays that record the identity of what they lie over: commit and rebase keep it right."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import Result, ours
from diskwright.ops import commit as ops

MIB = 1 << 20
FORMATS = ("vhdx", "vmdk")


class Bench:
    """Images of one format in a folder."""

    def __init__(self, folder: Path, fmt: str) -> None:
        self.folder, self.fmt = folder, fmt

    def run(self, *words: str, status: int = 0, name: str = "qemu-img") -> Result:
        done = ours(*words, cwd=self.folder, name=name)
        assert b"Traceback" not in done.err
        assert done.status == status, done.err.decode()
        return done

    def make(self, name: str, over: str | None = None) -> None:
        if over is None:
            self.run("create", "-q", "-f", self.fmt, name, "8M")
        else:
            self.run("create", "-q", "-f", self.fmt, "-b", over, "-F", self.fmt, name)

    def write(self, name: str, *places: tuple[int, int]) -> None:
        """Fill the MiB at each place with a byte."""
        words = [f"-c write -P {byte} {place}M 1M".split(" ", 1) for place, byte in places]
        self.run(*(part for word in words for part in word), name, name="qemu-io")

    def reads(self, name: str) -> list[int]:
        """The first byte of every MiB, which are all the same within one."""
        with diskwright.open(self.folder / name, policy="trusted") as disk:
            data = disk.read_at(0, disk.size)
        for start in range(0, len(data), MIB):
            assert len(set(data[start : start + MIB])) == 1, (name, start)
        return list(data[::MIB])

    def format_of(self, name: str) -> Any:
        with diskwright.open(self.folder / name, backing=False) as disk:
            node: Any = disk.node
            return node.format

    def linked(self, child: str, parent: str) -> None:
        assert self.format_of(child).parent_identity == self.format_of(parent).identity is not None

    def refuses(self, name: str) -> bytes:
        done = self.run("map", name, status=1)
        assert b"rebase -u" in done.err
        return done.err


@pytest.fixture(params=FORMATS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    bench = Bench(tmp_path, request.param)
    bench.make("base")
    bench.write("base", (0, 1), (1, 1), (2, 1))
    bench.make("mid", "base")
    bench.write("mid", (1, 2), (3, 2))
    bench.make("top", "mid")
    bench.write("top", (2, 3), (3, 3), (7, 3))
    return bench


TOP = [1, 2, 3, 3, 0, 0, 0, 3]
MID = [1, 2, 1, 2, 0, 0, 0, 0]


def test_a_chain_reads_as_it_should(bench: Bench) -> None:
    assert bench.reads("top") == TOP
    assert bench.reads("mid") == MID
    bench.linked("top", "mid")
    bench.linked("mid", "base")


@pytest.mark.parametrize("keep", [False, True])
def test_commit_into_the_backing_file(bench: Bench, keep: bool) -> None:
    before = bench.format_of("mid").identity
    bench.run("commit", *(["-d"] if keep else []), "top")
    assert bench.format_of("mid").identity != before
    bench.linked("top", "mid")
    bench.linked("mid", "base")
    assert bench.reads("top") == bench.reads("mid") == TOP
    # And once more: the child is as usable as before.
    bench.write("top", (4, 9))
    bench.run("commit", "top")
    assert bench.reads("mid")[4] == 9


def test_commit_into_a_deeper_layer(bench: Bench) -> None:
    bench.make("other", "base")
    bench.run("commit", "-b", "base", "top")
    bench.linked("mid", "base")
    bench.linked("top", "mid")
    assert bench.reads("top") == bench.reads("base") == TOP
    bench.refuses("other")


def test_a_crash_before_the_identity_is_recorded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut behind the last write to the base leaves."""

    async def nothing(self: Any) -> None:
        return None

    with monkeypatch.context() as patched:
        patched.setattr(ops._Link, "renew", nothing)
        bench.run("commit", "-d", "top")
    bench.refuses("top")
    bench.run("rebase", "-u", "-b", "mid", "-F", bench.fmt, "top")
    assert bench.reads("top") == TOP
    bench.run("commit", "top")
    assert bench.reads("mid") == TOP


def test_an_interrupted_commit_can_be_done_again(bench: Bench) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        done = bench.run("commit", "-r", "1M", "top", status=130)
    finally:
        timer.join()
    assert b"run the command again" in done.err
    assert bench.reads("top") == TOP
    bench.run("commit", "top")
    assert bench.reads("mid") == bench.reads("top") == TOP


def test_rebase(bench: Bench) -> None:
    bench.run("rebase", "-b", "base", "-F", bench.fmt, "top")
    bench.linked("top", "base")
    assert bench.reads("top") == TOP
    bench.run("rebase", "-b", "", "top")
    assert bench.format_of("top").parent_identity is None
    os.unlink(bench.folder / "base")
    assert bench.reads("top") == TOP


def test_rebase_by_name_alone(bench: Bench) -> None:
    os.unlink(bench.folder / "base")  # what the new backing file lies over is not looked at
    bench.make("new")
    bench.run("rebase", "-u", "-b", "new", "-F", bench.fmt, "mid")
    bench.linked("mid", "new")
    assert bench.reads("mid") == [0, 2, 0, 2, 0, 0, 0, 0]
    bench.run("rebase", "-u", "-b", "mid", "-F", bench.fmt, "top")
    bench.linked("top", "mid")


def test_rebase_onto_what_is_not_there(bench: Bench) -> None:
    before = bench.format_of("top").parent_identity
    done = bench.run("rebase", "-u", "-b", "later", "-F", bench.fmt, "top")
    assert b"warning: Could not open new backing file 'later'" in done.err
    assert b"the identity recorded of the old one stays" in done.err
    assert bench.format_of("top").parent_identity == before
    os.rename(bench.folder / "mid", bench.folder / "later")
    assert bench.reads("top") == TOP


def test_a_parent_that_was_written_to_is_noticed(bench: Bench) -> None:
    bench.write("base", (5, 8))
    said = bench.refuses("mid")
    assert b"base" in said
    bench.run("info", "mid")
    bench.refuses("top")


def test_grown_by_a_commit(bench: Bench) -> None:
    bench.run("resize", "top", "12M")
    bench.write("top", (11, 4))
    bench.run("commit", "top")
    bench.linked("top", "mid")
    assert bench.reads("mid") == bench.reads("top") == [*TOP, 0, 0, 0, 4]


def test_the_chain_is_told(bench: Bench) -> None:
    import json

    told = json.loads(bench.run("info", "--backing-chain", "--output=json", "top").out)
    assert [entry["filename"] for entry in told] == ["top", "mid", "base"]
    assert [entry.get("backing-filename-format") for entry in told] == [bench.fmt, bench.fmt, None]
    human = bench.run("info", "--backing-chain", "top").out.decode()
    assert human.count(f"file format: {bench.fmt}\n") == 5
    assert human.count("image: ") == 3


@pytest.mark.parametrize("fmt", ["vhdx"])
def test_parent_is_another_name(tmp_path: Path, fmt: str) -> None:
    bench = Bench(tmp_path, fmt)
    bench.make("base")
    bench.run("create", "-q", "-f", fmt, "-o", "parent=base", "child")
    bench.linked("child", "base")
    bench.run("create", "-f", fmt, "-o", "parent=base", "-b", "base", "-F", fmt, "x", status=1)
