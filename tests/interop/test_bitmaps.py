"""Persistent bitmaps with QEMU's tools, both ways; its NBD server judges the bits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import diskwright
from diskwright import aio
from diskwright.bits import BitmapError
from diskwright.cli.main import main

TOOLS = ("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS), reason="QEMU's tools are not installed"
)
SIZE = 10 << 20


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=60)


def ok(*words: object) -> str:
    done = run(*words)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


def theirs(path: Path, name: str) -> list[tuple[int, int]]:
    """The dirty ranges as QEMU's server tells them."""
    socket = path.with_suffix(".sock")
    words = ["qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(socket), str(path)]
    with subprocess.Popen(words) as server:
        try:
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.02)
            uri = f"nbd+unix:///?socket={socket}"
            text = ok("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri)
        finally:
            server.terminate()
    socket.unlink(missing_ok=True)
    return [(part["offset"], part["length"]) for part in json.loads(text) if part["type"] & 1]


@pytest.mark.parametrize("seed", range(3))
def test_both_follow_the_same_writes(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    granularity = rng.choice([512, 4096, 65536, 1 << 20])
    ok("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
    if seed % 2:
        ok("qemu-img", "bitmap", "--add", "-g", granularity, path, "b")
    else:
        with diskwright.open(path, writable=True) as disk:
            disk.bitmaps.add("b", granularity)
    wanted: set[int] = set()
    for turn in range(6):
        length = rng.choice([512, 4096, 100 * 1024])
        offset = rng.randrange((SIZE - length) // 512) * 512
        what = rng.choice(["w", "w -z", "w -z -u", "discard"])
        if turn % 2:
            ok("qemu-io", "-c", f"{what} {offset} {length}", path)
        else:
            with diskwright.open(path, writable=True) as disk:
                if what == "w":
                    disk.write_at(offset, bytes(length))
                elif what == "discard":
                    disk.discard(offset, length)
                else:
                    disk.zero(offset, length, unmap=what.endswith("-u"))
        wanted |= set(range(offset // granularity, (offset + length - 1) // granularity + 1))
        ok("qemu-img", "check", path)
    found = theirs(path, "b")
    assert {at // granularity for o, n in found for at in range(o, o + n, granularity)} == wanted
    with diskwright.open(path) as disk:
        assert disk.bitmaps.dirty("b") == found


def test_resize_and_merge_as_qemu_sees_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    with diskwright.open(_new(path), writable=True) as disk:
        disk.bitmaps.add("one", 65536)
        disk.write_at(5 << 20, b"x" * 100_000)
        disk.bitmaps.add("two", 4096)
        disk.write_at(9 << 20, b"y")
        disk.resize(20 << 20)
        disk.bitmaps.merge("two", "one")
        disk.resize((9 << 20) + 512, shrink=True)
        disk.bitmaps.disable("one")
        disk.write_at(0, b"z")
        disk.bitmaps.add("off", enabled=False)
    assert theirs(path, "one") == [(5 << 20, 131072), (9 << 20, 512)]
    assert theirs(path, "two") == [(0, 4096), (5 << 20, 131072), (9 << 20, 512)]
    assert theirs(path, "off") == []
    ok("qemu-img", "check", path)
    info = json.loads(ok("qemu-img", "info", "--output=json", path))
    assert [b["flags"] for b in info["format-specific"]["data"]["bitmaps"]] == [[], ["auto"], []]
    for name in ("one", "two", "off"):
        ok("qemu-img", "bitmap", "--remove", path, name)
    with diskwright.open(path) as disk:
        assert disk.bitmaps.list() == []


def _new(path: Path) -> Path:
    diskwright.create(path, format="qcow2", size=SIZE)
    return path


def test_one_that_was_not_stored_is_inconsistent_to_both(tmp_path: Path) -> None:
    path, killed = tmp_path / "disk.qcow2", tmp_path / "killed.qcow2"
    with diskwright.open(_new(path), writable=True) as disk:
        disk.bitmaps.add("b")
        disk.bitmaps.store()
        disk.write_at(0, b"x")
        disk.flush()
        shutil.copy(path, killed)  # what is there when the program is killed
    assert "inconsistent" in run("qemu-img", "bitmap", "--clear", killed, "b").stderr
    with diskwright.open(killed, writable=True) as disk:
        (found,) = disk.bitmaps.list()
        assert found.inconsistent
        with pytest.raises(BitmapError, match="inconsistent"):
            disk.bitmaps.dirty("b")
        with pytest.raises(BitmapError, match="inconsistent"):
            disk.resize(SIZE * 2)
        disk.write_at(0, b"y")
        disk.bitmaps.remove("b")
    ok("qemu-img", "check", killed)
    assert '"bitmaps"' not in ok("qemu-img", "info", "--output=json", killed)


def test_written_by_a_program_that_knows_no_bitmaps(tmp_path: Path) -> None:
    path = _new(tmp_path / "disk.qcow2")
    ok("qemu-img", "bitmap", "--add", path, "b")
    file = bytearray(path.read_bytes())
    file[88:96] = bytes(8)
    path.write_bytes(file)
    with diskwright.open(path, writable=True) as disk:
        assert disk.bitmaps.list() == []
        disk.bitmaps.add("b")
        disk.write_at(0, b"x")
    assert theirs(path, "b") == [(0, 65536)]


def test_bitmaps_that_are_not_persistent(tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        path = tmp_path / f"disk.{format}"
        diskwright.create(path, format=format, size=SIZE)
        with diskwright.open(path, format=format, writable=True) as disk:
            disk.bitmaps.add("b", 4096, persistent=False)
            disk.write_at(8192, b"x" * 5000)
            assert disk.bitmaps.dirty("b") == [(8192, 8192)]
            disk.resize(10240, shrink=True)
        if format == "qcow2":
            assert '"bitmaps"' not in ok("qemu-img", "info", "--output=json", path)


async def _async_use(path: Path) -> None:
    async with aio.open(path, writable=True) as disk:
        await disk.bitmaps.add("b", 512)
        await disk.write_at(1024, b"x")
        assert await disk.bitmaps.dirty("b") == [(1024, 512)]
        await disk.bitmaps.disable("b")
        await disk.bitmaps.add("c")
        await disk.bitmaps.merge("c", "b")
        await disk.bitmaps.clear("b")
        await disk.bitmaps.enable("b")
        await disk.bitmaps.store()
        assert [bitmap.name for bitmap in disk.bitmaps.list()] == ["b", "c"]
        await disk.bitmaps.remove("b")


def test_on_asyncio(tmp_path: Path) -> None:
    import asyncio

    path = _new(tmp_path / "disk.qcow2")
    asyncio.run(_async_use(path))
    assert theirs(path, "c") == [(0, 65536)]


COMMANDS = [
    "bitmap --add {a} b0",
    "bitmap --add -g 5000 {a} n",
    "bitmap --add -g 4G {a} n",
    "bitmap -g 4k --clear {a} b0",
    "bitmap {a} b0",
    "bitmap --add {a}",
    "bitmap --remove {a} nope",
    "bitmap --merge nope {a} b0",
    "bitmap --merge b0 -F qcow2 {a} b0",
    "bitmap --clear -b {a} {a} b0",
    "bitmap --foo {a} b0",
    "bitmap --add -g 1X {a} b",
    "bitmap --add --disable --merge b0 {a} b3",
    "bitmap --add --clear --disable --enable --remove {a} gone",
    "bitmap --add {old} b",
    "bitmap --add -f raw {raw} b",
    "bitmap --merge b -b {raw} -F raw {a} b0",
    "bitmap --clear {broken} b0",
    "bitmap --remove {broken} b0",
    "resize {broken} 20M",
    "amend -o compat=0.10 {a}",
    "snapshot -c one {a}",
    "convert --skip-broken-bitmaps -O qcow2 {a} {out}",
    "convert --bitmaps -O qcow2 {broken} {out}",
    "convert --bitmaps --skip-broken-bitmaps -O qcow2 {broken} {out}",
    "convert --bitmaps -O vmdk {a} {out}",
    "convert --bitmaps -O qcow2 -f raw {raw} {out}",
    "convert --bitmaps -O qcow2 {a} {a} {out}",
    "convert --bitmaps -O qcow2 {a} {out}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_verbs_say_and_do_the_same(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import re

    said, shown = [], []
    for _ in range(2):
        names = {n: tmp_path / n for n in ("a", "old", "raw", "broken", "out")}
        for path in names.values():
            path.unlink(missing_ok=True)
        for name, options in (("a", "compat=1.1"), ("old", "compat=0.10")):
            ok("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, names[name], "10M")
        ok("qemu-img", "bitmap", "--add", names["a"], "b0")
        ok("qemu-img", "bitmap", "--add", "--disable", "-g", "4k", names["a"], "off")
        file = bytearray(names["a"].read_bytes())
        at = file.find(bytes.fromhex("2385287500000018"))
        directory = int.from_bytes(file[at + 24 : at + 32], "big")
        file[directory + 15] |= 1
        names["broken"].write_bytes(file)
        ok("qemu-img", "create", "-q", "-f", "raw", names["raw"], "10M")
        words = [word.format(**names) for word in command.split()]
        if not said:
            done = run("qemu-img", *words)
            outcome = (done.returncode, done.stdout + done.stderr)
        else:
            capfd.readouterr()
            status = main("qemu-img", words)
            outcome = (status, "".join(capfd.readouterr()))
        said.append((outcome[0], re.sub(r"#block\d+", "#block", outcome[1])))
        specific = {}
        for name in ("a", "broken", "out"):
            info = json.loads(run("qemu-img", "info", "--output=json", names[name]).stdout or "{}")
            specific[name] = info.get("format-specific", {}).get("data", {}).get("bitmaps")
        shown.append(specific)
    assert said[0] == said[1]
    assert shown[0] == shown[1]
