"""Results are frozen, and what the program prints as JSON is their ``to_dict()``, key by key."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours

MIB = 1 << 20

# Name -> the result in Python, and the words of the same on the command line.
RESULTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "info": (lambda: diskwright.info("over"), ["info", "over"]),
    "info_chain": (lambda: diskwright.info_chain("over"), ["info", "--backing-chain", "over"]),
    "map": (lambda: diskwright.map("over"), ["map", "over"]),
    "measure": (
        lambda: diskwright.measure("over", target_format="qcow2"),
        ["measure", "-O", "qcow2", "over"],
    ),
    "check": (lambda: diskwright.check("base"), ["check", "base"]),
    "damaged": (lambda: diskwright.check("leaky"), ["check", "leaky"]),
    "plan_repair": (
        lambda: diskwright.plan_repair("leaky"), ["check", "-r", "all", "--dry-run", "leaky"]
    ),
    "compare": (lambda: diskwright.compare("base", "over"), ["compare", "base", "over"]),
    "digest": (lambda: diskwright.digest("base"), ["digest", "base"]),
    "inspect": (lambda: diskwright.inspect("over"), ["inspect", "over"]),
}  # fmt: skip
THEIRS = ("info", "info_chain", "map", "measure", "check", "damaged")
"""Those of which qemu-img has the same, and the exit status that goes with them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("results")
    base = found / "base"
    diskwright.create(base, format="qcow2", size=4 * MIB)
    with diskwright.open(base, writable=True) as disk:
        disk.write_at(MIB, b"x" * 70_000)
        disk.bitmaps.add("since", 65536)
        disk.snapshots.create("before")
    diskwright.overlay(base, found / "over")
    with diskwright.open(found / "over", writable=True) as disk:
        disk.write_at(2 * MIB, b"y" * 512)
        disk.zero(MIB, 65536)
    leaky = found / "leaky"
    diskwright.create(leaky, format="qcow2", size=MIB)
    data = bytearray(leaky.read_bytes())
    data[131072 + 60] = 0
    data[131072 + 61] = 1  # a count of a cluster that nothing refers to
    leaky.write_bytes(data + bytes(31 * 65536 - len(data)))
    return found


def as_json(result: Any) -> Any:
    return [as_json(part) for part in result] if isinstance(result, list) else result.to_dict()


@pytest.mark.parametrize("name", RESULTS)
def test_the_program_prints_what_the_api_says(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    made, (verb, *words) = RESULTS[name]
    result = made()
    told = json.dumps(as_json(result))
    # Passes and bytes are what our own program adds to a check.
    name_of_program = "qemu-img" if verb == "check" else "diskwright"
    printed = ours(verb, "--output=json", *words, name=name_of_program).out.decode()
    assert json.dumps(json.loads(printed)) == told
    for part in result if isinstance(result, list) else [result]:
        assert isinstance(part, tuple)  # and hence frozen
        with pytest.raises(AttributeError):
            setattr(part, part._fields[0], None)
    if name in THEIRS and shutil.which("qemu-img"):
        command = ["qemu-img", verb, "--output=json", *words]
        theirs = subprocess.run(command, capture_output=True, check=False).stdout
        assert json.dumps(json.loads(theirs)) == told


def test_what_changes_files(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "leaky", "a")
    fixed = diskwright.check("a", repair="all", undo_file="a.undo")
    assert fixed.ok and fixed.to_dict()["leaks-fixed"] == fixed.leaks_fixed == 1
    shutil.copy("a", "b")
    undone = diskwright.undo("a", "a.undo").to_dict()
    assert undone["undone"] and undone["filename"] == "a"
    printed = ours("check", "--undo", "a.undo", "--output=json", "a").out
    assert list(json.loads(printed)) == list(undone)
    saved = diskwright.salvage("a", "out").to_dict()
    words = ["--map", "map", "--map-format=json", "--force", "a", "out"]
    assert not ours("salvage", *words, name="diskwright").status
    assert json.loads(Path("map").read_text()) == saved


def test_what_an_open_disk_tells(folder: Path) -> None:
    with diskwright.open(folder / "base") as disk:
        (layer,), (bitmap,), (snapshot,) = disk.chain, disk.bitmaps.list(), disk.snapshots.list()
    assert layer.to_dict()["virtual-size"] == 4 * MIB
    assert bitmap.to_dict()["recording"] and snapshot.to_dict()["name"] == "before"
