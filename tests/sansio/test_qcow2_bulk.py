"""qcow2: long writes into clusters of which the image holds none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import WRITE, Plan
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check, verify

KIB = 1 << 10
MIB = 1 << 20


def planned(machine: Machine, *ranges: tuple[int, int]) -> Plan:
    plan: Any = machine._plan(list(ranges), WRITE)
    assert isinstance(plan, Plan)
    return plan


def test_no_entry_is_looked_at_by_itself() -> None:
    machine = made(64 * MIB)
    plan = planned(machine, (MIB, MIB), (2 * MIB, MIB + 512), (4 * MIB + 4096, 8 * MIB))
    assert plan.state.entries == []
    assert sum(len(entries) for _, _, entries in plan.state.runs) == 17 + 16 + 129
    assert len(plan.steps) <= 4  # a run may end where a refcount block stands
    assert sum(step.length for step in plan.steps) == 10 * MIB + 512
    machine.abort(plan)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 64 * KIB + 512)],  # short
        [(0, 4096), (8192, 256 * KIB)],  # two in one cluster
        [(i * 128 * KIB, 4096) for i in range(64)],  # many short ones
        [(512 * KIB, MIB)],  # one cluster is held
    ],
)
def test_others_are_looked_at_one_by_one(ranges: list[tuple[int, int]]) -> None:
    machine = made(64 * MIB)
    machine.write(MIB, b"x")
    plan = planned(machine, *ranges)
    assert plan.state.runs == []
    assert plan.state.entries
    machine.abort(plan)


def test_what_is_around_is_kept() -> None:
    """Over a backing file, and in space that was used before, only whole clusters go this way."""
    machine = made(8 * MIB, backing=b"b" * (8 * MIB))
    assert planned(machine, (0, MIB)).state.runs
    assert not planned(machine, (2 * MIB + 512, MIB)).state.runs
    machine = made(8 * MIB)
    machine.write(0, b"x" * MIB)
    machine.discard(0, MIB)
    machine.poison = True
    machine.flush()
    machine.flush()
    machine.poison = False
    assert machine.format.free.total
    assert not planned(machine, (2 * MIB + 512, MIB // 2)).state.runs


@pytest.mark.parametrize("cluster_size", [512, 4096])
@pytest.mark.parametrize("backing", [False, True])
def test_long_writes_among_others(cluster_size: int, backing: bool, tmp_path: Path) -> None:
    rng = random.Random(cluster_size + backing)
    size = 300 * cluster_size + 512
    base = rng.randbytes(size) if backing else None
    machine = made(size, backing=base, cluster_size=cluster_size)
    model = bytearray(base or bytes(size))
    for turn in range(40):
        length = min(rng.randrange(2 * cluster_size, 90 * cluster_size), size)
        offset = rng.randrange(size - length + 1)
        if rng.random() < 0.7:
            offset -= offset % cluster_size
            length -= length % cluster_size
        if rng.random() < 0.4:
            offset -= offset % cluster_size
            length -= length % cluster_size
            machine.discard(offset, length)
            machine.zero(offset, length)
            model[offset : offset + length] = bytes(length)
            continue
        if rng.random() < 0.2:
            machine.abort(planned(machine, (offset, length)))
            continue
        data = rng.randbytes(length)
        machine.write(offset, data)
        model[offset : offset + length] = data
        if turn % 8 == 0:
            machine.flush()
    assert machine.read(0, size) == bytes(model)
    verify(machine, model, tmp_path)


def test_an_abort_gives_the_clusters_back() -> None:
    machine = made(64 * MIB)
    for _ in range(3):
        plan = planned(machine, (MIB, 20 * MIB))
        assert plan.state.runs
        machine.abort(plan)
    held = own_check(machine.close())
    assert (held.corruptions, held.leaks, held.findings) == (0, 0, [])
