"""The io language by itself: a session fed line by line, and the command around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diskwright.engine.kernel import Deadlock, Driver
from diskwright.graph.gate import Gate
from diskwright.ops import io_transfer
from diskwright.ops.io import COMMANDS, Session
from diskwright.ops.io_disk import Opened
from diskwright.ops.io_text import (
    Complaint,
    Transfer,
    clock_text,
    cvtnum,
    dump,
    getopt,
    integer,
    size_text,
)

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "DISKWRIGHT_POLICY": "untrusted"}
OURS = [sys.executable, "-m", "diskwright", "io"]


class Talk:
    """A session and what it said."""

    def __init__(self, path: Path, *, name: str = "", format: str = "raw") -> None:
        self.driver = Driver()
        self.said: list[tuple[str, str]] = []
        self.session = Session(self.driver, lambda t, s: self.said.append((s, t)), Gate())
        opened = Opened(name or str(path), name or str(path))
        opened.format = format
        self.driver.run(self.session.open(opened))

    def do(self, *lines: str) -> list[bool]:
        return [self.driver.run(self.session.execute(line)) for line in lines]

    def heard(self) -> list[str]:
        said, self.said = self.said, []
        return [text for _, text in said]

    def close(self) -> bool:
        done = self.driver.run(self.session.close())
        self.driver.close()
        return done


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    return path


def test_every_command_has_a_handler() -> None:
    from importlib import import_module

    for command in COMMANDS.values():
        module = import_module(f"diskwright.ops.{command.where}")
        assert callable(getattr(module, f"run_{command.name}"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1b", 1), ("1k", 1024), ("1.5K", 1536), (".5k", 512), ("1.1k", 1126), ("+5", 5),
     ("010", 10), ("0x1F", 31), ("1e", 1 << 60), ("1.0", 1),
     ("9223372036854775807", (1 << 63) - 1)],
)  # fmt: skip
def test_numbers(text: str, value: int) -> None:
    assert cvtnum(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1kk", "0x", "0x1k", "1s", "1_0", "2.5", "-4k", "9E", "-1", "1e3", "١"]
)
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(Complaint, match="Parsing error"):
        cvtnum(text)


def test_integers_of_any_base() -> None:
    assert [integer(t) for t in ("10", "0x10", "010", "-1", "x", "08", "1_0", "")] == [
        10, 16, 8, -1, None, None, None, None,
    ]  # fmt: skip


def test_flags_and_operands_mix() -> None:
    flags = getopt("read", ["1", "-qP", "5", "2", "--", "-v"], "qvP:")
    assert (flags.operands, flags.values, "q" in flags, "v" in flags) == (
        ["1", "2", "-v"], {"P": "5"}, True, False,
    )  # fmt: skip


def test_sizes_durations_and_dumps() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 1 << 40, 0.5)] == [
        "0 bytes", "1023 bytes", "1 KiB", "1.500 KiB", "1 TiB", "0.500000 bytes",
    ]  # fmt: skip
    assert [clock_text(s) for s in (0.019, 59.99, 61.5, 3723.25)] == [
        "00.01 sec", "59.99 sec", "0:01:01.50", "1:02:03.25",
    ]  # fmt: skip
    assert clock_text(0, fixed=True) == "0:00:00.00"
    assert dump(b"aA0 ~", 30) == ["0000001e:  61 41 30 20 7e  aA0.."]
    assert Transfer("read", 5, 1024, 0.5).lines(True) == "1024,1,0:00:00.50,2048.000,2.000"
    assert Transfer("read", 5, 1024, 0.5).lines(False) == (
        "read 1024/1024 bytes at offset 5\n1 KiB, 1 ops; 00.50 sec (2 KiB/sec and 2.0000 ops/sec)"
    )


def test_streams_of_what_is_said(disk: Path) -> None:
    talk = Talk(disk)
    assert talk.do("foo", "read 2M 1", "truncate -m x 5", "length") == [False, False, False, True]
    assert talk.said == [
        ("err", 'command "foo" not found'),
        ("out", "read failed: Input/output error"),
        ("report", "Invalid preallocation mode 'x'"),
        ("out", "1 MiB"),
    ]
    assert talk.close()


def test_long_requests_are_moved_in_pieces(
    disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(io_transfer, "PIECE", 1008)
    (tmp_path / "letters").write_bytes(b"abcdefg")
    talk = Talk(disk)
    assert all(talk.do(f"write -q -s {tmp_path / 'letters'} 3 5000", "write -q -P 9 6000 2500"))
    data = disk.read_bytes()
    assert data[3:5003] == (b"abcdefg" * 1000)[:5000]
    assert data[6000:8500] == b"\t" * 2500
    assert all(talk.do("read -q -P 9 6000 2500", "read -q -P 9 -s 1500 -l 900 5000 3000"))
    assert talk.heard() == []
    assert talk.do("read -q -P 9 6000 2501") == [False]
    assert talk.heard() == ["Pattern verification failed at offset 6000, 2501 bytes"]
    talk.do("read -v 0 2001")
    assert len(talk.heard()) == 127
    assert talk.close()


def test_started_requests_tell_when_the_commands_wait(disk: Path) -> None:
    talk = Talk(disk)
    assert talk.do("aio_write -P 5 0 64k", "length") == [True, True]
    assert talk.heard() == ["1 MiB"]
    talk.do("aio_flush")
    assert talk.heard()[0].startswith("wrote 65536/65536")
    assert talk.do("aio_read -P 6 0 1") == [True]
    assert talk.close()
    assert talk.heard()[0] == "Pattern verification failed at offset 0, 1 bytes"


def test_closing_lets_stopped_requests_go(disk: Path) -> None:
    talk = Talk(disk, name=f"blkdebug::{disk}")
    talk.do("break write_aio A", "aio_write -P 7 0 512", "wait_break A")
    assert disk.read_bytes()[0] == 0
    assert talk.close()
    assert disk.read_bytes()[0] == 7


def test_waiting_for_a_stopped_request_is_a_deadlock(disk: Path) -> None:
    talk = Talk(disk, name=f"blkdebug::{disk}")
    talk.do("break write_aio A")
    with pytest.raises(Deadlock):
        talk.do("write 0 512")
    talk.session.release()
    assert talk.close()


def test_the_disk_can_change(disk: Path) -> None:
    talk = Talk(disk)
    assert talk.do("reopen -r", "write 0 1", "reopen -w", "write -q 0 1") == [
        True, False, True, True,
    ]  # fmt: skip
    assert talk.do("close", "length", f"open -r -o driver=raw {disk}", "write 0 1", "length") == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert (
        talk.do("reopen -w -c none", "write -q 0 1", "reopen -o size=4096", "length") == [True] * 4
    )
    assert talk.heard()[-1] == "4 KiB"
    assert talk.close()


def command(*arguments: str | Path, lines: str = "", status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [*OURS, *map(str, arguments)], input=lines, capture_output=True, text=True, env=ENV,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == status, done
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_the_command_names_itself(disk: Path) -> None:
    out, err = command("-f", "raw", "-r", "-c", "write 0 1", disk, status=1)
    assert (out, err) == ("", "diskwright: Block node is read-only\n")
    out, err = command("-f", "raw", disk, lines="length\n")
    assert out == "qemu-io> 1 MiB\nqemu-io> "
    assert "aio_flush" in command("-c", "help")[0]
    assert "--cmd COMMAND" in command("--help")[0]


def test_what_is_not_supported_is_refused_by_name(disk: Path) -> None:
    assert "copy-on-read" in command("-C", disk, status=1)[1]
    assert "qom-type" in command("--object", "iothread,id=a", disk, status=1)[1]
    assert "not supported" in command("-f", "raw", "-c", "read -b 0 512", disk, status=1)[0]
    assert "not supported" in command("-f", "raw", "-c", "write -c 0 512", disk, status=1)[0]


def test_a_stop_that_nobody_ends_is_reported(disk: Path) -> None:
    _, err = command(
        "-f", "raw", "-c", "break write_aio A", "-c", "write 0 512", f"blkdebug::{disk}", status=1
    )
    assert "breakpoint" in err


def test_backing_files_need_leave(tmp_path: Path, disk: Path) -> None:
    from diskwright.graph.opener import create_image

    driver = Driver()
    top = tmp_path / "top.qcow2"
    driver.run(
        create_image(
            driver, str(top), "qcow2", 1 << 20, {"backing_file": str(disk), "backing_fmt": "raw"},
            check_backing=False,
        )
    )  # fmt: skip
    driver.close()
    assert "--policy trusted" in command("-c", "read 0 1", top, status=1)[1]
    command("--policy", "trusted", "-c", "read 0 1", top)


def test_requests_go_on_while_input_is_awaited(disk: Path) -> None:
    with subprocess.Popen(
        [*OURS, "-f", "raw", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV
    ) as process:
        assert process.stdin is not None
        process.stdin.write(b"aio_write -P 3 0 512\n")
        process.stdin.flush()
        end = time.monotonic() + 20
        while disk.read_bytes()[0] != 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert disk.read_bytes()[0] == 3
        process.stdin.close()
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"qemu-io> qemu-io> wrote 512/512")
        assert process.wait() == 0


def test_signals_and_crashes(disk: Path) -> None:
    out, _ = command("-f", "raw", "-c", "length", "-c", "sigraise 9", disk, status=-signal.SIGKILL)
    assert out == "1 MiB\n"
    command("-c", "abort", status=-signal.SIGABRT)
    with subprocess.Popen([*OURS, "-c", "sleep 60000"], env=ENV, stderr=subprocess.PIPE) as process:
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_a_closed_pipe_is_quiet(disk: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m diskwright io -f raw -c 'read -v 0 1M' {disk} | head -1",
        shell=True, env=ENV, capture_output=True, timeout=60,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"00000000:")
