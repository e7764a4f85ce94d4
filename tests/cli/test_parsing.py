"""Options as getopt_long takes them, numbers as qemu-img reads them, JSON as it prints it, and
random command lines that must never end in a traceback."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from importlib import import_module
from pathlib import Path

import pytest

from diskwright.cli import main as program
from diskwright.cli.jsontext import dumps
from diskwright.cli.options import Opt, OptionError, parse
from diskwright.cli.progress import clock
from diskwright.cli.sizes import BadNumber, bounded, number
from diskwright.errors import UsageError
from diskwright.units import human

DECLARED = (
    Opt("f", "format", "FMT"),
    Opt("b", "backing-chain"),
    Opt("U", "force-share"),
    Opt("", "image-opts"),
    Opt("p", "progress", "WHEN", "", ("json",)),
)


@pytest.mark.parametrize(
    ("words", "options", "operands"),
    [
        ("x -f raw y", [("format", "raw")], ["x", "y"]),
        ("-fraw -bU x", [("format", "raw"), ("backing-chain", ""), ("force-share", "")], ["x"]),
        ("-Ubfraw x", [("force-share", ""), ("backing-chain", ""), ("format", "raw")], ["x"]),
        ("--form=raw --back x", [("format", "raw"), ("backing-chain", "")], ["x"]),
        ("--format raw -- -x --y", [("format", "raw")], ["-x", "--y"]),
        ("- -f=raw", [("format", "=raw")], ["-"]),
        ("-p x json", [("progress", "")], ["x", "json"]),
        ("--progress json x", [("progress", "json")], ["x"]),
        ("--progress x", [("progress", "")], ["x"]),
    ],
)
def test_options_and_operands(
    words: str, options: list[tuple[str, str]], operands: list[str]
) -> None:
    found = parse(words.split(), DECLARED)
    assert (found.options, found.operands) == (options, operands)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--foo", "unrecognized option '--foo'"),
        ("-x", "invalid option -- 'x'"),
        ("--f x", "option '--f' is ambiguous; possibilities: '--format' '--force-share'"),
        ("--backing-chain=1", "option '--backing-chain' doesn't allow an argument"),
        ("--format", "option '--format' requires an argument"),
        ("-bf", "option requires an argument -- 'f'"),
    ],
)
def test_mistakes_are_worded_as_getopt_does(words: str, text: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse(words.split(), DECLARED)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("0x100", 256), ("010", 10), (" 1G", 1 << 30), ("+1g", 1 << 30), (".5G", 1 << 29),
     ("1.", 1), ("1.k", 1024), ("1.5M", 3 << 19), ("-1", -1), ("7E", 7 << 60), ("12b", 12)],
)  # fmt: skip
def test_numbers(text: str, value: int) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "0x", "0x1k", "1e3", "1.5", "1.5b", "1K ", "1KB", "0b1x", "1_0", "inf", "nan", "k",
     "0x1.8k", "--1", "\N{ARABIC-INDIC DIGIT ONE}", "."],
)  # fmt: skip
def test_what_is_not_a_number(text: str) -> None:
    with pytest.raises(BadNumber):
        number(text)


def test_bounds_are_named() -> None:
    with pytest.raises(UsageError, match=r"^Invalid depth specified\. Must be between 1 and 9\.$"):
        bounded("depth", "10", 1, 9)
    with pytest.raises(UsageError, match=r"^Invalid depth specified: 'x'\.$"):
        bounded("depth", "x", 1, 9)
    with pytest.raises(UsageError, match="Must be between"):
        bounded("size", "9" * 100)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1024, "1 KiB"), (200704, "196 KiB"),
     (3 << 29, "1.5 GiB"), (1 << 40, "1 TiB")],
)  # fmt: skip
def test_sizes_for_people(size: int, text: str) -> None:
    assert human(size) == text


def test_json_is_ascii_and_reads_back() -> None:
    value = {"a": [], "b": {}, "c": 'q"\\\n\x01\x7f', "d": "é\U0001f600", "e": [1, None, True]}
    text = dumps(value)
    assert text.isascii() and json.loads(text) == value
    assert dumps("\udcff") == '"\\uFFFD"'


def test_durations() -> None:
    assert [clock(s) for s in (0, 7.4, 61, 3723)] == ["0:00", "0:07", "1:01", "1:02:03"]


WORDS = (
    "", "0", "-1", "4k", "1M", "raw", "qcow2", "foo", "a", "b", "o", "json:{}", "json:[1", "null-co://",
    'json:{"driver":"raw","file":{"driver":"file","filename":"a\\u0000b"}}', "blkdebug::a",
    'json:{"driver":"qcow2","file":{"driver":"null-co","size":1000}}', "blkdebug:x:a", "+1",
    "driver=raw,file.filename=a", "driver=raw,file=a", "size=1M", "cluster_size=1k", "offset=512",
    "backing_file=a,backing_fmt=raw", "help", "on", "9223372036854775807", "0x10", "\udcff", "dir",
    "nbd://x", "none", "full", "unsafe", "trusted", "a" * 300, "json:" + "[" * 3000, ",", "=",
    "refcount_bits=0", "driver=memory", "memory:", "host_device:a",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_command_line_ends_in_a_traceback(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    monkeypatch.setenv("DISKWRIGHT_POLICY", "trusted")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    for _ in range(30):
        (tmp_path / "a").write_bytes(b"hello".ljust(1 << 20, b"\0"))
        run(["create", "-q", "-f", "qcow2", "b", "1M"])
        run(["create", "-q", "-f", "qcow2", "-b", "a", "-F", "raw", "o"])
        verb = chance.choice(sorted(program.IMG_VERBS))
        line = [verb]
        for option in chance.choices(import_module(f"diskwright.cli.{verb}").OPTIONS, k=3):
            if option.long not in ("count", "depth", "buffer-size"):
                line.append(f"--{option.long}" if option.long else f"-{option.short}")
                if option.value and not option.words:
                    line.append(chance.choice(WORDS))
        line += chance.choices(WORDS, k=chance.choice((0, 1, 1, 2, 2, 3)))
        if verb == "bench":
            line += ["-c", "5"]
        status, err = run(line)
        assert 0 <= status <= 63, line
        assert status == 0 or err.startswith(("qemu-img", "WARNING")) or verb == "compare", line


def run(line: list[str]) -> tuple[int, str]:
    """In this process, so that an exception is seen as one."""
    before = sys.stdout, sys.stderr
    sys.stdout = io.TextIOWrapper(io.BytesIO(), errors="surrogateescape")
    sys.stderr = io.TextIOWrapper(io.BytesIO(), errors="surrogateescape")
    try:
        status = program.main("qemu-img", line)
        sys.stderr.flush()
        raw = sys.stderr.buffer
        assert isinstance(raw, io.BytesIO)
        return status, os.fsdecode(raw.getvalue())
    finally:
        sys.stdout, sys.stderr = before
