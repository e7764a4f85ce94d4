"""Compressed units: each is unpacked once a batch, kept for a while, and never believed blindly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from diskwright.codecs.deflate import BARE, FRAMED, Deflate
from diskwright.codecs.zstd import Zstd
from diskwright.contract import NeedMeta, Range
from diskwright.engine.kernel import Driver
from diskwright.engine.packed import KEPT
from diskwright.errors import CorruptImage
from diskwright.extents import Data, Extent, Packed, Zero, shorten
from diskwright.graph.mapped import MappedNode
from diskwright.protocols.memory import MemoryNode
from diskwright.testing.model import pattern

UNIT = 64 << 10


class Counting(Deflate):
    """Counts what it unpacks."""

    unpacked = 0

    def unpack(self, data: Any, unit: int) -> bytes:
        self.unpacked += 1
        return super().unpack(data, unit)


class Squeezed:
    """A read-only disk whose units are, in turn, packed, plain and zero."""

    name = "squeezed"
    unit = UNIT
    cipher_unit = 1
    tables: Any

    def __init__(self, plain: bytes) -> None:
        self.size = len(plain)
        self.codec = Counting()
        self.file = bytearray()
        self.units: list[Extent] = []
        for number, at in enumerate(range(0, len(plain), UNIT)):
            data = plain[at : at + UNIT]
            host = len(self.file)
            if not data.strip(b"\0"):
                self.units.append(Zero(UNIT))
            elif number % 3 == 1:
                self.units.append(Data("file", host, UNIT))
                self.file += data
            else:
                packed = self.codec.pack(data)
                self.units.append(Packed("file", host, len(packed), UNIT, self.codec, UNIT))
                self.file += packed + b"what follows is not the stream's"

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        out: list[Extent] = []
        for offset, length in ranges:
            while length:
                skip = offset % UNIT
                part = min(UNIT - skip, length)
                out.append(shorten(self.units[offset // UNIT], skip, part))
                offset += part
                length -= part
        return out, None


def disk() -> tuple[bytes, Squeezed]:
    plain = pattern(1, 0, 40 * UNIT)
    plain = plain[: 7 * UNIT] + bytes(2 * UNIT) + plain[9 * UNIT :]
    return plain, Squeezed(plain)


def opened(driver: Driver, format: Squeezed) -> MappedNode:
    node = MappedNode(driver, "squeezed", format, {"file": MemoryNode(driver, format.file)})
    node.read_only = True
    return node


@pytest.fixture
def driver() -> Any:
    driver = Driver()
    yield driver
    driver.stop_pool()
    driver.close()


def test_random_reads(driver: Driver) -> None:
    plain, format = disk()
    node = opened(driver, format)
    rng = random.Random(5)
    for _ in range(40):
        offsets = [rng.randrange(len(plain)) for _ in range(rng.randrange(1, 9))]
        lengths = [rng.randrange(0, min(200_000, len(plain) - o) + 1) for o in offsets]
        found = driver.run(node.read(offsets, lengths))
        for offset, length, data in zip(offsets, lengths, found, strict=True):
            assert bytes(data) == plain[offset : offset + length]


def test_a_unit_is_unpacked_once(driver: Driver) -> None:
    plain, format = disk()
    node = opened(driver, format)
    step = 4096
    for at in range(0, 3 * UNIT, step):
        assert bytes(driver.run(node.read([at], [step]))[0]) == plain[at : at + step]
    assert format.codec.unpacked == 2  # units 0 and 2; unit 1 is plain
    driver.run(node.read([0, 100, 2 * UNIT - 50], [50, 5000, 100]))
    assert format.codec.unpacked == 2


def test_units_that_follow_each_other_are_one_read(driver: Driver) -> None:
    plain, format = disk()
    format.file = bytearray(b"another's")
    for index, at in enumerate(range(0, len(plain), UNIT)):
        packed = format.codec.pack(plain[at : at + UNIT])
        # The sectors that a descriptor counts reach into the next unit, as those of qcow2 do.
        host, length = len(format.file), len(packed) + 300
        format.units[index] = Packed("file", host, length, UNIT, format.codec, UNIT)
        format.file += packed
    format.file += bytes(300)
    node = opened(driver, format)
    file = node.child("file")
    asked: list[tuple[int, int]] = []
    read, compute = file.read, driver.compute
    jobs: list[Any] = []

    def watched(offsets: Any, lengths: Any, into: Any = None) -> Any:
        asked.extend(zip(offsets, lengths, strict=True))
        return read(offsets, lengths, into)

    file.read = watched
    driver.compute = lambda *job: (jobs.append(job), compute(*job))[1]
    (found,) = driver.run(node.read([0], [format.size]))
    assert bytes(found) == plain
    assert len(asked) == len(jobs) == 3  # 40 units of 64 KiB, 16 a job
    assert sum(length for _, length in asked) <= len(format.file) + 600


def test_what_is_kept_has_a_bound(driver: Driver) -> None:
    _, format = disk()
    node = opened(driver, format)
    unpacker = node.engine.unpacker
    driver.run(node.read([0], [format.size]))
    assert not unpacker._weight  # who took whole units goes on to others
    offsets = list(range(0, format.size, UNIT))
    driver.run(node.read(offsets, [4096] * len(offsets)))
    assert 0 < unpacker._weight == sum(map(len, unpacker._kept.values())) <= KEPT
    unpacker.forget()
    before = format.codec.unpacked
    driver.run(node.read([0], [4096]))
    assert format.codec.unpacked == before + 1


def test_a_damaged_unit(driver: Driver) -> None:
    _, format = disk()
    unit = format.units[2]
    assert isinstance(unit, Packed)
    format.file[unit.host + 8 : unit.host + 40] = bytes(32)
    node = opened(driver, format)
    with pytest.raises(CorruptImage) as caught:
        driver.run(node.read([2 * UNIT], [4096]))
    assert caught.value.offset == unit.host
    with pytest.raises(CorruptImage):  # in the pool, among others
        driver.run(node.read([0], [format.size]))
    driver.run(node.read([0], [UNIT]))


@pytest.mark.parametrize("bits", [BARE, FRAMED])
def test_the_codec(bits: int) -> None:
    codec = Deflate(6, bits)
    plain = pattern(3, 0, UNIT)
    packed = codec.pack(plain)
    assert codec.unpack(packed + b"\xff" * 600, UNIT) == plain
    with pytest.raises(ValueError, match=r"damaged|hold"):
        codec.unpack(packed[: len(packed) // 2], UNIT)
    with pytest.raises(ValueError, match="damaged"):
        codec.unpack(b"\xff" * 100, UNIT)
    with pytest.raises(ValueError, match="hold"):
        codec.unpack(codec.pack(plain[:100]), UNIT)
    bomb = codec.pack(bytes(50 << 20))
    assert codec.unpack(bomb, UNIT) == bytes(UNIT)


def test_a_zstd_machine_that_is_used_again_starts_anew() -> None:
    library = pytest.importorskip("zstandard")
    codec = Zstd()
    units = [bytes([n]) * 100 + random.Random(n).randbytes(900) for n in range(4)]
    frames = [codec.pack(unit) for unit in units]
    silent = library.ZstdCompressor(write_content_size=False).compress(units[3])
    long = library.ZstdCompressor().compress(units[0] * 1000)
    for _ in range(2):
        for unit, frame in zip(units, frames, strict=True):
            assert codec.unpack(frame + b"tail", 1000) == unit
            assert codec.unpack(memoryview(silent + b"tail"), 1000) == units[3]
            assert codec.unpack(long, 1000) == units[0]  # left in the middle of the frame
            with pytest.raises(ValueError, match=r"damaged|hold"):
                codec.unpack(frame[:-400], 1000)
            with pytest.raises(ValueError, match="hold 1000 bytes"):
                codec.unpack(frame, 1001)
