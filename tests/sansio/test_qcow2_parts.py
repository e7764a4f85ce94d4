"""Parts of the qcow2 machine against plain models."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.contract import DISCARD, OP_DATA, OP_ZERO, WRITE, NeedMeta
from diskwright.errors import NoSpace, UsageError
from diskwright.formats import qcow2
from diskwright.formats.qcow2.machine.refblock import decode, empty, lift, lower
from diskwright.formats.qcow2.machine.runs import RunSet
from sansio.machine import Machine
from sansio.test_qcow2_cross import made, own_check

RUN = st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 40), st.integers(0, 12))


@settings(max_examples=150, deadline=None)
@given(st.lists(RUN, max_size=20), st.integers(0, 50), st.integers(0, 20))
def test_runs(steps: list[tuple[str, int, int]], start: int, length: int) -> None:
    runs, model = RunSet(), set[int]()
    for what, at, count in steps:
        span = set(range(at, at + count))
        if what == "add":
            runs.add(at, at + count)
            model |= span
        else:
            runs.remove(at, at + count)
            model -= span
    assert {c for a, b in runs for c in range(a, b)} == model
    assert runs.total == len(model)
    ordered = list(runs)
    assert all(a < b for a, b in ordered)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(ordered))
    outside = [c for a, b in runs.outside(start, start + length) for c in range(a, b)]
    assert outside == [c for c in range(start, start + length) if c not in model]
    assert all((c in runs) == (c in model) for c in range(60))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 40), st.integers(0, 1)), max_size=12),
    st.integers(0, 511),
)
def test_refcount_blocks(width: int, fills: list[tuple[int, int, int]], at: int) -> None:
    entries = 512
    block = empty(width, entries * width // 8)
    model = [0] * entries
    for start, length, value in fills:
        stop = min(start + length, entries)
        if start < stop:
            block.fill(start, stop, value)
            model[start:stop] = [value] * (stop - start)
    assert [block.get(i) for i in range(entries)] == model
    data = block.encode(0, entries * width // 8)
    again = decode(width, data)
    assert [again.get(i) for i in range(entries)] == model
    zero = next((i for i in range(at, entries) if not model[i]), None)
    run = block.zero_run(at)
    if zero is None:
        assert run is None
    else:
        end = next((i for i in range(zero, entries) if model[i]), entries)
        assert run == (zero, end)
    if width < 8:
        # The first entry is in the least significant bits.
        assert data[0] & ((1 << width) - 1) == model[0]
    else:
        assert int.from_bytes(data[: width // 8], "big") == model[0]


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    st.lists(st.integers(0, 300), min_size=1, max_size=64),
    st.integers(0, 63),
    st.integers(0, 64),
    st.integers(1, 300),
)
def test_many_counts_change_at_once(
    width: int, counts: list[int], start: int, stop: int, times: int
) -> None:
    most = (1 << width) - 1
    model = [min(count, most) for count in counts] + [0] * (64 - len(counts))
    block = empty(width, 64 * width // 8)
    for index, count in enumerate(model):
        block.set(index, count)
    if start >= stop:
        return
    part = model[start:stop]
    assert block.small(start, stop) == (bytes(part) if max(part) < 256 else None)
    wrong = lift(block, start, stop, times, most)
    over = [i for i in range(start, stop) if model[i] + times > most]
    assert wrong == (over[0] if over else None)
    if wrong is None:
        model[start:stop] = [count + times for count in part]
    assert [block.get(i) for i in range(64)] == model
    ones = {i for i in range(start, stop) if model[i] == 1}
    runs = lower(block, start, stop)
    assert {i for first, end in runs for i in range(first, end)} == ones
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs))
    model[start:stop] = [max(count - 1, 0) for count in model[start:stop]]
    assert [block.get(i) for i in range(64)] == model


def test_large_counts_have_no_low_byte() -> None:
    block = decode(16, b"\0\0\1\0\0\0")
    assert [block.get(i) for i in range(3)] == [0, 256, 0]
    assert block.zero_run(0) == (0, 1)


# -- plans


def test_new_space_is_written_only_where_asked() -> None:
    """Beyond the end of the file and without a backing file nothing needs to be filled."""
    machine = made(1 << 20)
    plan = machine._plan([(70_000, 100), (3 << 16, 65536), (4 << 16, 10)], WRITE)
    assert [(s.op, s.guest, s.length) for s in plan.steps] == [
        (OP_DATA, 70_000, 100),
        (OP_DATA, 3 << 16, 65546),
    ]
    machine.abort(plan)
    # What an aborted write left there is unknown, so now whole clusters are.
    plan = machine._plan([(70_000, 100)], WRITE)
    assert [(s.op, s.guest, s.length) for s in plan.steps] == [(OP_DATA, 1 << 16, 65536)]
    machine.abort(plan)
    assert own_check(machine.close()).findings == []


def test_punched_space_is_written_only_where_asked() -> None:
    for poison in (False, True):
        machine = made(1 << 20)
        machine.poison = poison
        machine.write(0, b"x" * 65536)
        machine.discard(0, 65536)
        machine.flush()
        machine.flush()
        end = len(machine.slots["file"])
        plan = machine._plan([(5 << 16, 512)], WRITE)
        (step,) = plan.steps
        assert step.host < end
        assert step.length == (65536 if poison else 512)
        machine.abort(plan)


def test_disk_that_ends_within_a_cluster() -> None:
    """Host bytes behind the end of the disk become zero where they are unknown."""
    machine = made((1 << 16) + 512)
    machine.abort(machine._plan([(1 << 16, 512)], WRITE))
    plan = machine._plan([((1 << 16) + 10, 10)], WRITE)
    assert [(s.op, s.guest - (1 << 16), s.length) for s in plan.steps] == [
        (OP_DATA, 0, 512),
        (OP_ZERO, 512, 65024),
    ]
    machine.abort(plan)


def test_no_space_changes_nothing_and_discards_give_some() -> None:
    file = made(1 << 20, cluster_size=4096).close()
    machine = Machine(file)
    image = machine.open(qcow2.DRIVER, max_file_size=16 * 4096)
    written = 0
    with pytest.raises(NoSpace) as caught:
        while True:
            machine.write(written, b"x" * 4096)
            written += 4096
    assert caught.value.errno == 28
    assert 8 * 4096 <= written < 16 * 4096
    with pytest.raises(NoSpace):
        machine.write(0x80000, b"y" * 40_000)
    machine.flush()
    assert len(machine.slots["file"]) <= 16 * 4096
    machine.discard(0, 8192)
    with pytest.raises(NoSpace):
        # Not before the discard is on disk.
        machine.write(0x80000, b"y" * 8192)
    machine.flush()
    machine.write(0x80000, b"y" * 8192)
    assert machine.read(0, 8192) == bytes(8192)
    assert machine.read(8192, written - 8192) == b"x" * (written - 8192)
    assert own_check(machine.close()).findings == []
    assert image.size == 1 << 20


def test_two_plans_share_a_table_and_one_aborts() -> None:
    machine = made(1 << 20, cluster_size=4096)
    first = machine._plan([(0, 4096)], WRITE)
    second = machine._plan([(4096, 4096)], WRITE)
    machine.abort(first)
    (step,) = second.steps
    machine.pwrite(step.host, b"z" * 4096)
    machine._commit(second)
    machine.flush()
    assert machine.read(0, 8192) == bytes(4096) + b"z" * 4096
    assert own_check(machine.close()).findings == []


def test_misses_come_before_changes() -> None:
    machine = made(1 << 30)
    machine.write(0, b"x")
    machine.write(700 << 20, b"x")
    machine.flush()
    before = bytes(machine.slots["file"])
    image = machine.format
    state = list(image.free), list(image.clean), image.l1[:], image.reftable[:]
    miss = image.plan([(65536, 10), (701 << 20, 10)], WRITE)
    assert isinstance(miss, NeedMeta) and len(miss.ranges) == 2
    assert (list(image.free), list(image.clean), image.l1[:], image.reftable[:]) == state
    assert not machine.store.dirty() and bytes(machine.slots["file"]) == before


def test_space_beyond_the_end_may_hold_anything() -> None:
    file = made(1 << 20).close()
    machine = Machine(file)
    machine.open(qcow2.DRIVER, zero_beyond_end=False)
    plan = machine._plan([(100, 100)], WRITE)
    assert [(s.guest, s.length) for s in plan.steps] == [(0, 65536)]
    machine.abort(plan)


def test_free_space_of_an_earlier_session_is_used_again() -> None:
    machine = made(4 << 20, cluster_size=512)
    machine.write(0, random.Random(1).randbytes(4 << 20))
    machine.flush()
    machine.discard(0, 2 << 20)
    file = machine.close()
    machine = Machine(file)
    machine.open(qcow2.DRIVER)
    machine.write(0, b"q" * (1 << 20))
    machine.flush()
    assert len(machine.slots["file"]) == len(file)
    assert own_check(machine.close()).findings == []


def test_a_discard_writes_little() -> None:
    """Only the changed part of a table is written, in pieces that no torn sector cuts through."""
    machine = made(1 << 30)
    machine.write(0, b"x" * 65536)
    machine.flush()
    machine.log.clear()
    machine.change(0, 65536, DISCARD)
    machine.flush()
    writes = [entry for entry in machine.log if entry[0] == "write" and any(entry[2])]
    assert [len(data) for _, _, data in writes] == [4096]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cluster_size": 1000}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 4 << 20}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"refcount_bits": 3}, "Refcount width must be a power of two and may not exceed 64 bits"),
        ({"refcount_bits": 0}, "Refcount width must be a power of two and may not exceed 64 bits"),
        ({"compat": "0.9"}, "Parameter 'version' does not accept value '0.9'"),
        (
            {"compat": "0.10", "lazy_refcounts": True},
            "Lazy refcounts only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)",
        ),
        ({"size": 200 << 30, "cluster_size": 512}, "The image size is too large for file format"),
        ({"backing_file": "b", "preallocation": "full"}, "Backing file and preallocation can only"),
        (
            {"backing_file": "b" * 400, "backing_fmt": "raw", "cluster_size": 512},
            "with format 'raw': No space left on device",
        ),
    ],
)
def test_create_refuses(options: dict[str, object], text: str) -> None:
    machine = Machine()
    with pytest.raises(UsageError) as caught:
        machine.run(qcow2.create_new({"size": 1 << 20, **options}))
    assert text in str(caught.value)
    assert not machine.slots["file"]
