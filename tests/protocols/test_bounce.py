"""Unaligned requests: nothing is lost between neighbours in one unit."""

from __future__ import annotations

import random

import pytest

from diskwright.engine.leases import Leases
from diskwright.protocols.bounce import Bounce
from diskwright.protocols.file import FileNode
from diskwright.protocols.memory import MemoryNode

from .support import Watching, using


class Slow:
    """Aligned storage whose requests take a random number of turns."""

    def __init__(self, driver, rng, unit, data=b""):
        self.driver, self.rng, self.unit = driver, rng, unit
        self.memory = MemoryNode(driver, data)
        self.writes: list[tuple[int, int]] = []
        self.reads = 0

    def check(self, offsets, lengths, end=0):
        for offset, length in zip(offsets, lengths, strict=True):
            assert offset % self.unit == 0
            assert length % self.unit == 0 or offset + length == end

    async def wait(self):
        for _ in range(self.rng.randrange(4)):
            await self.driver.turn()

    async def read(self, offsets, lengths):
        self.check(offsets, lengths)
        self.reads += 1
        await self.wait()
        got = await self.memory.read(offsets, lengths)
        await self.wait()
        return got

    async def write(self, offsets, buffers):
        self.check(offsets, list(map(len, buffers)), self.end())
        self.writes += [(o, len(b)) for o, b in zip(offsets, buffers, strict=True)]
        await self.wait()
        await self.memory.write(offsets, buffers)
        await self.wait()

    def end(self):
        return 1 << 62


@pytest.mark.parametrize("seed", range(30))
def test_concurrent_writes_into_the_same_units(seed, driver):
    rng = random.Random(seed)
    unit = rng.choice([8, 512, 4096])
    slow = Slow(driver, rng, unit)
    bounce = Bounce(unit, slow.read, slow.write)
    length = unit * 8
    model = bytearray(length)
    owners = [rng.randrange(6) for _ in range(length // (unit // 8))]

    async def writer(number):
        piece = unit // 8
        mine = [i for i, owner in enumerate(owners) if owner == number]
        for _ in range(6):
            chosen = rng.sample(mine, min(len(mine), rng.choice([1, 2, 5])))
            buffers = [rng.randbytes(piece) for _ in chosen]
            for i, buffer in zip(chosen, buffers, strict=True):
                model[i * piece : (i + 1) * piece] = buffer
            await bounce.write([i * piece for i in chosen], buffers)
            at = chosen[0] * piece
            got = await bounce.read([at], [piece])
            assert bytes(got[0]) == bytes(model[at : at + piece])

    async def steps():
        tasks = [driver.spawn(writer(number)) for number in range(6)]
        for task in tasks:
            await task
        view = memoryview(bytearray(length))
        assert (await bounce.read([0], [length], [view]))[0] is view
        assert view == model
        assert not bounce.leases.queue

    driver.run(steps())


def test_one_batch_is_joined_by_unit_and_the_later_wins(driver):
    slow = Slow(driver, random.Random(0), 512, b"o" * 4096)
    bounce = Bounce(512, slow.read, slow.write)

    async def steps():
        await bounce.write(
            [10, 20, 500, 2048, 3000], [b"a" * 20, b"b" * 20, b"c" * 100, b"d" * 512, b""]
        )
        assert sorted(slow.writes) == [(0, 1024), (2048, 512)]
        assert slow.reads == 1
        assert slow.memory.data[:600] == (
            b"o" * 10 + b"a" * 10 + b"b" * 20 + b"o" * 460 + b"c" * 100
        )
        assert slow.memory.data[600:2048] == b"o" * 1448

    driver.run(steps())


def test_the_end_is_not_moved_when_it_may_be_unaligned(driver):
    class Ending(Slow):
        def end(self):
            return max(self.memory.size, wanted)

    wanted = 0
    slow = Ending(driver, random.Random(0), 512, b"x" * 700)
    bounce = Bounce(512, slow.read, slow.write, end=slow.end)

    async def steps():
        nonlocal wanted
        await bounce.write([600], [b"y" * 50])
        assert slow.memory.size == 700
        wanted = 1100
        await bounce.write([1000], [b"z" * 100])
        assert slow.memory.size == 1100
        assert slow.memory.data == b"x" * 600 + b"y" * 50 + b"x" * 50 + bytes(300) + b"z" * 100

    driver.run(steps())


@pytest.mark.parametrize("cache", ["none", "directsync"])
def test_two_writes_into_one_sector_of_a_real_file(cache, driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(8192))
    watch = Watching()

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True, cache=cache)
        if node.limits.alignment == 1:
            pytest.skip("this file system takes any direct request")
        for turn in range(1, 20):
            futures = [
                driver.start(node.write([at], [bytes([turn]) * 100])) for at in range(0, 4000, 100)
            ]
            futures.append(driver.start(node.zero([5000], [100])))
            futures.append(driver.start(node.write([5100], [bytes([turn]) * 100])))
            futures.append(driver.start(node.write([4096, 8100], [b"\7" * 904, b"\7" * 92])))
            for future in futures:
                await future
            wanted = bytes([turn]) * 4000 + bytes(96) + b"\7" * 904
            assert bytes((await node.read([0], [5000]))[0]) == wanted
            after = bytes((await node.read([5000], [200]))[0])
            assert after == bytes(100) + bytes([turn]) * 100
        assert not watch.calls["fast_write"] + watch.calls["fast_read"]
        await node.close()
        assert path.stat().st_size == 8192

    with using(watch):
        driver.run(steps())


def test_a_direct_file_keeps_an_unaligned_end(driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 1000)

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True, cache="none")
        assert node.size == 1000
        await node.write([900], [b"b" * 300])
        assert node.size == 1200
        assert bytes((await node.read([800], [1000]))[0]) == b"a" * 100 + b"b" * 300 + bytes(600)
        # What is told to be data ends as what is read does.
        unit = node.limits.alignment
        data, *_ = await node.extents(0, 8192)
        assert data.length == -(-1200 // unit) * unit
        await node.flush()
        await node.write([2000], [b"c"])
        await node.close()
        assert path.read_bytes() == b"a" * 900 + b"b" * 300 + bytes(800) + b"c"

    driver.run(steps())


def test_without_leases_bytes_are_lost(driver, monkeypatch):
    """The mutant: the tests above must be able to see what the leases prevent."""
    monkeypatch.setattr(Leases, "_conflict", lambda self, one, other: False)
    lost = 0
    for seed in range(30):
        try:
            test_concurrent_writes_into_the_same_units(seed, driver)
        except AssertionError:
            lost += 1
    assert lost > 10


def test_direct_writes_into_a_file_that_begins_with_a_hole(driver, tmp_path):
    """Reads of a hole succeed unaligned where writes do not: the alignment is not to be
    guessed from them."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(512 << 10)
        file.write(b"d" * 4096)

    async def steps():
        try:
            node = await FileNode.open(driver, str(path), writable=True, cache="none")
        except OSError:
            pytest.skip("no O_DIRECT here")
        await node.write([513, (512 << 10) + 5], [b"one", b"two"])
        await node.flush()
        await node.close()

    driver.run(steps())
    data = path.read_bytes()
    assert (data[512:517], data[512 << 10 : (512 << 10) + 9]) == (b"\0one\0", b"dddddtwod")


def test_a_direct_write_to_the_last_partial_unit_does_not_lengthen_the_file(driver, tmp_path):
    """A multiple of 512, but not of 4096, which a file that begins with a hole asks for."""
    path = tmp_path / "sparse"
    size = 9491 * 512

    async def steps():
        with path.open("wb") as file:
            file.truncate(size)
        try:
            node = await FileNode.open(driver, str(path), writable=True, cache="none")
        except OSError:
            pytest.skip("no O_DIRECT here")
        await node.write([size - 700], [b"\x6f" * 700])
        assert node.size == size
        await node.flush()
        assert path.stat().st_size == size, "after a flush"
        await node.write([size - 100], [b"\x70" * 100])
        await node.close()

    driver.run(steps())
    assert path.read_bytes() == bytes(size - 700) + b"\x6f" * 600 + b"\x70" * 100
