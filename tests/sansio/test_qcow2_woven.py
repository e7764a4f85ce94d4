"""Repair of qcow2 images in which several things at random are wrong, of every kind: no byte that
could be read is lost, nothing is found afterwards, and each state that a loss of power leaves reads
the same and can be repaired."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import CorruptImage, DiskError, UnsupportedFeature
from diskwright.findings import CheckResult
from sansio import oracle
from sansio.feature_damages import SECRET
from sansio.test_qcow2_bitmaps import GRAIN, Disk
from sansio.test_qcow2_repair import states
from sansio.woven import KINDS, OFFSET, PACKED, Sound, Woven, contents, opened, sound

Log = list[tuple[Any, ...]]


def run(sound: Sound, file: bytes, fix: str = "") -> tuple[CheckResult, bytes, Log]:
    machine = opened(sound, file, check=True)
    machine.log.clear()
    result: CheckResult = machine.run(machine.format.check(fix))
    return result, bytes(machine.slots["file"]), machine.log


class Case:
    """One damaged image; ``before``: what it reads as."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.sound = sound(kind)
        rng = random.Random(f"{kind} {seed}")
        self.woven = Woven(self.sound, rng)
        self.what = [self.woven.make() for _ in range(rng.choice([1, 2, 2, 3, 3, 4, 6]))]
        self.file = bytes(self.woven.file)
        names = ("", "a", "b") if "snapshots" in kind else ("",)
        self.before = contents(self.sound, self.file, names)
        opened(self.sound, self.file, check=True)

    def same(self, file: bytes) -> None:
        after = contents(self.sound, file, tuple(self.before))
        for name, old in self.before.items():
            pairs = enumerate(zip(old, after[name], strict=True))
            lost = [i for i, (a, b) in pairs if a not in (None, b) and not self._noise(a)]
            assert not lost, (name, lost[:9], self.what)

    def _noise(self, places: Any) -> bool:
        """Of an encrypted disk: metadata or nothing, decrypted."""
        structures = self.woven.structures
        return self.kind == "luks" and any(
            host in structures or host >= len(self.file) for _, host in places
        )

    def good(self, file: bytes, tmp_path: Path) -> None:
        result, _, _ = run(self.sound, file)
        assert (result.corruptions, result.leaks, result.findings) == (0, 0, []), self.what
        assert file[7] == 2 or not file[79] & 3
        if oracle.shutil.which("qemu-img") is None:
            return
        path, data = tmp_path / "image.qcow2", tmp_path / "data"
        path.write_bytes(file)
        (tmp_path / "base.raw").write_bytes(self.sound.backing or b"")
        named = ["-f", "qcow2", str(path)]
        if self.sound.data is not None:
            data.write_bytes(self.sound.data)
            more = f"data-file.driver=file,data-file.filename={data}"
            named = ["--image-opts", f"driver=qcow2,file.filename={path},{more}"]
        if self.kind == "luks":
            image = f"driver=qcow2,file.filename={path},encrypt.key-secret=s"
            named = ["--object", SECRET, "--image-opts", image]
        done = oracle.run("qemu-img", "check", *named)
        assert done.returncode == 0, (done.stdout, done.stderr, self.what)

    def marked(self, file: bytes) -> None:
        """What reads as something else is dirty in the bitmap that follows writes."""
        disk = Disk(opened(self.sound, file))
        bitmap = disk.image.bitmaps.find("on")
        if bitmap is None or bitmap.inconsistent:
            return
        dirty = disk.dirty("on")
        after = contents(self.sound, file)[""]
        unit = disk.image.cluster_size
        for i, (old, new) in enumerate(zip(self.before[""], after, strict=True)):
            if old != new:
                grains = range(i * unit // GRAIN, (i + 1) * unit // GRAIN)
                assert dirty.issuperset(grains), (i, self.what)


def repair(kind: str, seed: int, most: int, tmp_path: Path) -> bool:
    """One image; ``most``: crash states that are looked at.  False where it cannot be opened."""
    try:
        case = Case(kind, seed)
    except (DiskError, ValueError):
        return False
    _, after, _ = run(case.sound, case.file, "leaks")
    case.same(after)
    try:
        result, after, log = run(case.sound, case.file, "all")
    except (CorruptImage, UnsupportedFeature):
        return False
    assert (result.corruptions, result.leaks) == (0, 0), case.what
    if any(" dropped" in text for text in result.findings):
        case.before = {"": case.before[""]}
    case.same(after)
    case.good(after, tmp_path)
    case.marked(after)
    for state in states(case.file, log, most) if most else ():
        case.same(state)
        result, again, _ = run(case.sound, state, "all")
        assert (result.corruptions, result.leaks) == (0, 0), case.what
        case.same(again)
    return True


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_woven(kind: str, tmp_path: Path) -> None:
    count = 20 if kind in ("large", "luks", "data-file") else 300
    done = [repair(kind, seed, 0 if kind == "large" else 6, tmp_path) for seed in range(count)]
    assert sum(done) > count // 2


SMALL = [kind for kind in KINDS if kind not in ("large", "luks", "data-file")]


@pytest.mark.parametrize("kind", SMALL)
def test_woven(kind: str, tmp_path: Path) -> None:
    done = [repair(kind, seed, 2, tmp_path) for seed in range(2)]
    assert any(done)


def test_the_copy_of_a_table_names_a_cluster_as_often_as_the_table() -> None:
    """Counts end with 3, and two compressed clusters of a table that two L1 entries share lie in
    one host cluster: with the copy that would be four."""
    image = sound("two-bits")
    file = bytearray(image.file)
    l1 = int.from_bytes(file[40:48], "big")
    table = int.from_bytes(file[l1 : l1 + 8], "big") & OFFSET
    file[l1 + 8 : l1 + 16] = file[l1 : l1 + 8]
    packed = [
        at for at in range(table, table + 512, 8)
        if int.from_bytes(file[at : at + 8], "big") & PACKED
    ]  # fmt: skip
    for at in packed[1::3]:  # one in three of those that share a cluster
        file[at : at + 8] = bytes(8)
    before = contents(image, bytes(file), ("",))
    result, after, _ = run(image, bytes(file), "all")
    assert (result.corruptions, result.leaks) == (0, 0)
    assert contents(image, after, ("",)) == before
    assert run(image, after)[0].findings == []
