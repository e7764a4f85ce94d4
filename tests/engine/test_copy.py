"""The copy loop: how many requests it makes, in which order, and what it says of an error."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any

import pytest

from diskwright.engine import copy as engine_copy
from diskwright.engine.copy import CopyFailed, CopyOptions, Segment, copy
from diskwright.engine.kernel import Driver
from diskwright.protocols.memory import MemoryNode

K = 1 << 10
BUFFER = 256 * K


class Counting(MemoryNode):
    """Memory that notes its requests; reads of a range in ``bad`` fail, and so do writes."""

    def __init__(self, driver: Any, data: bytes) -> None:
        super().__init__(driver, data)
        self.reads: list[list[tuple[int, int]]] = []
        self.writes: list[list[tuple[int, int]]] = []
        self.zeroed: list[list[tuple[int, int]]] = []
        self.bad: set[int] = set()
        self.soon: list[bool] = []

    def _check(self, offsets: Sequence[int]) -> None:
        if self.bad.intersection(offsets):
            raise OSError(errno.EIO, "Input/output error")

    async def read(self, offsets: Any, lengths: Any, into: Any = None) -> Any:
        self.reads.append(list(zip(offsets, lengths, strict=True)))
        self._check(offsets)
        return await super().read(offsets, lengths, into)

    async def write(self, offsets: Any, buffers: Any, flags: int = 0) -> None:
        self.writes.append([(o, len(b)) for o, b in zip(offsets, buffers, strict=True)])
        self._check(offsets)
        await self.driver.turn()
        await super().write(offsets, buffers, flags)

    async def zero(self, offsets: Any, lengths: Any, flags: int = 0) -> None:
        self.zeroed.append(list(zip(offsets, lengths, strict=True)))
        await super().zero(offsets, lengths, flags)

    def will_flush(self, soon: bool) -> None:
        self.soon.append(soon)


@pytest.fixture
def driver() -> Any:
    driver = Driver()
    yield driver
    driver.stop_pool()
    driver.close()


def run(
    driver: Driver,
    target: Counting,
    segments: Sequence[Segment],
    options: CopyOptions,
    told: list[tuple[int, bool]] | None = None,
) -> None:
    async def stream() -> AsyncIterator[Segment]:
        for segment in segments:
            yield segment

    progress = None if told is None else (lambda length, zero: told.append((length, zero)))
    driver.run(copy(driver, target, stream(), options, progress))


def test_small_segments_are_read_and_written_together(driver: Driver) -> None:
    data = Random(1).randbytes(512 * K)
    source, target = Counting(driver, data), Counting(driver, bytes(512 * K))
    segments = [
        Segment(source, at, at, 4 * K, zero=bool(at // (4 * K) % 2))
        for at in range(0, 512 * K, 4 * K)
    ]
    told: list[tuple[int, bool]] = []
    options = CopyOptions(buffer=BUFFER, target_zero=True)
    run(driver, target, segments, options, told)
    assert len(source.reads) == 1 and len(source.reads[0]) == 64
    assert len(target.writes) == 1 and len(target.writes[0]) == 64 and not target.zeroed
    assert sum(n for n, zero in told if zero) == sum(n for n, zero in told if not zero) == 256 * K
    expected = b"".join(
        bytes(4 * K) if at // (4 * K) % 2 else data[at : at + 4 * K]
        for at in range(0, 512 * K, 4 * K)
    )
    assert bytes(target.data) == expected
    assert target.soon == [True, False]


def test_segments_that_follow_each_other_are_one_request(driver: Driver) -> None:
    source, target = Counting(driver, Random(2).randbytes(BUFFER)), Counting(driver, b"")
    run(
        driver,
        target,
        [Segment(source, at, at, 4 * K) for at in range(0, BUFFER, 4 * K)],
        CopyOptions(buffer=BUFFER),
    )
    assert source.reads == [[(0, BUFFER)]] and target.writes == [[(0, BUFFER)]]


def test_what_has_an_order_keeps_it(driver: Driver) -> None:
    data = bytearray(Random(3).randbytes(8 * BUFFER))
    data[20 * K : 40 * K] = bytes(20 * K)
    source = Counting(driver, bytes(data))
    target = Counting(driver, Random(4).randbytes(8 * BUFFER))
    run(driver, target, [Segment(source, 0, 0, 8 * BUFFER)], CopyOptions(buffer=BUFFER))
    assert target.zeroed == [[(20 * K, 20 * K)]]
    assert target.writes[0] == [(0, 20 * K)] and target.writes[1] == [(40 * K, BUFFER - 40 * K)]
    starts = [write[0][0] for write in target.writes]
    assert starts == sorted(starts)
    assert target.data == data


def test_the_first_batches_are_small(driver: Driver) -> None:
    data = Random(7).randbytes(8 << 20)
    source, target = Counting(driver, data), Counting(driver, b"")
    run(driver, target, [Segment(source, 0, 0, len(data))], CopyOptions(buffer=1 << 20))
    sizes = [sum(length for _, length in read) for read in source.reads]
    assert sizes[:3] == [256 * K] * 3 and max(sizes[:6]) == 512 * K and max(sizes) == 1 << 20
    assert target.data == data


@pytest.mark.parametrize("in_order", [True, False])
def test_buffers_are_used_again(
    driver: Driver, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = engine_copy.page_buffer
    monkeypatch.setattr(
        engine_copy, "page_buffer", lambda length: made.append(length) or original(length)
    )
    data = Random(5).randbytes(40 * BUFFER)
    source, target = Counting(driver, data), Counting(driver, b"")
    options = CopyOptions(buffer=BUFFER, workers=4, in_order=in_order)
    run(driver, target, [Segment(source, 0, 0, len(data))], options)
    # In order: one that is written, one behind it, one that is read.
    assert len(made) <= (3 if in_order else 4) and set(made) == {BUFFER}
    assert target.data == data and len(target.writes) == 40


def test_an_error_names_its_side_and_its_offset(driver: Driver) -> None:
    source, target = Counting(driver, Random(6).randbytes(BUFFER)), Counting(driver, b"")
    segments = [Segment(source, at, at, 4 * K) for at in range(0, BUFFER, 8 * K)]
    source.bad = {24 * K}
    with pytest.raises(CopyFailed) as failed:
        run(driver, target, segments, CopyOptions(buffer=BUFFER))
    assert (failed.value.side, failed.value.offset) == ("read", 24 * K)
    assert target.soon == [True, False]
    source.bad, target.bad = set(), {2 * BUFFER}
    whole = [Segment(source, 0, at, BUFFER) for at in range(0, 6 * BUFFER, BUFFER)]
    with pytest.raises(CopyFailed) as failed:
        run(driver, target, whole, CopyOptions(buffer=BUFFER))
    assert (failed.value.side, failed.value.offset) == ("write", 2 * BUFFER)
