"""Crash states of taking, applying and deleting snapshots: any prefix of the writes, with any
subset of those that no barrier covers, torn at sectors.  The disk is what it was or what it
becomes, the snapshots hold what they held, and one can write on without their noticing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from diskwright.abilities import SnapshotInfo
from diskwright.errors import CorruptImage
from diskwright.formats import qcow2
from diskwright.formats.qcow2.snapshots import procedures as snapshots
from diskwright.formats.qcow2.snapshots import sharing
from sansio.machine import Machine
from sansio.test_qcow2_crash import crash
from sansio.test_qcow2_cross import own_check, workload
from sansio.test_qcow2_snapshots import Disk, clean, shown

KINDS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 4},
    {"cluster_size": 512, "lazy_refcounts": True},
    {"cluster_size": 512, "compat": "0.10"},
]
STATES = 14


def prepared(options: dict[str, Any], rng: random.Random, base: bytes | None) -> Disk:
    size = 48 * 1024 + 512
    disk = Disk(size, base, **options)
    disk.machine.poison = True
    workload(disk.machine, disk.model, rng.randrange(1 << 30), 20)
    for name in ("one", "two", "three")[: rng.randrange(1, 4)]:
        disk.create(name)
        workload(disk.machine, disk.model, rng.randrange(1 << 30), 12)
    if options.get("compat") != "0.10" and rng.random() < 0.5:
        disk.resize(rng.choice([20 * 1024, 100 * 1024]))
        workload(disk.machine, disk.model, rng.randrange(1 << 30), 5)
    if len(disk.held) > 1 and rng.random() < 0.5:
        disk.delete(rng.choice(list(disk.held)))
    clean(disk.machine)
    return disk


def told(file: bytes) -> list[str]:
    """Corruptions that count, of a check: COPIED may be clear without need, in version 2."""
    found = own_check(file).findings
    harmless = [line for line in found if "OFLAG_COPIED" in line and "refcount=1" in line]
    old = file[7] == 2
    return [line for line in found if "Leaked" not in line and not (old and line in harmless)]


def explore(options: dict[str, Any], backing: bool, action: str, seed: int) -> None:
    rng = random.Random(f"{options}{backing}{action}{seed}")
    base = rng.randbytes(40_000) if backing else None
    disk = prepared(options, rng, base)
    machine = disk.machine
    before, held = bytes(disk.model), dict(disk.held)
    start = disk.file
    machine.log.clear()
    which = rng.choice(list(held))
    if action == "create":
        machine.run(machine.format.create_snapshot(SnapshotInfo("", "new")))
        after, lists = before, [list(held), [i.id for i in machine.format.snapshots]]
        held[lists[1][-1]] = before
    elif action == "apply":
        machine.run(machine.format.apply_snapshot(which, None))
        after, lists = held[which], [list(held)]
    else:
        machine.run(machine.format.delete_snapshot(which, None))
        after, lists = before, [list(held), [i for i in held if i != which]]
    log = list(machine.log)
    for cut in {0, len(log), *rng.sample(range(len(log) + 1), min(STATES, len(log)))}:
        state = crash(start, log, cut, rng)
        again = Machine(state, base)
        image = again.open(qcow2.DRIVER)
        file = bytes(again.slots["file"])
        assert told(file) == [], cut
        ids = [info.id for info in image.snapshots]
        assert ids in lists
        content = again.read(0, image.size)
        assert content in (before, after)
        again.poison = True
        model = bytearray(content)
        workload(again, model, rng.randrange(1 << 30), 12)
        clean(again)
        assert told(bytes(again.slots["file"])) == [], cut
        assert again.read(0, len(model)) == bytes(model)
        for snapshot_id in ids:
            found = shown(bytes(again.slots["file"]), snapshot_id, base)
            assert found == held[snapshot_id], (cut, snapshot_id)


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_crash_states(options: dict[str, Any], action: str) -> None:
    for seed in range(2):
        explore(options, bool(seed), action, seed)


@pytest.mark.parametrize("action", ["create", "apply", "delete"])
@pytest.mark.parametrize("options", [KINDS[0], KINDS[3], KINDS[4]], ids=str)
def test_every_write_fails_once(options: dict[str, Any], action: str) -> None:
    """What an I/O error leaves behind is a good image, whichever write it met."""
    made = prepared(options, random.Random(action), None)
    which, held = next(iter(made.held)), dict(made.held)
    before = bytes(made.model)
    start, failures = made.file, 0
    for turn in range(1000):
        machine = Machine(start)
        image = machine.open(qcow2.DRIVER)
        left, write = [turn], machine.pwrite

        def fails(offset: int, data: bytes, left: Any = left, write: Any = write) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "Input/output error")
            write(offset, data)

        machine.pwrite = fails  # type: ignore[method-assign]
        try:
            if action == "create":
                machine.run(image.create_snapshot(SnapshotInfo("", "new")))
            elif action == "apply":
                machine.run(image.apply_snapshot(which, None))
            else:
                machine.run(image.delete_snapshot(which, None))
        except OSError:
            failures += 1
        again = Machine(bytes(machine.slots["file"]))
        image = again.open(qcow2.DRIVER)
        assert told(bytes(again.slots["file"])) == [], turn
        assert again.read(0, image.size) in (before, held[which])
        for info in image.snapshots:
            known = held.get(info.id, before)
            assert shown(bytes(again.slots["file"]), info.id) == known
        if left[0] >= 0:
            break
    assert failures > 5


def nothing(*_: Any) -> Any:
    return
    yield


class Late(sharing.Recounter):
    """Raises no counts."""

    def _raise(self, start: int, end: int, times: int) -> None:
        pass


@pytest.mark.parametrize(
    ("module", "name", "mutant", "action"),
    [
        (snapshots, "clear_copied", nothing, "create"),
        (snapshots, "Recounter", Late, "create"),
        (snapshots, "Recounter", Late, "apply"),
        (snapshots, "begin", nothing, "create"),
        (snapshots, "begin", nothing, "delete"),
        (snapshots, "set_copied", nothing, "delete"),
    ],
)
def test_mutants_do_not_survive(
    module: Any, name: str, mutant: Any, action: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises((AssertionError, CorruptImage)):
        for seed in range(20):
            explore({"cluster_size": 512}, False, action, seed)
