"""The program as a process: its names, pipes, signals, limits, names that are not text, and what
it imports."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from cli.support import SOURCE, command, environment, ours, real
from diskwright.cli.output import printable

Peer = Callable[[str], str]
MIB = 1 << 20


@pytest.mark.parametrize("name", ["qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"])
def test_version_under_a_tools_name_is_what_scripts_parse(name: str) -> None:
    text = ours("--version", name=name).out.decode()
    number = "10.0" if name == "qemu-nbd" else "version 10.0"  # as they say it
    assert text.startswith(f"{name} {number}")
    assert f"diskwright {diskwright.__version__}" in text


@pytest.mark.parametrize("name", ["diskwright", "dw"])
def test_version_under_our_own_name(name: str) -> None:
    assert ours("--version", name=name).out == f"diskwright {diskwright.__version__}\n".encode()


def test_a_format_that_is_not_here_is_said_to_be_that() -> None:
    for words in (["create", "-f", "vpc", "new.vhd", "1M"], ["measure", "-O", "vdi", "--size=1M"]):
        found = ours(*words)
        assert found.status == 1
        assert b"' is not supported by this version" in found.err


def test_a_disk_is_mounted_over_a_file_that_is_there(tmp_path: Path) -> None:
    found = ours("mount", "disk.qcow2", "disk.raw", cwd=tmp_path, name="diskwright")
    assert (found.status, found.err.decode()) == (
        1, "diskwright: There is no file 'disk.raw' to mount over: 'touch' it first\n"
    )  # fmt: skip


def test_bytes_of_a_name_that_are_not_text_are_shown_as_bytes() -> None:
    assert printable("b\udcff\x1b\u200b") == "b\\xff\\x1b\\x200b"


@pytest.mark.parametrize("name", ["qemu-img", "diskwright", "dw"])
def test_error_lines_start_with_the_called_name(name: str) -> None:
    found = ours("info", "nonexistent", name=name)
    assert found.status == 1
    assert found.err.decode() == (
        f"{name}: Could not open 'nonexistent': Could not open 'nonexistent': "
        "No such file or directory\n"
    )


VERBS = ("bench", "check", "commit", "compare", "convert", "create", "info", "map", "rebase",
         "resize")  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_takes_a_policy(verb: str) -> None:
    found = ours(verb, "--help")
    assert found.status == 0 and not found.err
    text = found.out.decode()
    assert text.startswith(f"Usage: qemu-img {verb} ")
    assert "--policy" in text
    refused = ours(verb, "--policy", "foo", "a", "b")
    assert refused.status in (1, 2) and b"Traceback" not in refused.err


def test_overview_names_the_verbs() -> None:
    text = ours("--help").out.decode()
    assert all(f"  {verb}" in text for verb in VERBS)
    assert "Supported image formats:" in text
    assert "serve" in ours("--help", name="diskwright").out.decode()


def test_nothing_that_only_an_image_names_is_opened(tmp_path: Path) -> None:
    ours("create", "-q", "-f", "qcow2", "base", "1M", cwd=tmp_path)
    ours("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top", cwd=tmp_path)
    for args in (("map", "top"), ("convert", "top", "new"), ("info", "-b", "top")):
        found = ours(*args, cwd=tmp_path, policy="untrusted")
        assert found.status == 1
        assert b"--policy trusted" in found.err
        verb, *rest = args
        assert ours(verb, "--policy", "trusted", *rest, cwd=tmp_path, policy="").status == 0
    # These look at one image alone.
    for verb in ("info", "check"):
        assert ours(verb, "top", cwd=tmp_path, policy="untrusted").status == 0
    # What was typed is the caller's own.
    found = ours("convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", "base", "over",
                 cwd=tmp_path, policy="untrusted")  # fmt: skip
    assert found.status == 0, found


def test_names_that_are_not_utf8(tmp_path: Path, peer: Peer) -> None:
    name, new = b"\xff\xe9\xc3\xa9.raw", b"\xfe.qcow2"
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(b"x" * 1000)
    for args in (("info",), ("info", "--output=json"), ("map",), ("check",)):
        found = ours(*args, name, cwd=tmp_path)
        expected = real(peer("qemu-img"), *args, name, cwd=tmp_path)
        assert found == expected
    made = ours("convert", "-O", "qcow2", name, new, cwd=tmp_path)
    assert made == (0, b"", b"")
    assert ours("compare", name, new, cwd=tmp_path).out == b"Images are identical.\n"
    over = ours("create", "-f", "qcow2", "-b", name, "-F", "raw", b"over\xff", cwd=tmp_path)
    assert b"backing_file=\xff\xe9\xc3\xa9.raw" in over.out
    assert real(peer("qemu-img"), "compare", b"over\xff", name, cwd=tmp_path).status == 0


def closed_pipe(*args: str, cwd: Path) -> tuple[int, bytes]:
    """Run with a standard output that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*command(), *args], cwd=cwd, env=environment(), stdout=write,
            stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    finally:
        os.close(write)
    return done.returncode, done.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * MIB)
    for args in (("info", "a"), ("map", "--output=json", "a"), ("--help",), ("info", "--help")):
        status, err = closed_pipe(*args, cwd=tmp_path)
        assert (status, err) == (141, b""), args


def test_a_closed_pipe_ends_progress_but_not_the_work(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (16 * MIB))
    _, err = closed_pipe("convert", "-p", "a", "b", cwd=tmp_path)
    assert err == b""
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_progress_is_silent_in_a_pipe_unless_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * (16 * MIB))
    assert ours("convert", "a", "b", cwd=tmp_path) == (0, b"", b"")
    out = ours("convert", "-p", "a", "b", cwd=tmp_path).out
    shown = re.findall(rb" {4}\((\d+\.\d\d)/100%\)\r", out)
    assert out == b"".join(b"    (%s/100%%)\r" % step for step in shown) + b"\n"
    steps = [float(step) for step in shown]
    assert len(steps) > 5 and steps == sorted(steps)
    assert steps[0] == 0 and steps[-2:] == [100, 100]


def test_progress_as_json_lines(tmp_path: Path) -> None:
    import json

    (tmp_path / "a").write_bytes(b"x" * (16 * MIB))
    found = ours("convert", "--progress", "json", "a", "b", cwd=tmp_path)
    assert (found.status, found.out) == (0, b"")
    lines = [json.loads(line) for line in found.err.splitlines()]
    assert lines[-1]["done"] == lines[-1]["total"] == 16 * MIB
    assert {"rate", "seconds", "left"} <= lines[-1].keys()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_at_a_terminal_the_rate_and_the_time_left_are_shown(tmp_path: Path) -> None:
    import pty

    (tmp_path / "a").write_bytes(b"x" * (4 * MIB))
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [*command(), "convert", "-m", "1", "-r", "2M", "a", "b"], cwd=tmp_path,
            env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave,
        )  # fmt: skip
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        shown = os.read(master, 65536)
    finally:
        os.close(master)
        os.close(slave)
    assert b"/s" in shown and b"of 4 MiB" in shown


@pytest.mark.skipif(not Path("/usr/bin/prlimit").exists(), reason="prlimit is not installed")
def test_within_a_gibibyte_of_address_space(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        for i in range(64):
            file.write(bytes([i + 1]) * MIB)
        file.truncate(1 << 40)
    limit = ("prlimit", "--as=1073741824")
    for args in (
        ("convert", "-O", "qcow2", "-m", "16", "-W", "a", "b"),
        ("compare", "a", "b"),
        ("check", "b"),
        ("map", "b"),
        ("info", "b"),
    ):
        found = ours(*args, cwd=tmp_path, prefix=limit)
        assert found.status == 0, found


def test_ctrl_c_leaves_a_valid_image_and_says_how_to_go_on(tmp_path: Path, peer: Peer) -> None:
    with open(tmp_path / "a", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(MIB))
    process = subprocess.Popen(
        [*command(), "convert", "-r", "8M", "-p", "-O", "qcow2", "a", "b"], cwd=tmp_path,
        env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    seen = b""
    while seen.count(b"\r") < 3:
        seen += process.stdout.read1(4096)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.startswith(b"qemu-img: interrupted: 'b' is a valid image")
    assert b"run the command again" in err and err.count(b"\n") == 1
    assert real(peer("qemu-img"), "check", "b", cwd=tmp_path).status == 0
    assert real(peer("qemu-img"), "info", "b", cwd=tmp_path).status == 0


def test_ctrl_c_while_opening_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * MIB)
    for delay in (0.02, 0.05, 0.08, 0.12):
        process = subprocess.Popen(
            [*command(), "compare", "a", "a"], cwd=tmp_path, env=environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if b"diskwright/cli/main.py" in err:
            # Nothing of ours runs before main(); from there on it is one line.
            assert b"in main" not in err, err


COUNT = """\
import sys
before = set(sys.modules)
sys.path.insert(0, {source!r})
from diskwright.cli.main import main
status = main("qemu-img", sys.argv[1:])
print(*sorted(set(sys.modules) - before), file=sys.stderr)
sys.exit(status)
"""


def test_info_imports_little(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", COUNT.format(source=str(SOURCE)), "info", "a"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = done.stderr.split()
    for dear in (
        "argparse", "asyncio", "dataclasses", "importlib.metadata", "inspect", "logging",
        "pathlib", "selectors", "socket", "subprocess", "tempfile", "traceback", "urllib",
        "diskwright.formats.qcow2", "diskwright.ops.convert", "diskwright.cli.convert",
        "diskwright.api",
    ):  # fmt: skip
        assert dear not in loaded, dear
    own = [name for name in loaded if name.startswith("diskwright")]
    assert len(own) <= 69, sorted(own)
    assert len(loaded) <= 130, sorted(loaded)


SYNCS = """\
import os, sys
sys.path.insert(0, {source!r})
count = dict(file=0, directory=0)
for name in ("fsync", "fdatasync"):
    real = getattr(os, name)
    def counting(fd, real=real):
        kind = "directory" if os.path.isdir(f"/proc/self/fd/{{fd}}") else "file"
        count[kind] += 1
        return real(fd)
    setattr(os, name, counting)
from diskwright.cli.main import main
status = main("qemu-img", sys.argv[1:])
print(count["file"], count["directory"])
sys.exit(status)
"""


def syncs(tmp_path: Path, *args: str) -> tuple[int, int]:
    """How often the verb synced a file, and a directory."""
    done = subprocess.run(
        [sys.executable, "-c", SYNCS.format(source=str(SOURCE)), *args],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, directory = done.stdout.split()[-2:]
    return int(file), int(directory)


@pytest.mark.skipif(sys.platform != "linux", reason="counts by descriptor names of /proc")
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("cache", [None, "unsafe", "writeback", "none", "writethrough"])
def test_flush_means_flush_at_the_end_of_convert(
    tmp_path: Path, fmt: str, cache: str | None
) -> None:
    (tmp_path / "a").write_bytes(b"x" * (12 * MIB))  # three buffers: one sync may cover two
    before, _ = syncs(tmp_path, "create", "-q", "-f", fmt, "fresh", "12M")
    mode = () if cache is None else ("-t", cache)
    file, directory = syncs(tmp_path, "convert", "-O", fmt, *mode, "a", "b")
    assert directory >= 1
    if cache in (None, "unsafe"):
        # What the creation itself makes durable, and nothing after it.
        assert file <= before
    else:
        assert file > before
    if cache == "writethrough":
        assert file >= before + 2
