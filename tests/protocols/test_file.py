"""Protocol file: bytes, ends, short counts, where a batch runs, how many calls it costs."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from diskwright.contract import FUA, MAY_UNMAP
from diskwright.engine.kernel import Cancelled
from diskwright.errors import NodeClosed, UsageError
from diskwright.protocols.file import DRIVER, FileNode, cache_mode, create_file, open_file
from diskwright.protocols.os_portable import Portable, table
from diskwright.protocols.transfer import Guard

from .support import Watching, drop_cache, using


@pytest.fixture(params=["linux", "portable"])
def system(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setenv("DISKWRIGHT_PORTABLE", "1")
        assert type(table()) is Portable
    return request.param


MODES = ["writeback", "writethrough", "unsafe", "none", "directsync"]


@pytest.mark.parametrize("cache", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_any_requests_against_a_model(system, cache, seed, driver, tmp_path):
    if system == "portable" and cache in ("none", "directsync"):
        pytest.skip("the portable table has no direct I/O")
    rng = random.Random(f"{cache}{seed}")
    model = bytearray()
    path = tmp_path / "disk"

    async def steps():
        node = await FileNode.open(driver, str(path), create=True, cache=cache)

        def grow(end):
            model.extend(bytes(max(0, end - len(model))))

        for _ in range(120):
            count = rng.choice([1, 1, 2, 8])
            unit = rng.choice([1, 1, 512, 4096])
            offsets = [rng.randrange(300_000 // unit) * unit for _ in range(count)]
            lengths = [rng.randrange(1, 20_000 // unit + 2) * unit for _ in range(count)]
            if rng.random() < 0.3:  # neighbours
                for i in range(1, count):
                    offsets[i] = offsets[i - 1] + lengths[i - 1]
            kind = rng.choice("rrrwwwzdtef")
            if kind == "r":
                into = None
                if rng.random() < 0.5:
                    into = [memoryview(bytearray(b"\xee" * n)) for n in lengths]
                got = await node.read(offsets, lengths, into)
                if into is not None:
                    assert all(a is b for a, b in zip(got, into, strict=True))
                for offset, length, part in zip(offsets, lengths, got, strict=True):
                    assert bytes(part) == bytes(model[offset : offset + length]).ljust(
                        length, b"\0"
                    )
            elif kind == "w":
                buffers = [rng.randbytes(n) for n in lengths]
                await node.write(offsets, buffers, rng.choice([0, 0, FUA]))
                for offset, part in zip(offsets, buffers, strict=True):
                    grow(offset + len(part))
                    model[offset : offset + len(part)] = part
            elif kind == "z":
                await node.zero(offsets, lengths, rng.choice([0, MAY_UNMAP]))
                for offset, length in zip(offsets, lengths, strict=True):
                    grow(offset + length)
                    model[offset : offset + length] = bytes(length)
            elif kind == "d":
                await node.discard(offsets, lengths)
                for offset, length in zip(offsets, lengths, strict=True):
                    end = min(offset + length, len(model))
                    now = (await node.read([offset], [max(0, end - offset)]))[0]
                    assert bytes(now) in (bytes(model[offset:end]), bytes(max(0, end - offset)))
                    model[offset:end] = now
            elif kind == "t" and rng.random() < 0.3:
                size = rng.randrange(400_000)
                await node.truncate(size, "falloc" if size > len(model) else "off")
                del model[size:]
                grow(size)
            elif kind == "e":
                at = 0
                for extent in await node.extents(0, len(model) + 5000):
                    if extent.kind == 1:
                        part = model[at : at + extent.length]
                        assert part == bytes(len(part))
                    else:
                        assert (extent.slot, extent.host) == ("", at)
                    at += extent.length
                assert at == len(model) + 5000
            elif kind == "f":
                await node.flush()
            assert node.size == len(model)
        await node.close()

    driver.run(steps())
    assert path.read_bytes() == model


def test_later_of_overlapping_requests_wins(driver, tmp_path):
    async def steps(cache):
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True, cache=cache)
        await node.write([0, 1024, 512], [b"a" * 4096, b"b" * 4096, b"c" * 1024])
        assert bytes((await node.read([0], [6000]))[0]) == (
            b"a" * 512 + b"c" * 1024 + b"b" * 3584 + bytes(880)
        )
        await node.close()

    for cache in ("writeback", "none"):
        driver.run(steps(cache))


@pytest.mark.parametrize("limit", [1, 700, 4096])
def test_short_transfers_are_finished(limit, driver, tmp_path):
    slow = Watching()
    data = random.Random(1).randbytes(20_000)

    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
        slow.limit = limit
        await node.write([0], [data])
        await node.write([20_000, 25_000, 30_000], [data[:5000]] * 3)
        await node.write([40_000, 50_000], [data[:3000], data[:4000]])
        assert (await node.read([0], [20_000]))[0] == data
        got = await node.read([20_000, 25_000, 30_000, 50_000], [5000] * 4)
        assert [bytes(part) for part in got] == [
            *[data[:5000]] * 3,
            data[:4000] + bytes(1000),
        ]
        node.inline_read = node.inline_write = 0
        await node.write([1, 5001], [data[:5000], data[:100]])
        assert [bytes(p) for p in await node.read([1, 5001], [5000, 100])] == [
            data[:5000],
            data[:100],
        ]
        await node.close()

    with using(slow):
        driver.run(steps())


def test_many_neighbours_need_several_vectors(driver, tmp_path):
    watch = Watching()
    count = 2 * watch.vectors + 5

    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
        await node.write([i * 8 for i in range(count)], [b"%08d" % i for i in range(count)])
        assert watch.calls["write"] == 3
        assert watch.calls["fast_write"] == 0
        node.inline_read = 0
        watch.calls.clear()
        got = await node.read([i * 8 for i in range(count)], [8] * count)
        assert [bytes(part) for part in got] == [b"%08d" % i for i in range(count)]
        assert watch.calls["read"] == 3
        await node.close()

    with using(watch):
        driver.run(steps())


def test_a_batch_of_cached_reads_is_one_call_each_and_no_thread(driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(1 << 20))
    watch = Watching()

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True)
        watch.calls.clear()
        await node.read([4096 * (i * 7 % 200) for i in range(32)], [4096] * 32)
        assert watch.calls == {"fast_read": 32}
        watch.calls.clear()
        await node.write([8192 * i for i in range(32)], [b"x" * 4096] * 32)
        assert watch.calls == {"fast_write": 32}
        watch.calls.clear()
        await node.write([4096 * i for i in range(32)], [b"x" * 4096] * 32)
        assert watch.calls == {"write": 1}
        assert driver._pool is None
        await node.flush()
        await node.close()

    with using(watch):
        driver.run(steps())


def test_what_is_not_cached_is_read_by_one_waiting_call(driver, tmp_path):
    path = tmp_path / "x"
    data = random.Random(5).randbytes(8 << 20)
    path.write_bytes(data)

    class Cold(Watching):
        """Pages are cached once they were read, or read ahead; the real cache drops them when it
        likes."""

        def __init__(self):
            super().__init__()
            self.cached = set()

        def _fast_read(self, fd, buffers, offset, flags):
            wanted = sum(map(len, buffers))
            pages = range(offset >> 12, (offset + wanted + 4095) >> 12)
            here = next((i for i, page in enumerate(pages) if page not in self.cached), len(pages))
            if not here:
                raise BlockingIOError
            view = memoryview(buffers[0])[: (pages[0] + here) * 4096 - offset]
            return super()._fast_read(fd, (view,), offset, 0)

        def read(self, fd, buffers, offset):
            count = super().read(fd, buffers, offset)
            self.cached.update(range(offset >> 12, (offset + count + 4095) >> 12))
            return count

        def read_ahead(self, fd, offset, length):
            super().read_ahead(fd, offset, length)
            self.cached.update(range(offset >> 12, (offset + length + 4095) >> 12))

    cold = Cold()

    async def steps():
        node = await FileNode.open(driver, str(path))
        offsets = [(i * 5 % 8) << 20 for i in range(8)]
        got = await node.read(offsets, [4096] * 8)
        assert [bytes(part) for part in got] == [data[o : o + 4096] for o in offsets]
        # The kernel is told of all of them, and the pool waits for one.
        assert cold.calls["read_ahead"] == 8
        assert cold.calls["read"] == 1
        # The first part of a request cached, the rest not.
        view = memoryview(bytearray(3 << 20))
        await node.read([4 << 20], [3 << 20], [view])
        assert view == data[4 << 20 : 7 << 20]
        assert cold.calls["read"] == 2
        await node.close()

    with using(cold):
        driver.run(steps())


def test_a_file_that_is_not_cached(driver, tmp_path):
    path = tmp_path / "x"
    data = random.Random(5).randbytes(8 << 20)
    path.write_bytes(data)

    async def steps():
        node = await FileNode.open(driver, str(path))
        drop_cache(path)
        offsets = [(i * 5 % 8) << 20 for i in range(8)]
        got = await node.read(offsets, [4096] * 8)
        assert [bytes(part) for part in got] == [data[o : o + 4096] for o in offsets]
        drop_cache(path)
        await node.read([4 << 20], [4096])
        view = memoryview(bytearray(3 << 20))
        await node.read([(4 << 20) - 4096], [3 << 20], [view])
        assert view == data[(4 << 20) - 4096 : (7 << 20) - 4096]
        await node.close()

    driver.run(steps())


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_file_system_that_cannot_tell_what_is_cached(in_memory, driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789" * 1000)

    class Old(Watching):
        def _fast_read(self, fd, buffers, offset, flags):
            if flags:
                self._note("refused")
                raise OSError(errno.ENOTSUP, "no")
            return super()._fast_read(fd, buffers, offset, flags)

        def memory_backed(self, fd):
            return in_memory

    old = Old()

    async def steps():
        node = await FileNode.open(driver, str(path))
        for _ in range(3):
            got = await node.read([0, 9990, 9995], [4, 10, 10])
            assert [bytes(p) for p in got] == [b"0123", b"0123456789", b"56789" + bytes(5)]
        assert old.calls["refused"] == 1
        assert bool(old.calls["read"]) is not in_memory
        await node.close()

    with using(old):
        driver.run(steps())


def test_reads_beyond_the_end_are_zeroes_also_in_used_buffers(driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")

    async def steps():
        node = await FileNode.open(driver, str(path))
        views = [memoryview(bytearray(b"\xff" * 8)) for _ in range(3)]
        await node.read([0, 2, 1000], [8, 8, 8], views)
        assert [bytes(v) for v in views] == [b"abc\0\0\0\0\0", b"c" + bytes(7), bytes(8)]
        with path.open("ab") as other:
            other.write(b"def")
        assert bytes((await node.read([0], [8]))[0]) == b"abcdef\0\0"
        assert node.refresh() == 6 == node.size
        assert node.disk_size() == path.stat().st_blocks * 512
        assert await node.read([], []) == []
        await node.close()

    driver.run(steps())


class TestGuard:
    def test_stalls_send_writes_to_the_pool_and_quiet_brings_them_back(
        self, driver, tmp_path, monkeypatch
    ):
        clock = [100.0]
        took = [0.0]
        waited = [0, 0]  # so far, more with each slow write
        threads: list[bool] = []

        class Stalling(Watching):
            def _fast_write(self, fd, buffer, offset):
                threads.append(threading.current_thread() is threading.main_thread())
                clock[0] += took[0]
                if took[0]:
                    waited[0] += waited[1]
                return super()._fast_write(fd, buffer, offset)

            def write(self, fd, buffers, offset):
                threads.append(threading.current_thread() is threading.main_thread())
                return super().write(fd, buffers, offset)

            def waits(self):
                return waited[0]

        monkeypatch.setattr("diskwright.protocols.fileio.perf_counter", lambda: clock[0])

        async def steps():
            node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
            guard = node.guard

            async def inline():
                threads.clear()
                await node.write([0], [b"x"])
                return threads == [True]

            assert await inline()
            took[0] = 0.1
            for _ in range(20):  # the thread did not wait: the machine is busy
                assert await inline()
            clock[0] += 10
            took[0], waited[1] = 0.01, 1
            for _ in range(1 + guard.strikes):
                assert await inline()
            assert not await inline()
            clock[0] += guard.first_pause
            took[0] = 0.1  # one long stall is enough
            assert await inline()
            assert not await inline()
            clock[0] += guard.first_pause
            assert not await inline()  # the second pause is longer
            clock[0] += guard.first_pause
            took[0] = 0.0
            assert await inline()
            clock[0] += guard.watch + 1
            assert await inline()
            assert not guard.watching
            took[0] = guard.hopeless + 0.1
            assert await inline()
            assert not await inline()
            await node.close()

        with using(Stalling()):
            driver.run(steps())

    def test_the_system_counts_waits(self, driver):
        found = table()
        before = found.waits()
        time.sleep(0.001)
        assert found.waits() > before
        assert Portable().waits() is None


class TestOpening:
    def test_names_that_are_not_text(self, driver, tmp_path):
        name = os.fsdecode(bytes(os.fsencode(tmp_path)) + b"/\xff\xfe disk")

        async def steps():
            node = await FileNode.open(driver, name, create=True)
            await node.write([0], [b"hello"])
            await node.close()
            node = await FileNode.open(driver, name)
            assert bytes((await node.read([0], [5]))[0]) == b"hello"
            await node.close()

        driver.run(steps())
        assert b"\xff\xfe disk" in os.listdir(os.fsencode(tmp_path))

    def test_what_is_not_an_image(self, driver, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for name in ("fifo", "."):
            with pytest.raises(UsageError, match="to be a regular file"):
                driver.run(FileNode.open(driver, str(tmp_path / name)))
        with pytest.raises(FileNotFoundError):
            driver.run(FileNode.open(driver, str(tmp_path / "none"), writable=True))
        with pytest.raises(FileNotFoundError):
            driver.run(FileNode.open(driver, str(tmp_path / "none" / "x"), create=True))
        with pytest.raises(UsageError):
            driver.run(FileNode.open(driver, str(tmp_path / "x"), create=True, cache="fast"))
        with pytest.raises(UsageError):
            driver.run(FileNode.open(driver, "x", writable=True, force_share=True))

    def test_read_only(self, driver, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(b"data")

        async def steps():
            node = await FileNode.open(driver, str(path))
            for change in (
                node.write([0], [b"x"]),
                node.zero([0], [1]),
                node.discard([0], [1]),
                node.truncate(0),
            ):
                with pytest.raises(PermissionError):
                    await change
            await node.flush()
            await node.close()

        driver.run(steps())
        assert path.read_bytes() == b"data"

    def test_create_empties_what_is_there(self, driver, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(b"old" * 1000)
        os.umask(umask := os.umask(0))

        async def steps(name):
            node = await create_file(driver, {"filename": str(name), "size": 4096})
            assert node.size == 4096
            assert not any((await node.read([0], [4096]))[0])
            await node.close()

        driver.run(steps(path))
        driver.run(steps(tmp_path / "new"))
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o644 & ~umask

    def test_options(self, driver, tmp_path):
        assert cache_mode({}) == "writeback"
        assert cache_mode({"cache": "off"}) == "none"
        assert cache_mode({"cache.direct": "on"}) == "none"
        assert cache_mode({"cache": "writethrough", "cache.direct": True}) == "directsync"
        assert cache_mode({"cache.no-flush": "on"}) == "unsafe"
        path = tmp_path / "x"
        path.write_bytes(b"1")

        async def steps():
            with pytest.raises(UsageError):
                await open_file(driver, {})
            with pytest.raises(UsageError, match="aio=native"):
                await open_file(driver, {"filename": str(path), "aio": "native"})
            node = await open_file(
                driver, {"filename": str(path), "read-only": "off", "discard": "ignore"}
            )
            assert not node.read_only
            assert not node.unmap
            await node.close()

        driver.run(steps())
        assert {o.name for o in DRIVER.options} >= {"filename", "locking", "aio", "cache.direct"}
        assert {o.name for o in DRIVER.create_options} == {
            "size",
            "preallocation",
            "nocow",
            "extent_size_hint",
        }


class TestClosing:
    def test_a_closed_node_takes_nothing(self, driver, tmp_path):
        async def steps():
            node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
            await node.close()
            await node.close()
            for request in (
                node.read([0], [1]),
                node.write([0], [b"x"]),
                node.zero([0], [1]),
                node.discard([0], [1]),
                node.flush(),
                node.extents(0, 1),
                node.truncate(0),
                node.reopen(),
            ):
                with pytest.raises(NodeClosed):
                    await request
            with pytest.raises(NodeClosed):
                node.fileno()

        driver.run(steps())

    def test_close_waits_for_what_runs(self, driver, tmp_path):
        gate = threading.Event()

        class Held(Watching):
            def write(self, fd, buffers, offset):
                gate.wait(10)
                return super().write(fd, buffers, offset)

        async def steps():
            node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
            node.inline_write = 0
            writing = driver.start(node.write([0], [b"late"]))
            closing = driver.start(node.close())
            await driver.sleep(0.02)
            assert not closing.done
            gate.set()
            await writing
            await closing

        with using(Held()):
            driver.run(steps())
        assert (tmp_path / "x").read_bytes() == b"late"

    def test_a_cancelled_write_ends_before_its_task(self, driver, tmp_path):
        gate = threading.Event()

        class Held(Watching):
            def write(self, fd, buffers, offset):
                gate.wait(10)
                return super().write(fd, buffers, offset)

        async def steps():
            node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
            node.inline_write = 0
            task = driver.spawn(node.write([0], [b"late"]))
            await driver.sleep(0.01)
            task.cancel()
            await driver.sleep(0.01)
            assert not task.done
            gate.set()
            with pytest.raises(Cancelled):
                await task
            assert node.size == 4
            assert (tmp_path / "x").read_bytes() == b"late"
            await node.close()

        with using(Held()):
            driver.run(steps())

    def test_a_node_that_is_dropped_gives_its_lock_up(self, driver, tmp_path):
        path = str(tmp_path / "x")

        async def steps():
            node = await FileNode.open(driver, path, create=True)
            del node
            node = await FileNode.open(driver, path, writable=True)
            await node.close()

        driver.run(steps())

    def test_fork_closes_the_child_s_copies(self, driver, tmp_path):
        path = str(tmp_path / "x")

        async def steps():
            node = await FileNode.open(driver, path, create=True)
            await node.write([0], [b"parent"])
            fd = node.fileno()
            ready, go = os.pipe(), os.pipe()
            child = os.fork()
            if not child:
                code = 1
                try:
                    os.fstat(fd)
                except OSError:
                    code = 0 if node.closed else 2
                os.write(ready[1], b"x")
                os.read(go[0], 1)
                os._exit(code)
            os.read(ready[0], 1)
            await node.write([0], [b"PARENT"])
            await node.close()
            # The child lives, but holds nothing.
            other = await FileNode.open(driver, path, writable=True)
            assert bytes((await other.read([0], [6]))[0]) == b"PARENT"
            os.write(go[1], b"x")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            for end in (*ready, *go):
                os.close(end)
            await other.close()

        driver.run(steps())


def test_a_batch_costs_no_frame_a_request(driver, tmp_path, monkeypatch):
    """Python calls are counted, not time: as many for two requests as for many."""
    monkeypatch.setattr(Guard, "patience", 60.0)  # on a busy machine writes would go to the pool
    path = Path(tmp_path / "x")
    path.write_bytes(bytes(1 << 20))

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True)
        frames = {}
        for count in (2, 32):
            offsets, buffers = [8192 * i for i in range(count)], [b"x" * 512] * count
            calls = 0

            def profile(frame, event, argument):
                nonlocal calls
                calls += event == "call"

            sys.setprofile(profile)
            try:
                await node.read(offsets, [512] * count)
                await node.write(offsets, buffers)
            finally:
                sys.setprofile(None)
            frames[count] = calls
        assert frames[2] == frames[32] < 12
        await node.close()

    driver.run(steps())


def test_the_system_calls_of_warm_batches(tmp_path):
    """What the kernel sees: one call a request, no other."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    path = tmp_path / "x"
    path.write_bytes(bytes(1 << 20))
    script = f"""
import os
from diskwright.engine.kernel import Driver
from diskwright.protocols.file import FileNode
from diskwright.protocols.transfer import Guard
Guard.patience = 60  # tracing is slow
driver = Driver()
async def steps():
    node = await FileNode.open(driver, {str(path)!r}, writable=True)
    far = [8192 * i for i in range(32)]
    for _ in range(2):
        os.access("/start", 0)
        await node.read(far, [4096] * 32)
        os.access("/reads", 0)
        await node.write(far, [b"x" * 4096] * 32)
        os.access("/writes", 0)
        await node.write([4096 * i for i in range(32)], [b"x" * 4096] * 32)
        os.access("/joined", 0)
    await node.close()
driver.run(steps())
"""
    log = tmp_path / "log"
    made = subprocess.run(
        [strace, "-f", "-o", str(log), sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if made.returncode and "ptrace" in made.stderr.lower():
        pytest.skip("nothing can be traced here")
    assert made.returncode == 0, made.stderr
    seen: dict[str, Counter[str]] = {}
    counting: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        call = line.split(None, 1)[1]
        for mark in ("/start", "/reads", "/writes", "/joined"):
            if f'"{mark}"' in call:
                seen[mark], counting = counting, Counter()
                break
        else:
            name = call.split("(")[0]
            if name not in ("brk", "mmap", "munmap", "mremap", "madvise"):
                counting[name] += 1
    assert seen["/reads"] == {"preadv2": 32}
    assert seen["/writes"] == {"pwrite64": 32}
    assert seen["/joined"] in ({"pwritev": 1}, {"pwritev2": 1})
