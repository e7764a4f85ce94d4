"""Holes, zeroes, discards, allocation, copies, and a file system that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
from itertools import pairwise

import pytest

from diskwright.contract import MAY_UNMAP, NO_FALLBACK
from diskwright.errors import NotSupported, UsageError
from diskwright.extents import Data, Zero
from diskwright.protocols.file import FileNode
from diskwright.protocols.memory import MemoryNode
from diskwright.protocols.os_portable import Portable
from diskwright.protocols.space import rough_runs

from .support import Watching, using

K = 1024


def hole(length):
    return Zero(length, explicit=False)


async def make(driver, path, **options):
    node = await FileNode.open(driver, str(path), create=True, **options)
    await node.truncate(1024 * K)
    return node


def has_holes(path) -> bool:
    path.write_bytes(b"")
    os.truncate(path, 1 << 20)
    return path.stat().st_blocks == 0


class TestMap:
    def test_data_and_holes(self, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x")
            await node.write([64 * K, 128 * K], [b"x" * 64 * K, b"y" * 4 * K])
            await node.flush()
            whole = await node.extents(0, 2048 * K)
            assert whole == [
                hole(64 * K),
                Data("", 64 * K, 68 * K, True),
                hole(892 * K),
                hole(1024 * K),
            ]
            calls = watch.calls["data_from"]
            assert await node.extents(70 * K, 10 * K) == [Data("", 70 * K, 10 * K, True)]
            assert await node.extents(1020 * K, 8 * K) == [hole(4 * K), hole(4 * K)]
            assert watch.calls["data_from"] == calls  # remembered
            await node.write([256 * K], [b"z"])
            found = await node.extents(200 * K, 100 * K)
            assert found[0] == hole(56 * K)
            assert found[1].host == 256 * K
            assert watch.calls["data_from"] > calls
            await node.close()
            node = await FileNode.open(driver, str(tmp_path / "x"), force_share=True)
            for _ in range(2):
                calls = watch.calls["data_from"]
                await node.extents(0, 4 * K)
                assert watch.calls["data_from"] > calls
            assert (await node.extents(64 * K, 4 * K)) == [Data("", 64 * K, 4 * K, False)]
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_many_runs_are_found_in_one_go(self, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x")
            at = list(range(0, 1024 * K, 16 * K))
            await node.write(at, [b"x" * 4 * K] * len(at))
            await node.flush()
            jobs = []
            call = driver.call
            driver.call = lambda *a: (jobs.append(a), call(*a))[1]
            for offset in range(0, 1024 * K, 4 * K):
                found = await node.extents(offset, 4 * K)
                assert len(found) == 1
                assert isinstance(found[0], Data) == (offset % (16 * K) == 0)
            assert len(jobs) <= 5
            driver.call = call
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_a_file_system_without_seek_hole(self, driver, tmp_path):
        watch = Watching()
        watch.fail["data_from"] = errno.EINVAL

        async def steps():
            node = await make(driver, tmp_path / "x")
            for _ in range(3):
                assert await node.extents(4 * K, 2048 * K) == [
                    Data("", 4 * K, 1020 * K, True),
                    hole(1028 * K),
                ]
            assert watch.calls["data_from"] == 1
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_short_holes_are_not_asked_for_one_by_one(self, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x")
            at = list(range(128 * K, 640 * K, 8 * K))
            await node.write(at, [b"x" * 4 * K] * len(at))
            await node.flush()
            calls = watch.calls["data_from"]
            found = await node.rough_extents(0, 2048 * K, 64 * K)
            assert watch.calls["data_from"] - calls <= 10
            assert found[0] == hole(128 * K)
            assert isinstance(found[1], Data)
            assert found[1].host == 128 * K
            assert 508 * K <= found[1].length <= 512 * K + 64 * K
            assert found[2:] == [hole(896 * K - found[1].length), hole(1024 * K)]
            # What is exact stays so.
            assert len(await node.extents(0, 1024 * K)) == 2 * len(at) + 1
            assert await node.rough_extents(1024 * K, 4 * K, 64 * K) == [hole(4 * K)]
            await node.close()

        with using(watch):
            driver.run(steps())

    @pytest.mark.parametrize("seed", range(40))
    def test_what_is_told_roughly_is_true(self, seed):
        """All data is told as data, and every hole between that is twice as long as asked."""
        rng = random.Random(seed)
        runs = []  # of data: start, end
        at = rng.choice((0, 4))
        for _ in range(rng.randrange(12)):
            end = at + rng.choice((1, 2, 4, 30))
            runs.append((at, end))
            at = end + rng.choice((1, 2, 7, 8, 15, 16, 40))
        size = at if rng.random() < 0.5 else max(runs[-1][1] if runs else 1, 1)

        class Told(Portable):
            def data_from(self, fd, offset):
                later = [(a, b) for a, b in runs if b > offset]
                return (max(later[0][0], offset), later[0][1]) if later else None

        start = rng.randrange(size)
        least = 8
        position = start
        previous = None
        told = {}
        for end, data in rough_runs(Told(), -1, start, size, least):
            assert end > position
            assert data is not previous
            told.update(dict.fromkeys(range(position, end), data))
            position, previous = end, data
        assert position == size
        assert all(told[i] for a, b in runs for i in range(max(a, start), min(b, size)))
        ends = [(start, start), *runs, (size, size)]
        for (_, left), (right, _) in pairwise(ends):
            left, right = max(left, start), min(right, size)
            if right - left >= 2 * least:
                assert not any(told[i] for i in range(left + least, right))

    def test_a_change_while_it_is_asked_is_not_remembered(self, driver, tmp_path):
        async def steps():
            node = await make(driver, tmp_path / "x")
            asked = driver.start(node.extents(0, 1024 * K))
            await node.write([0], [b"x" * 4096])
            await asked
            assert (await node.extents(0, 1024 * K))[0].kind == 0
            await node.close()

        driver.run(steps())


class TestZero:
    @pytest.mark.parametrize(
        ("flags", "missing", "calls", "allocated"),
        [
            (0, (), {"zero_range": 1}, True),
            (MAY_UNMAP, (), {"punch": 1}, False),
            (MAY_UNMAP, ("punch",), {"punch": 1, "zero_range": 1}, True),
            (0, ("zero_range",), {"zero_range": 1, "punch": 1, "allocate": 1}, True),
            (0, ("zero_range", "allocate"), {"zero_range": 1, "punch": 1, "allocate": 1}, False),
            (0, ("zero_range", "punch"), {"zero_range": 1, "punch": 1, "fast_write": 1}, True),
        ],
    )
    def test_ways(self, flags, missing, calls, allocated, driver, tmp_path):
        path = tmp_path / "x"
        if not has_holes(path):
            pytest.skip("this file system has no holes")
        watch = Watching()
        for row in missing:
            watch.fail[row] = errno.EOPNOTSUPP

        async def steps():
            node = await make(driver, path)
            await node.write([0], [b"x" * 256 * K])
            watch.calls.clear()
            await node.zero([64 * K, 128 * K], [64 * K, 8 * K], flags)
            assert {k: v for k, v in watch.calls.items() if k in calls} == calls
            got = bytes((await node.read([0], [256 * K]))[0])
            assert got == b"x" * 64 * K + bytes(72 * K) + b"x" * 120 * K
            await node.flush()
            assert (path.stat().st_blocks * 512 >= 256 * K) is allocated
            watch.calls.clear()
            await node.zero([0], [4 * K], flags)
            for row in missing:
                assert not watch.calls[row]  # asked once
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_no_fallback(self, driver, tmp_path):
        watch = Watching()
        watch.fail = {"punch": errno.EOPNOTSUPP, "zero_range": errno.EOPNOTSUPP}

        async def steps():
            node = await make(driver, tmp_path / "x")
            await node.write([0], [b"x" * 64 * K])
            with pytest.raises(OSError) as error:
                await node.zero([0], [64 * K], NO_FALLBACK | MAY_UNMAP)
            assert error.value.errno == errno.ENOTSUP
            assert bytes((await node.read([0], [4]))[0]) == b"xxxx"
            await node.zero([2048 * K], [4 * K], NO_FALLBACK)  # growth is zero already
            assert node.size == 2052 * K
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_discard_off_keeps_the_space(self, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x", discard="ignore")
            await node.write([0], [b"x" * 64 * K])
            watch.calls.clear()
            await node.discard([0], [64 * K])
            await node.zero([0], [4 * K], MAY_UNMAP)
            assert not watch.calls["punch"]
            got = bytes((await node.read([0], [8 * K]))[0])
            assert got == bytes(4 * K) + b"x" * 4 * K
            await node.close()

        with using(watch):
            driver.run(steps())

    def test_discard(self, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x")
            await node.write([0], [b"x" * 64 * K])
            watch.calls.clear()
            await node.discard([4 * K, 0, 1020 * K], [4 * K, 4 * K, 100 * K])
            assert watch.calls["punch"] == 2
            assert node.size == 1024 * K
            assert not any((await node.read([0], [8 * K]))[0])
            await node.flush()
            watch.fail["punch"] = errno.EOPNOTSUPP
            await node.discard([0], [64 * K])  # advisory
            await node.close()

        with using(watch):
            driver.run(steps())

    @pytest.mark.parametrize("portable", [True, False])
    def test_growing_by_zeroes_does_not_cut_off_a_write(self, portable, driver, tmp_path):
        path = tmp_path / "x"
        base = Portable if portable else Watching

        class Racing(base):
            """Somebody writes between the look at the length and what follows from it."""

            late = False

            def device(self, fd):
                found = super().device(fd)
                if self.late:
                    self.late = False
                    with open(path, "r+b") as other:
                        other.seek(200 * K)
                        other.write(b"late")
                return found

        table = Racing()

        async def steps():
            node = await FileNode.open(driver, str(path), create=True)
            table.late = True
            await node.zero([0], [64 * K])
            assert node.refresh() == 200 * K + 4
            assert bytes((await node.read([200 * K], [4]))[0]) == b"late"
            await node.close()

        with using(table):
            driver.run(steps())


class TestLength:
    @pytest.mark.parametrize("mode", ["off", "falloc", "full"])
    @pytest.mark.parametrize("without", [(), ("allocate",)])
    def test_growth(self, mode, without, driver, tmp_path):
        path = tmp_path / "x"
        if not has_holes(path):
            pytest.skip("this file system has no holes")
        watch = Watching()
        for row in without:
            watch.fail[row] = errno.EOPNOTSUPP
        seen = []

        class Parent:
            def child_changed(self, slot):
                seen.append(slot)

        async def steps():
            node = await FileNode.open(driver, str(path), writable=True)
            node.parents.append(type("Edge", (), {"parent": Parent(), "slot": "file"})())
            await node.write([0], [b"x" * 1000])
            await node.truncate(4096 * K + 5, mode)
            assert node.size == path.stat().st_size == 4096 * K + 5
            assert seen == ["file"]
            got = bytes((await node.read([1024 * K], [3072 * K]))[0])
            assert got == bytes(len(got))
            await node.flush()
            allocated = path.stat().st_blocks * 512 >= 3 * 1024 * K
            assert allocated is (mode != "off")
            with pytest.raises(UsageError):
                await node.truncate(8192 * K, "metadata")
            if mode != "off":
                with pytest.raises(NotSupported):
                    await node.truncate(10, mode)
            await node.truncate(10)
            assert node.size == 10
            await node.close()

        with using(watch):
            driver.run(steps())

    @pytest.mark.parametrize("mode", ["falloc", "full"])
    def test_growth_that_fails_leaves_the_old_length(self, mode, driver, tmp_path):
        watch = Watching()

        async def steps():
            node = await make(driver, tmp_path / "x")
            watch.fail["allocate"] = watch.fail["write"] = errno.ENOSPC
            with pytest.raises(OSError) as error:
                await node.truncate(2048 * K, mode)
            assert error.value.errno == errno.ENOSPC
            assert node.size == (tmp_path / "x").stat().st_size == 1024 * K
            await node.close()

        with using(watch):
            driver.run(steps())


class TestCopy:
    def test_inside_the_system(self, driver, tmp_path):
        data = random.Random(3).randbytes(300 * K)
        (tmp_path / "a").write_bytes(data)
        watch = Watching()

        async def steps():
            source = await FileNode.open(driver, str(tmp_path / "a"))
            target = await make(driver, tmp_path / "b")
            done = 0
            while done < 300 * K - 5:
                count = await target.copy_range(source, 5 + done, 77 + done, 300 * K)
                assert count
                done += count
            assert done == 300 * K - 5
            assert watch.calls["copy"]
            assert bytes((await target.read([77], [done]))[0]) == data[5:]
            assert not watch.calls["clone"]
            await target.copy_range(source, 0, 1024 * K, 8 * K)
            assert watch.calls["clone"] == 1
            assert target.size == 1032 * K
            assert await target.copy_range(source, 300 * K, 0, 10) == 0
            assert await target.copy_range(MemoryNode(driver, b"x"), 0, 0, 1) == 0
            await target.close()
            await source.close()

        with using(watch):
            driver.run(steps())

    @pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_where_it_cannot(self, number, driver, tmp_path):
        watch = Watching()
        watch.fail = {"copy": number, "clone": number}
        (tmp_path / "a").write_bytes(b"a" * 4096)

        async def steps():
            source = await FileNode.open(driver, str(tmp_path / "a"))
            target = await make(driver, tmp_path / "b")
            for _ in range(2):
                assert await target.copy_range(source, 0, 0, 4096) == 0
            assert watch.calls["copy"] == watch.calls["clone"] == 1
            await target.close()
            await source.close()

        with using(watch):
            driver.run(steps())

    def test_an_error_is_an_error(self, driver, tmp_path):
        watch = Watching()
        watch.fail = {"copy": errno.EIO, "clone": errno.EOPNOTSUPP}
        (tmp_path / "a").write_bytes(b"a" * 4096)

        async def steps():
            source = await FileNode.open(driver, str(tmp_path / "a"))
            target = await make(driver, tmp_path / "b")
            with pytest.raises(OSError) as error:
                await target.copy_range(source, 0, 0, 4096)
            assert error.value.errno == errno.EIO
            await target.close()
            await source.close()

        with using(watch):
            driver.run(steps())


@contextlib.contextmanager
def small_file_system(path, size):
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("inline", [True, False])
def test_a_full_file_system(inline, driver, tmp_path):
    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "small" / "x"), create=True)
        if not inline:
            node.inline_write = 0
        with pytest.raises(OSError) as error:
            for at in range(0, 4096 * K, 64 * K):
                await node.write([at, at + 32 * K], [b"x" * 32 * K] * 2)
        assert error.value.errno == errno.ENOSPC
        assert node.size == os.stat(node.filename).st_size
        # What was written before is there, and there is room again after a discard.
        assert not bytes((await node.read([0], [node.size]))[0]).strip(b"x")
        with pytest.raises(OSError):
            await node.truncate(8192 * K, "falloc")
        await node.discard([0], [256 * K])
        await node.write([0], [b"y" * 64 * K])
        await node.flush()
        await node.close()

    with small_file_system(tmp_path / "small", "1m"):
        driver.run(steps())
