"""Repair of qcow2 images with features: every damage alone, pairs of them, and every prefix of what
the repair writes; qemu-img reads the same before and after, and finds nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diskwright.findings import CheckResult
from diskwright.formats import qcow2
from sansio import oracle
from sansio.feature_damages import CLUSTER, DAMAGES, SECRET, Damage, File, base
from sansio.machine import Machine, put

pytestmark = oracle.needs_qemu
PAGE = Path(__file__).parents[2] / "docs/formats/qcow2.md"


def damaged(kind: str, *damages: Damage) -> bytes:
    file = File(base(kind)["image.qcow2"], 2 if kind == "extended" else 1)
    for damage in damages:
        damage.make(file)
    return bytes(file.data)


def run(file: bytes, fix: str = "") -> tuple[CheckResult, bytes, list[tuple[Any, ...]]]:
    machine = Machine(file)
    machine.open(qcow2.DRIVER, check=True)
    machine.log.clear()
    result: CheckResult = machine.run(machine.format.check(fix))
    return result, bytes(machine.slots["file"]), machine.log


def _image(kind: str, path: Path) -> list[str]:
    if kind == "data-file":
        data = f"data-file.driver=file,data-file.filename={path.parent}/data.raw"
        return ["--image-opts", f"driver=qcow2,file.filename={path},{data}"]
    if kind != "luks":
        return ["-f", "qcow2", str(path)]
    image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
    return ["--object", SECRET, "--image-opts", image]


def contents(kind: str, file: bytes, folder: Path) -> dict[str, list[bytes]]:
    """The clusters of the disk and of every snapshot, as far as qemu-img reads them."""
    for name, data in {**base(kind), "image.qcow2": file}.items():
        (folder / name).write_bytes(data)
    path = folder / "image.qcow2"
    out: dict[str, list[bytes]] = {}
    for name in ("", "one", "two") if kind == "snapshots" else ("",):
        more = ["-l", f"snapshot.name={name}"] if name else []
        target = folder / "out.raw"
        done = oracle.run(
            "qemu-img", "convert", *more, "-O", "raw", *_image(kind, path), str(target)
        )
        if done.returncode == 0:
            data = target.read_bytes()
            out[name] = [data[at : at + CLUSTER] for at in range(0, len(data), CLUSTER)]
            if kind == "luks":
                out[name][3] = b""  # metadata, or the end of the file, decrypted: noise
    return out


def same(before: Mapping[str, list[bytes]], after: Mapping[str, list[bytes]]) -> None:
    for name, old in before.items():
        pairs = zip(old, after[name], strict=True)
        assert [number for number, (a, b) in enumerate(pairs) if a != b] == []


def clean(kind: str, file: bytes, folder: Path) -> None:
    result, _, _ = run(file)
    assert (result.corruptions, result.leaks, result.findings) == (0, 0, [])
    assert not file[79] & 3
    (folder / "image.qcow2").write_bytes(file)
    done = oracle.run("qemu-img", "check", *_image(kind, folder / "image.qcow2"))
    assert done.returncode == 0, (done.stdout, done.stderr)


KINDS = ("snapshots", "bitmaps", "extended", "data-file", "luks")
# Damages that take away what others want to damage.
LAST = {
    "bitmap-table-outside": 1, "directory-outside": 2, "snapshot-l1-outside": 1,
    "snapshot-l1-is-active": 1, "snapshots-share-l1": 1, "inactive-l1-outside": 1,
    "inactive-l1-unaligned": 1, "inactive-l1-at-l1": 1, "snapshot-incomplete": 2,
    "snapshot-table-outside": 3, "blocks-gone": 4, "reftable-gone": 5,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_image_is_left_alone(kind: str, tmp_path: Path) -> None:
    file = base(kind)["image.qcow2"]
    for fix in ("", "leaks", "all"):
        result, after, log = run(file, fix)
        assert (result.findings, after == file, log) == ([], True, [])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_damage(damage: Damage, tmp_path: Path) -> None:
    file = damaged(damage.kind, damage)
    found, _, _ = run(file)
    assert found.corruptions or found.leaks
    before = contents(damage.kind, file, tmp_path)
    result, after, _ = run(file, "leaks")
    left, _, _ = run(after)
    assert (left.corruptions, left.leaks) == (result.corruptions, result.leaks)
    result, after, log = run(file, "all")
    assert (result.corruptions, result.leaks) == (0, 0), result.findings
    same(before, contents(damage.kind, after, tmp_path))
    clean(damage.kind, after, tmp_path)
    # A loss of power after any write leaves what can be repaired again.
    now = bytearray(file)
    rng = random.Random(len(log))
    looked = rng.sample(range(len(log)), min(4, len(log)))
    for number, entry in enumerate(log):
        if entry[0] == "write":
            put(now, entry[1], entry[2])
        if number in looked:
            result, again, _ = run(bytes(now), "all")
            assert (result.corruptions, result.leaks) == (0, 0), number
            if number == looked[0]:
                same(before, contents(damage.kind, bytes(now), tmp_path))
                same(before, contents(damage.kind, again, tmp_path))


@pytest.mark.parametrize("seed", range(9))
def test_several_damages(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    kind = KINDS[seed % 3]
    for _ in range(2):
        chosen = rng.sample([d for d in DAMAGES if d.kind == kind], 2)
        chosen.sort(key=lambda d: LAST.get(d.name, 0))
        file = damaged(kind, *chosen)
        what = [damage.name for damage in chosen]
        before = contents(kind, file, tmp_path)
        result, after, _ = run(file, "all")
        assert (result.corruptions, result.leaks) == (0, 0), what
        same(before, contents(kind, after, tmp_path))
        clean(kind, after, tmp_path)


def test_the_page_has_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## Damages of images with features")[1]
    listed = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    assert listed == [f"| {d.what} | {d.repaired} |" for d in DAMAGES]
