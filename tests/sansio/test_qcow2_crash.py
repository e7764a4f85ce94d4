"""Crash states of qcow2 by bytes alone: any prefix of the writes, with any subset of those that no
barrier covers and one of them torn at a sector, opens, checks without corruptions and holds what
was flushed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from diskwright.contract import DISCARD, WRITE_ZERO, ZERO_UNMAP, Groups
from diskwright.formats import qcow2
from diskwright.formats.qcow2.format import Qcow2
from sansio.machine import Machine, put
from sansio.test_qcow2_cross import made, own_check

SECTOR = 512


class History:
    """For every sector the values it may have after a crash: the last flushed, or any later."""

    def __init__(self, content: bytes) -> None:
        self.now = bytearray(content)
        self.marks: list[tuple[int, bytes]] = [(0, content)]
        """(log length, content) at every flush that was answered."""
        self.steps: list[tuple[int, bytes]] = []
        """(log length before, content after) of every request."""

    def admissible(self, cut: int) -> list[bytes]:
        """Contents that each sector may have after a crash with ``cut`` log entries issued."""
        flushed = [(at, content) for at, content in self.marks if at <= cut]
        at, content = flushed[-1]
        return [content] + [after for before, after in self.steps if at <= before <= cut]


def grow_history(machine: Machine, history: History, rng: random.Random, steps: int) -> None:
    unit, size = machine.format.unit, len(history.now)
    for _ in range(steps):
        before = len(machine.log)
        what = rng.random()
        length = rng.choice([SECTOR, unit, 2 * unit + SECTOR])
        offset = rng.randrange(0, (size - length) // SECTOR + 1) * SECTOR
        if what < 0.55:
            data = bytes([rng.randrange(1, 256)]) * length
            machine.write(offset, data)
            history.now[offset : offset + length] = data
        elif what < 0.8:
            offset -= offset % unit
            length = min(unit * rng.choice([1, 3]), size - offset)
            kind = rng.choice([WRITE_ZERO, ZERO_UNMAP, DISCARD])
            if not machine.change(offset, length, kind):
                continue
            history.now[offset : offset + length] = bytes(length)
        else:
            machine.flush()
            history.marks.append((len(machine.log), bytes(history.now)))
            continue
        history.steps.append((before, bytes(history.now)))


def crash(start: bytes, log: list[tuple[Any, ...]], cut: int, rng: random.Random) -> bytes:
    """The file after a crash with ``cut`` entries issued."""
    file = bytearray(start)
    last = max((i for i in range(cut) if log[i][0] == "barrier"), default=-1)
    chance = rng.choice([0.0, 0.5, 1.0])
    for i, entry in enumerate(log[:cut]):
        if entry[0] == "barrier":
            continue
        if i > last and rng.random() < chance:
            continue
        if entry[0] == "truncate":
            del file[entry[1] :]
            file.extend(bytes(entry[1] - len(file)))
            continue
        assert entry[0] == "write"
        _, offset, data = entry
        if i > last and rng.random() < 0.3:
            boundary = rng.randrange(0, len(data) + 1)
            boundary -= (offset + boundary) % SECTOR
            data = data[: max(boundary, 0)]
        put(file, offset, data)
    return bytes(file)


CASES = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 1},
    {"cluster_size": 4096},
    {"cluster_size": 512, "lazy_refcounts": True},
    {"cluster_size": 512, "refcount_bits": 64, "lazy_refcounts": True},
    {"cluster_size": 512, "compat": "0.10"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("poison", [False, True])
def test_crash_states(options: dict[str, Any], backing: bool, poison: bool) -> None:
    explore(options, backing, poison, 3)


def explore(options: dict[str, Any], backing: bool, poison: bool, seeds: int) -> None:
    """25 crash states of each of ``seeds`` workloads."""
    rng = random.Random(str((options, backing, poison)))
    for seed in range(seeds):
        size = 96 * 1024 + seed * SECTOR
        base = rng.randbytes(size) if backing else None
        machine = made(size, base, **options)
        machine.poison = poison
        start = bytes(machine.slots["file"])
        machine.log.clear()
        history = History(base or bytes(size))
        grow_history(machine, history, rng, 60)
        log = list(machine.log)
        for cut in rng.sample(range(len(log) + 1), min(25, len(log))):
            state = crash(start, log, cut, rng)
            again = Machine(state, base)
            again.open(qcow2.DRIVER)
            result = own_check(bytes(again.slots["file"]))
            assert result.corruptions == 0, (cut, result.findings[:3])
            content = again.read(0, size)
            allowed = history.admissible(cut)
            for at in range(0, size, SECTOR):
                sector = content[at : at + SECTOR]
                assert any(c[at : at + SECTOR] == sector for c in allowed), (cut, hex(at))


def all_at_once(self: Any) -> Groups:
    """No barrier between the data and what points to them."""
    groups = FREEZE(self)
    return Groups([], groups.token, [*groups.lead, *(w for group in groups.groups for w in group)])


def used_at_once(self: Any, start: int, end: int) -> None:
    """Clusters are free before the map on disk lets go of them."""
    self._lower(start, end)
    self.add_free(start, end, False)


def links_first(self: Any) -> Groups:
    """L1 and L2 entries before the refcount table."""
    groups = FREEZE(self)
    return Groups(groups.groups[::-1], groups.token, groups.lead)


FREEZE = Qcow2.freeze

MUTANTS = [
    ("freeze", all_at_once, {"cluster_size": 512}, False),
    ("free_later", used_at_once, {"cluster_size": 512}, True),
    ("freeze", links_first, {"cluster_size": 512, "refcount_bits": 64}, False),
]


@pytest.mark.parametrize(("name", "mutant", "options", "backing"), MUTANTS)
def test_mutants_do_not_survive(
    name: str, mutant: Any, options: dict[str, Any], backing: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Qcow2, name, mutant)
    with pytest.raises(AssertionError):
        explore(options, backing, True, 60)


def resized(size: int, sizes: list[int], seed: int) -> None:
    rng = random.Random(seed)
    machine = made(size, cluster_size=512)
    model = bytearray(rng.randbytes(size))
    machine.write(0, bytes(model))
    machine.flush()
    for target in sizes:
        start = bytes(machine.slots["file"])
        machine.log.clear()
        machine.run(machine.format.resize(target, shrink=True))
        log = list(machine.log)
        kept = min(len(model), target)
        for _ in range(20):
            cut = rng.randrange(0, len(log) + 1)
            state = crash(start, log, cut, rng)
            again = Machine(state)
            image = again.open(qcow2.DRIVER)
            assert image.size in (len(model), target)
            assert own_check(bytes(again.slots["file"])).corruptions == 0
            assert again.read(0, kept) == bytes(model[:kept])
            if image.size > len(model):
                assert not any(again.read(len(model), image.size - len(model)))
        file = bytes(machine.slots["file"])
        if target < len(model):
            assert own_check(file).image_end_offset == len(file)
        model = model[:target].ljust(target, b"\0")
        assert machine.read(0, target) == bytes(model)


@pytest.mark.parametrize("seed", range(4))
def test_resize_crash_states(seed: int) -> None:
    resized(100_352, [3 << 20, 50_176, 4 << 20, 512, 1 << 20], seed)


SHRUNK: list[dict[str, Any]] = [
    {},
    {"lazy_refcounts": True},
    {"refcount_bits": 64},
    {"compat": "0.10"},
    {"cluster_size": 16384, "extended_l2": True},
]


@pytest.mark.parametrize("options", SHRUNK, ids=str)
def test_the_end_of_a_shrunk_file_is_cut_off(options: dict[str, Any]) -> None:
    """What is kept lies before what goes, as a disk that was written in order has it."""
    rng = random.Random(str(options))
    machine = made(256 << 10, **{"cluster_size": 1024, **options})
    model = rng.randbytes(256 << 10)
    for at in range(0, len(model), 16384):
        machine.write(at, model[at : at + 16384])
    machine.flush()
    start = bytes(machine.slots["file"])
    machine.log.clear()
    machine.run(machine.format.resize(64 << 10, shrink=True))
    log = list(machine.log)
    whole = len(machine.slots["file"])
    assert whole < len(start) - (150 << 10)
    assert [entry[0] for entry in log[-3:]] == ["barrier", "truncate", "barrier"]
    for cut in [len(log) - 1, len(log)] + [rng.randrange(len(log)) for _ in range(20)]:
        again = Machine(crash(start, log, cut, rng))
        image = again.open(qcow2.DRIVER)
        assert own_check(bytes(again.slots["file"])).corruptions == 0
        assert image.size in (64 << 10, 256 << 10)
        assert again.read(0, 64 << 10) == model[: 64 << 10]
    again = Machine(bytes(machine.slots["file"]))
    again.open(qcow2.DRIVER)
    again.run(again.format.resize(256 << 10))
    assert again.read(0, 256 << 10) == model[: 64 << 10] + bytes(192 << 10)
    again.write(100 << 10, b"new" * 5000)
    again.flush()
    assert again.read(100 << 10, 15000) == b"new" * 5000


def test_what_is_used_and_not_counted_is_not_cut_off() -> None:
    machine = made(64 << 10, cluster_size=1024)
    model = random.Random(1).randbytes(64 << 10)
    machine.write(63 << 10, model[63 << 10 :])
    machine.write(0, model[: 63 << 10])
    machine.flush()
    file = machine.slots["file"]
    length = len(file)
    host = length - 1024
    assert file[host:] == model[62 << 10 : 63 << 10]
    block = machine.format.block_offset(0)
    file[block + 2 * (host >> 10) : block + 2 * (host >> 10) + 2] = bytes(2)
    again = Machine(bytes(file))
    again.open(qcow2.DRIVER)
    again.run(again.format.resize(63 << 10, shrink=True))
    assert len(again.slots["file"]) == length
    assert again.read(0, 63 << 10) == model[: 63 << 10]


def test_a_device_is_not_cut_off() -> None:
    machine = made(64 << 10, cluster_size=1024)
    machine.write(0, b"x" * (64 << 10))
    machine.flush()
    again = Machine(bytes(machine.slots["file"]))
    again.open(qcow2.DRIVER, zero_beyond_end=False)
    again.run(again.format.resize(1024, shrink=True))
    assert len(again.slots["file"]) == len(machine.slots["file"])
