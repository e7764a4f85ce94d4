"""Sets of bits, and bitmaps over them, against a set of numbers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.bitmaps import BitmapSet, DirtyBitmap
from diskwright.bits import BitmapError, Bits, Budget
from diskwright.errors import UsageError

CHUNK = 1 << 15


def members(bits: Bits) -> set[int]:
    found: set[int] = set()
    last = -1
    for first, stop in bits.runs():
        assert last < first < stop  # ascending, and not adjacent to the one before
        found.update(range(first, stop))
        last = stop
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3 * CHUNK),
    st.lists(st.tuples(st.integers(0, 3 * CHUNK), st.integers(1, 40_000)), max_size=8),
    st.lists(st.integers(1, 3 * CHUNK), max_size=3),
)
def test_bits(length: int, ranges: list[tuple[int, int]], lengths: list[int]) -> None:
    bits = Bits(length)
    model: set[int] = set()
    for first, n in ranges:
        stop = min(first + n, length)
        if first < stop:
            bits.set(first, stop)
            model.update(range(first, stop))
    assert members(bits) == model
    assert bits.count == len(model)
    first, stop = length // 3, length // 2
    assert {i for a, b in bits.runs(first, stop) for i in range(a, b)} == {
        i for i in model if first <= i < stop
    }
    size = (length + 7) // 8
    raw = bits.data(0, size)
    assert raw == b"".join(bits.data(at, min(1000, size - at)) for at in range(0, size, 1000))
    assert {i for i in range(length) if raw[i >> 3] >> (i & 7) & 1} == model
    other = Bits(length)
    for at in range(0, size, 777):
        other.add_data(at, raw[at : at + 777])
    other.add_data(size, b"\xff" * 9)  # behind the end: ignored
    assert members(other) == model
    for group in (12, 15, 17):
        assert set(bits.groups(group)) >= {i >> group for i in model}
    for longer in lengths:
        bits.resize(longer)
        model = {i for i in model if i < longer}
        assert members(bits) == model
        assert all(bits.get(i) for i in list(model)[:5])
    bits.clear()
    assert not members(bits) and not bits.memory


def test_a_huge_disk_costs_what_is_set() -> None:
    bitmap = DirtyBitmap("b", 64 << 40, 1 << 16)
    bitmap.mark(0, 64 << 40)
    assert bitmap.count == 64 << 40 and bitmap.bits.memory == 0
    assert list(bitmap.extents()) == [(0, 64 << 40, True)]
    bitmap.clear()
    bitmap.mark((32 << 40) + 5, (32 << 40) + 6)
    assert list(bitmap.runs()) == [(32 << 40, 65536)]
    assert bitmap.bits.memory == 4096


def test_beyond_the_budget_too_much_is_dirty_and_never_too_little() -> None:
    budget = Budget(2 * 4096)
    bits = Bits(10 * CHUNK, budget)
    for i in range(10):
        bits.set(i * CHUNK + 7, i * CHUNK + 8)
    assert all(bits.get(i * CHUNK + 7) for i in range(10))
    assert bits.memory <= 3 * 4096
    assert bits.get(5 * CHUNK) and not bits.get(0)
    with pytest.raises(BitmapError):
        Bits(CHUNK * 2, budget).add_data(0, b"\1")
    bits.clear()
    assert budget.left == 2


@pytest.mark.parametrize("seed", range(8))
def test_merging_bitmaps_of_any_granularity(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 5 << 20)
    one = DirtyBitmap("one", size, 1 << rng.randrange(9, 20))
    two = DirtyBitmap("two", size, 1 << rng.randrange(9, 20) if seed < 5 else one.granularity)
    for _ in range(20):
        at = rng.randrange(size)
        rng.choice([one, two]).mark(at, min(size, at + rng.randrange(1, 100_000)))
    before = {at // 512 for o, n in one.runs() for at in range(o, o + n, 512)}
    one.merge(two)
    wanted = set(before)
    for o, n in two.runs():
        first, last = o // one.granularity, (o + n - 1) // one.granularity
        end = min((last + 1) * one.granularity, size)
        wanted |= {at // 512 for at in range(first * one.granularity, end, 512)}
    assert {at // 512 for o, n in one.runs() for at in range(o, o + n, 512)} == wanted
    total = 0
    for offset, length, _ in one.extents():
        assert offset == total
        total += length
    assert total == size
    with pytest.raises(BitmapError, match="different sizes"):
        one.merge(DirtyBitmap("three", size + 1))


def test_what_a_set_follows() -> None:
    found = BitmapSet()
    on, off = DirtyBitmap("on", 1 << 20), DirtyBitmap("off", 1 << 20, enabled=False)
    broken = DirtyBitmap("broken", 1 << 20)
    broken.inconsistent = True
    for bitmap in (on, off, broken):
        found.add(bitmap)
    found.mark([(0, 1), (5, 5), (1 << 20, 2 << 20)])
    assert [bitmap.count for bitmap in found] == [65536, 0, 0]
    assert found.active == [on]
    with pytest.raises(BitmapError, match="already exists: on"):
        found.add(DirtyBitmap("on", 1))
    with pytest.raises(BitmapError, match="'x' not found"):
        found.get("x")
    with pytest.raises(BitmapError, match="inconsistent and cannot be used"):
        broken.check()
    for granularity in (0, 256, 5000, 1 << 32):
        with pytest.raises(UsageError, match="power of 2"):
            DirtyBitmap("g", 1, granularity)
