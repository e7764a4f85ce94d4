"""One-pass writing: all units that hold something, in order, each once."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from diskwright.codecs.deflate import Deflate
from diskwright.engine.copy import CopyFailed, Segment
from diskwright.engine.kernel import Driver
from diskwright.engine.stream import JOB, stream
from diskwright.protocols.memory import MemoryNode
from diskwright.testing.memory import RecordingNode
from diskwright.testing.model import pattern

UNIT = 64 << 10


class Listing:
    """Writes (index, length, data) one behind the other."""

    unit = UNIT

    def __init__(self) -> None:
        self.codec = Deflate(1)
        self.indexes: list[int] = []

    def head(self) -> Iterable[bytes]:
        yield b"HEAD"

    def put(self, index: int, packed: bytes) -> Iterable[bytes]:
        self.indexes.append(index)
        yield index.to_bytes(4, "little") + len(packed).to_bytes(4, "little")
        yield packed

    def end(self) -> Iterable[bytes]:
        yield b"TAIL"

    def unpacked(self, image: bytes, size: int) -> bytes:
        """What a reader makes of ``image``."""
        assert image[:4] == b"HEAD" and image[-4:] == b"TAIL"
        out, at = bytearray(size), 4
        while at < len(image) - 4:
            index = int.from_bytes(image[at : at + 4], "little")
            length = int.from_bytes(image[at + 4 : at + 8], "little")
            at += 8 + length
            unit = self.codec.unpack(image[at - length : at], UNIT)
            out[index * UNIT : (index + 1) * UNIT] = unit
        return bytes(out[:size])


@pytest.fixture
def driver() -> Any:
    driver = Driver()
    yield driver
    driver.stop_pool()
    driver.close()


def segments_of(rng: random.Random, source: Any, plain: bytearray) -> list[Segment]:
    """Cut at random; some parts are told to be zeroes (and then are)."""
    out, at = [], 0
    while at < len(plain):
        length = min(rng.choice([700, 4096, 100_000, UNIT, 3 * JOB]), len(plain) - at)
        zero = rng.random() < 0.4
        if zero:
            plain[at : at + length] = bytes(length)
        out.append(Segment(source, at, at, length, zero))
        at += length
    return out


async def given(parts: list[Segment]) -> AsyncIterator[Segment]:
    for part in parts:
        yield part


@pytest.mark.parametrize("seed", range(6))
def test_what_goes_in_comes_out(driver: Driver, seed: int) -> None:
    rng = random.Random(seed)
    plain = bytearray(pattern(seed, 0, 9 * JOB + rng.randrange(UNIT)))
    source = MemoryNode(driver)
    parts = segments_of(rng, source, plain)
    source.data[:] = plain
    source.size = len(plain)
    target, writer = MemoryNode(driver), Listing()
    told: list[tuple[int, bool]] = []
    length = driver.run(
        stream(driver, target, writer, given(parts), lambda n, zero: told.append((n, zero)))
    )
    assert length == target.size
    assert writer.unpacked(bytes(target.data), len(plain)) == plain
    assert writer.indexes == sorted(set(writer.indexes))
    assert sum(n for n, _ in told) == len(plain)
    whole = [plain[i * UNIT : (i + 1) * UNIT] for i in range(-(-len(plain) // UNIT))]
    assert writer.indexes == [i for i, unit in enumerate(whole) if any(unit)]


def test_nothing_is_revisited(driver: Driver) -> None:
    plain = pattern(1, 0, 5 * JOB)
    source, target = MemoryNode(driver, plain), RecordingNode(driver)
    parts = [Segment(source, 0, 0, len(plain))]
    driver.run(stream(driver, target, Listing(), given(parts)))
    end = 0
    for change in target.log:
        assert change.offset == end
        end += len(change.data)
    assert target.counts["write"] <= 5 + 2


def test_an_empty_disk(driver: Driver) -> None:
    target = MemoryNode(driver)
    driver.run(stream(driver, target, Listing(), given([])))
    assert bytes(target.data) == b"HEADTAIL"


def test_failures_say_side_and_place(driver: Driver) -> None:
    plain = pattern(1, 0, 5 * JOB)
    source = RecordingNode(driver, plain)
    source.fail_at = {3: 5}
    parts = [Segment(source, at, at, JOB) for at in range(0, len(plain), JOB)]
    with pytest.raises(CopyFailed) as caught:
        driver.run(stream(driver, MemoryNode(driver), Listing(), given(parts)))
    assert (caught.value.side, caught.value.offset, caught.value.errno) == ("read", 2 * JOB, 5)
    full = MemoryNode(driver, limit=100_000)
    with pytest.raises(CopyFailed) as caught:
        driver.run(stream(driver, full, Listing(), given([Segment(source, 0, 0, 5 * JOB)])))
    assert (caught.value.side, caught.value.errno) == ("write", 28)
    assert not driver.tasks
