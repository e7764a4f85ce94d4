"""The layers of a disk as pictures, in the terminal and as SVG."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import pytest

import diskwright
from cli.support import ours
from diskwright.cli import picture as terminal
from diskwright.ops.picture import STATES

MIB = 1 << 20
NAME = "<top> & 'co'.qcow2"

IN_ASCII = """\
<top> & 'co'.qcow2: 8 MiB, 256 KiB a column

read from layer
11--0000------------1111-------0
0: <top> & 'co'.qcow2 (qcow2, 8 MiB), 320 KiB data, 768 KiB zeroes
....#000.......................+
1: base.qcow2 (qcow2, 6 MiB), 576 KiB data, 1 MiB compressed
##..+...............CCCC        <
0 B          4 MiB         8 MiB
#+ data  Cc compressed  0 zeroes  . not in this layer  (the second: less than half)
""".replace("<\n0 B", "\n0 B")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("picture")
    base = found / "base.qcow2"
    (found / "raw").write_bytes(bytes(5 * MIB) + b"pack me!" * (MIB // 8))
    diskwright.create(base, format="qcow2", size=6 * MIB)
    words = ["convert", "-c", "-O", "qcow2", "raw", "base.qcow2"]
    assert not ours(*words, cwd=found).status
    with diskwright.open(base, writable=True) as disk:
        disk.write_at(0, b"x" * 512 * 1024)
        disk.write_at(MIB, b"x" * 64 * 1024)
    with contextlib.chdir(found):
        diskwright.overlay("base.qcow2", NAME, size=8 * MIB)
        with diskwright.open(NAME, writable=True) as disk:
            disk.write_at(MIB, b"y" * 256 * 1024)
            disk.zero(MIB + 256 * 1024, 768 * 1024)
            disk.write_at(8 * MIB - 1, b"z")
    return found


def printed(folder: Path, *words: str) -> str:
    with mock.patch.dict(os.environ, {"COLUMNS": "32"}):
        done = ours(*words, NAME, cwd=folder, name="diskwright")
    assert not done.status, done.err
    return done.out.decode()


def test_the_strips_of_a_chain(folder: Path) -> None:
    assert printed(folder, "map", "--picture") == IN_ASCII
    plain = ours("info", "--backing-chain", NAME, cwd=folder, name="diskwright").out.decode()
    assert printed(folder, "info", "--backing-chain", "--picture") == f"{plain}\n{IN_ASCII}"
    part = printed(folder, "map", "--picture", "-s", "1M", "-l", "1M")
    assert "0000000011111111" not in part and " from 0x100000, 32 KiB a column" in part


def test_columns_hold_shares(folder: Path) -> None:
    with contextlib.chdir(folder):
        found = diskwright.picture(NAME, columns=7)
    told = found.to_dict()
    assert told["states"] == list(STATES) and told["length"] == 8 * MIB
    for layer in found.layers:
        assert sum(map(sum, layer.columns)) == 8 * MIB and len(layer.columns) == 7
    assert found.layers[1].totals[4] == 2 * MIB
    assert sum(found.layers[0].served) == 1088 * 1024


def test_a_large_disk_and_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "large"
    diskwright.create(path, format="qcow2", size=1 << 40, options={"cluster_size": 2 * MIB})
    with diskwright.open(path, writable=True) as disk:
        for at in range(0, 1 << 40, 1 << 35):
            disk.write_at(at, b"x")
    found = diskwright.picture(path, columns=64)
    assert [column[0] > 0 for column in found.layers[0].columns] == [True, False] * 32
    (tmp_path / "empty").touch()
    found = diskwright.picture(tmp_path / "empty", format="raw")
    assert found.length == 0 and "<svg" in found.svg() and list(terminal.text(found, True, True))


def test_blocks_and_colours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.chdir(folder):
        found = diskwright.picture(NAME, columns=32)
    lines = list(terminal.text(found, True, False))
    assert lines[5] == "····█░░░·······················▄"
    coloured = "\n".join(terminal.text(found, True, True))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == "\n".join(lines) != coloured

    class Screen(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    for variables, encoding, style in (
        ({"LANG": "de_DE.UTF-8"}, "utf-8", (True, True)),
        ({"LANG": "de_DE", "NO_COLOR": "1"}, "iso8859-1", (False, False)),
        ({"LC_ALL": "C", "TERM": "dumb"}, "utf-8", (False, False)),
    ):
        with mock.patch.dict(os.environ, variables, clear=True):
            monkeypatch.setattr(sys, "stdout", Screen(io.BytesIO(), encoding=encoding))
            assert terminal._style() == style


def test_a_drawing(folder: Path, tmp_path: Path) -> None:
    for name in ("one.svg", "other.svg", "other.svg"):
        assert printed(folder, "map", "--svg", str(tmp_path / name)) == ""
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "other.svg").read_text()
    root = ElementTree.fromstring(text)
    shown = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert shown[0] == f"{NAME}: 8 MiB, 2 layers"
    assert {"zeroes", "what is read comes from here", "8 MiB"} <= set(shown)
    assert not re.search("href|script|url", text)


def test_what_is_refused(folder: Path) -> None:
    before = (folder / "base.qcow2").read_bytes()
    for words, said in (
        (["map", "--svg", "base.qcow2"], b"is no SVG"),
        (["map", "--picture", "--output=json"], b"exclude"),
        (["info", "--backing-chain", "--svg", "x", "--output=json"], b"exclude"),
        (["info", "--picture"], b"need --backing-chain"),
    ):
        done = ours(*words, NAME, cwd=folder, name="diskwright")
        assert done.status == 1 and said in done.err and not done.out
    assert (folder / "base.qcow2").read_bytes() == before
