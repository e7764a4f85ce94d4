"""Repair of qcow2 images: every damage alone, pairs of them, and every state that a loss of power
may leave; no byte that could be read is lost, and qemu-img finds nothing afterwards."""

from __future__ import annotations

import random
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from diskwright.errors import DiskError
from diskwright.findings import CheckResult
from diskwright.formats import qcow2
from sansio import oracle
from sansio.damages import CLUSTER, DAMAGES, PER_TABLE, SIZE, Damage, Image, base
from sansio.machine import Machine, put
from sansio.test_qcow2_cross import own_check

PAGE = Path(__file__).parents[2] / "docs/formats/qcow2.md"
Content = list[bytes | None]


@cache
def backing() -> bytes:
    return random.Random(8).randbytes(SIZE)


def content(file: bytes, backed: bool = False) -> Content:
    """What every guest cluster reads as; None where that is an error."""
    machine = Machine(file, backing() if backed else None)
    machine.open(qcow2.DRIVER, **{"read-only": True})
    out: Content = []
    span = CLUSTER * PER_TABLE
    for start in range(0, machine.format.size, span):
        length = min(span, machine.format.size - start)
        try:
            data = machine.read(start, length)
            out += [data[at : at + CLUSTER] for at in range(0, length, CLUSTER)]
        except (DiskError, ValueError):
            for at in range(start, start + length, CLUSTER):
                try:
                    out.append(machine.read(at, CLUSTER))
                except (DiskError, ValueError):
                    out.append(None)
    return out


def repaired(file: bytes, fix: str) -> tuple[CheckResult, bytes, list[tuple[Any, ...]]]:
    """What the repair found, the file afterwards, and what it wrote."""
    machine = Machine(file)
    machine.open(qcow2.DRIVER, check=True)
    machine.log.clear()
    result: CheckResult = machine.run(machine.format.check(fix))
    return result, bytes(machine.slots["file"]), machine.log


def lost(before: Content, after: Content) -> list[int]:
    """Guest clusters that could be read and read as something else now."""
    return [
        i
        for i, (old, new) in enumerate(zip(before, after, strict=True))
        if old is not None and old != new
    ]


def clean(file: bytes, tmp_path: Path) -> None:
    """Neither check finds anything, and both bits are clear."""
    result = own_check(file)
    assert (result.corruptions, result.leaks, result.findings) == (0, 0, [])
    if Image(file).get(4) >> 32 > 2:
        assert not file[79] & 3
    if oracle.shutil.which("qemu-img") is not None:
        path = tmp_path / "repaired.qcow2"
        path.write_bytes(file)
        (tmp_path / "base.raw").write_bytes(backing())
        done = oracle.run("qemu-img", "check", "-f", "qcow2", str(path))
        assert done.returncode == 0, (done.stdout, done.stderr)


def test_the_undamaged_image_is_left_alone() -> None:
    for compat, backed in (("1.1", False), ("1.1", True), ("0.10", False), ("0.10", True)):
        file = base(compat, backed)
        for fix in ("leaks", "all"):
            result, after, log = repaired(file, fix)
            assert (result.findings, after) == ([], file)
            assert log == []


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_damage(damage: Damage, tmp_path: Path) -> None:
    file = damage.image()
    before = content(file, damage.backing)
    found = own_check(file)
    assert summary(found) == damage.check
    result, after, _ = repaired(file, "leaks")
    assert lost(before, content(after, damage.backing)) == []
    left = own_check(after)
    assert (left.corruptions, left.leaks) == (result.corruptions, result.leaks)
    assert bool(result.leaks_fixed) == (after != file and not result.corruptions_fixed) or (
        damage.name in ("dirty", "corrupt")
    )
    result, after, _ = repaired(file, "all")
    assert (result.corruptions, result.leaks) == (0, 0)
    assert bool(result.corruptions_fixed or result.leaks_fixed) == (damage.check != "nothing")
    assert lost(before, content(after, damage.backing)) == []
    clean(after, tmp_path)


def summary(result: CheckResult) -> str:
    def many(count: int, what: str) -> str:
        return what if count == 1 else what + "s"

    parts = [
        many(count, what)
        for count, what in ((result.corruptions, "corruption"), (result.leaks, "leak"))
        if count
    ]
    return " and ".join(parts) or "nothing"


def rows() -> list[str]:
    return [f"| {d.what} | {d.check} | {d.leaks} | {d.all} |" for d in DAMAGES]


def test_the_page_has_every_row() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## Damages\n")[1].split("\n## ")[0]
    listed = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert listed == rows()
    assert len({d.name for d in DAMAGES}) == len(DAMAGES) >= 40


# -- crash states


def states(file: bytes, log: list[tuple[Any, ...]], most: int) -> list[bytes]:
    """The file after every prefix of the writes (of a long log: some of them), each also with the
    last write torn at a sector and with another one of the same round missing."""
    rng = random.Random(len(log))
    cuts = range(len(log) + 1)
    chosen = cuts if len(log) < most else sorted(rng.sample(cuts, most))
    out = []
    for cut in chosen:
        now = bytearray(file)
        first = max((i + 1 for i in range(cut) if log[i][0] == "barrier"), default=0)
        skip = rng.randrange(first, cut) if cut - first > 1 and rng.random() < 0.5 else -1
        for i, entry in enumerate(log[:cut]):
            if entry[0] == "barrier" or i == skip:
                continue
            assert entry[0] == "write"
            data = entry[2]
            if i == cut - 1 and len(data) > 512 and rng.random() < 0.5:
                data = data[: rng.randrange(0, len(data) // 512) * 512]
            put(now, entry[1], data)
        out.append(bytes(now))
    return out


@pytest.mark.parametrize("fix", ["leaks", "all"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.name)
def test_crash_states(damage: Damage, fix: str) -> None:
    file = damage.image()
    before = content(file, damage.backing)
    _, final, log = repaired(file, fix)
    for number, state in enumerate(states(file, log, 12)):
        assert lost(before, content(state, damage.backing)) == [], number
        _, again, _ = repaired(state, "all")
        assert lost(before, content(again, damage.backing)) == [], number
        result = own_check(again)
        assert (result.corruptions, result.leaks) == (0, 0), number
    assert final is not None


# -- several damages at once


@pytest.mark.parametrize("seed", range(40))
def test_several_damages(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    alike = [d for d in DAMAGES if (d.compat, d.backing) == ("1.1", False)]
    done = 0
    while done < 3:
        names = rng.sample(alike, 2 if seed % 4 else 4)
        image = Image(base())
        try:
            for damage in names:
                damage.make(image)
            file = bytes(image.file)
            before = content(file)
        except (struct.error, DiskError):
            continue  # the first damage took away what the second one wanted
        done += 1
        what = [damage.name for damage in names]
        result, after, _ = repaired(file, "leaks")
        assert lost(before, content(after)) == [], what
        result, after, _ = repaired(file, "all")
        assert (result.corruptions, result.leaks) == (0, 0), what
        assert lost(before, content(after)) == [], what
        clean(after, tmp_path)


@pytest.mark.parametrize(
    "names",
    [("l2-shared", "data-shared-often"), ("l1-at-data", "data-shared"), ("l2-shared", "l2-at-l1")],
)
def test_a_table_that_two_entries_share_with_damages_in_it(
    names: tuple[str, str], tmp_path: Path
) -> None:
    by_name = {damage.name: damage for damage in DAMAGES}
    image = Image(base())
    for name in reversed(names):
        by_name[name].make(image)
    file = bytes(image.file)
    result, after, _ = repaired(file, "all")
    assert (result.corruptions, result.leaks) == (0, 0)
    assert lost(content(file), content(after)) == []
    clean(after, tmp_path)
