"""Standard streams that are closed or full, and what becomes of the images then."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.support import Result, command, environment, real

Peer = Callable[[str], str]
CLOSED = {"in": "<&-", "out": ">&-", "err": "2>&-", "all": "<&- >&- 2>&-"}


def shell(folder: Path, redirect: str, *args: str, name: str = "qemu-img") -> Result:
    """Our program with its streams redirected by the shell."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "bash", *command(name), *args],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def disk(tmp_path: Path, peer: Peer) -> Path:
    real(peer("qemu-img"), "create", "-q", "-f", "qcow2", "x", "1M", cwd=tmp_path)
    return tmp_path


@pytest.mark.parametrize("which", CLOSED)
@pytest.mark.parametrize("verb", ["info x", "check x", "map x", "convert -p -O raw x y"])
def test_closed_streams(disk: Path, which: str, verb: str) -> None:
    assert shell(disk, CLOSED[which], *verb.split()).status == 0


@pytest.mark.parametrize("which", CLOSED)
def test_messages_do_not_reach_an_image_that_is_opened_after_closed_streams(
    disk: Path, peer: Peer, which: str
) -> None:
    words = ["-c", "write -P 3 0 64k", "-c", "read -v 0 512", "-c", "nonsense", "x"]
    shell(disk, CLOSED[which], *words, name="qemu-io")
    assert real(peer("qemu-img"), "check", "-q", "x", cwd=disk).status == 0
    held = real(peer("qemu-io"), "-r", "-c", "read -P 3 0 64k", "x", cwd=disk)
    assert held.status == 0 and b"failed" not in held.out


def test_no_commands_from_a_closed_standard_input(disk: Path) -> None:
    assert shell(disk, "<&-", "x", name="qemu-io").status == 0


def test_a_full_standard_output_is_not_taken_for_a_full_image(disk: Path) -> None:
    found = shell(disk, ">/dev/full", "info", "x")
    assert (found.status, found.err) == (
        1,
        b"qemu-img: standard output: No space left on device\n",
    )


def test_commands_go_on_when_nobody_reads_what_they_say(disk: Path, peer: Peer) -> None:
    words = ["-c", "write 0 64k", "-c", "read -v 0 1M", "-c", "write -P 9 64k 64k", "x"]
    found = shell(disk, "| head -n 1", *words, name="qemu-io")
    assert b"Broken" not in found.err
    held = real(peer("qemu-io"), "-r", "-c", "read -P 9 64k 64k", "x", cwd=disk)
    assert held.status == 0 and b"failed" not in held.out
