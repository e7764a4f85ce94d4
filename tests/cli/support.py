"""Running the command line as people do, beside the real tools, and comparing what both did."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from diskwright.cli.main import main

SOURCE = Path(__file__).resolve().parents[2] / "src"

RUNNER = """\
import sys
sys.path.insert(0, {source!r})
from diskwright.cli.main import main
sys.exit(main(sys.argv[1], sys.argv[2:]))
"""


class Result(NamedTuple):
    status: int
    out: bytes
    err: bytes


def environment(policy: str = "trusted") -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "DISKWRIGHT"))}
    env.update(LC_ALL="C", DISKWRIGHT_POLICY=policy, DISKWRIGHT_CONFIG="")
    return env


def command(name: str = "qemu-img") -> list[str]:
    """The program under a called name, without installing it."""
    return [sys.executable, "-c", RUNNER.format(source=str(SOURCE)), name]


def ours(
    *args: str | bytes,
    cwd: Path | str | None = None,
    name: str = "qemu-img",
    policy: str = "trusted",
    prefix: tuple[str, ...] = (),
) -> Result:
    """Run our program: in this process, which saves its start, or behind ``prefix`` in one of its
    own."""
    if not prefix:
        return called(name, [os.fsdecode(word) for word in args], cwd, environment(policy))
    done = subprocess.run(
        [*prefix, *command(name), *args],
        cwd=cwd,
        env=environment(policy),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def called(name: str, words: list[str], cwd: Path | str | None, env: dict[str, str]) -> Result:
    """Call ``main`` in ``cwd`` with standard streams of its own."""
    out, err = io.BytesIO(), io.BytesIO()
    with (
        contextlib.chdir(cwd or os.curdir),
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO())),
        mock.patch.object(sys, "stdout", io.TextIOWrapper(out, write_through=True)),
        mock.patch.object(sys, "stderr", io.TextIOWrapper(err, write_through=True)),
    ):
        status = main(name, words)
        return Result(status, out.getvalue(), err.getvalue())


def real(tool: str, *args: str | bytes, cwd: Path | str | None = None) -> Result:
    done = subprocess.run(
        [Path(tool).name, *args],
        executable=tool,
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def masked(text: bytes) -> bytes:
    """Without what may differ between two runs of one program: how much the file system allocated
    and how long it took."""
    text = re.sub(rb'disk size: .*|"actual-size": \d+', b"disk size", text)
    return re.sub(rb"in [0-9.]+ seconds", b"in N seconds", text)


class Pair:
    """Two copies of one directory: the real tool works in one, ours in the other."""

    def __init__(self, folder: Path, tool: str, origin: Path) -> None:
        self.tool = tool
        self.theirs, self.mine = folder / "theirs", folder / "mine"
        # Holes of the files are part of what is compared: both copies must have the same ones.
        for copy in (self.theirs, self.mine):
            subprocess.run(["cp", "-a", "--sparse=auto", origin, copy], check=True)

    def same(self, *args: str) -> Result:
        """Run a command line in both; everything that it prints must be the same."""
        expected = real(self.tool, *args, cwd=self.theirs)
        found = ours(*args, cwd=self.mine)
        assert b"Traceback" not in found.err, found.err.decode(errors="replace")
        shown = (found.status, masked(found.out), masked(found.err))
        assert shown == (expected.status, masked(expected.out), masked(expected.err)), args
        return found

    def equal(self, name: str, *, allocation: bool = False) -> None:
        """The disk ``name`` has the same content in both copies, and checks clean in ours; with
        ``allocation`` both have as many clusters."""
        told = real(
            self.tool, "compare", str(self.theirs / name), str(self.mine / name), cwd=self.mine
        )
        assert told.status == 0, (name, told)
        checked = [
            real(self.tool, "check", "--output=json", name, cwd=folder)
            for folder in (self.mine, self.theirs)
        ]
        assert checked[0].status in (0, 63), (name, checked)
        if allocation:
            mine, theirs = (re.findall(rb'"allocated-clusters": \d+', c.out) for c in checked)
            assert mine == theirs, name


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are opened from now on."""
    opened: list[str] = []
    real_open, real = io.open, os.open

    def spy(path: Any, *arguments: Any, **named: Any) -> int:
        opened.append(os.fsdecode(path))
        return real(path, *arguments, **named)

    def spy_open(path: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(path, int):
            opened.append(os.fsdecode(path))
        return real_open(path, *arguments, **named)

    monkeypatch.setattr(os, "open", spy)
    monkeypatch.setattr("builtins.open", spy_open)
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {spy})
    return opened
