"""Flush means flush: how many syncs, when, and what an error does."""

from __future__ import annotations

import errno
import threading

import pytest

from diskwright.contract import FUA
from diskwright.errors import FlushFailed
from diskwright.protocols.file import FileNode, create_file

from .support import Watching, using

SYNCS = ("sync_data", "sync", "sync_directory")


def syncs(watch: Watching) -> int:
    return sum(watch.calls[row] for row in SYNCS)


@pytest.fixture
def watch():
    table = Watching()
    with using(table):
        yield table


@pytest.mark.parametrize(
    ("cache", "after_write", "after_fua", "after_flush"),
    [
        ("writeback", 0, 1, 1),
        ("none", 0, 1, 1),
        ("writethrough", 1, 1, 0),
        ("directsync", 1, 1, 0),
        ("unsafe", 0, 0, 0),
    ],
)
def test_syncs_in_each_cache_mode(
    watch, cache, after_write, after_fua, after_flush, driver, tmp_path
):
    path = tmp_path / "x"
    path.write_bytes(bytes(8192))

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True, cache=cache)
        await node.flush()
        assert not syncs(watch)  # nothing was written
        for change in (
            lambda: node.write([0, 512], [b"x" * 512, b"y"]),
            lambda: node.zero([0], [4096]),
            lambda: node.discard([0], [4096]),
        ):
            watch.calls.clear()
            await change()
            assert syncs(watch) == after_write
            await node.flush()
            assert syncs(watch) == after_write + after_flush
            await node.flush()
            assert syncs(watch) == after_write + after_flush
        watch.calls.clear()
        await node.write([0], [b"x"], FUA)
        assert syncs(watch) == after_fua
        await node.zero([0], [10], FUA)
        assert syncs(watch) == 2 * after_fua
        watch.calls.clear()
        await node.write([0], [b"x"])
        await node.close()
        assert syncs(watch) == after_write + after_flush

    driver.run(steps())


def test_a_new_file_is_durable_with_its_name(watch, driver, tmp_path):
    async def steps():
        node = await create_file(driver, {"filename": str(tmp_path / "x"), "size": 4096})
        await node.flush()
        assert watch.calls["sync"] == watch.calls["sync_directory"] == 1
        await node.write([0], [b"x"])
        await node.flush()
        assert watch.calls["sync_directory"] == 1
        await node.close()
        watch.calls.clear()
        node = await create_file(driver, {"filename": str(tmp_path / "y")})
        await node.close()
        assert watch.calls["sync"] == watch.calls["sync_directory"] == 1
        watch.calls.clear()
        node = await create_file(driver, {"filename": str(tmp_path / "z"), "cache": "unsafe"})
        await node.close()
        assert not syncs(watch)

    driver.run(steps())


def test_flushes_that_meet_share_one_sync_but_never_an_older_one(driver, tmp_path):
    gates = [threading.Event() for _ in range(3)]
    started: list[int] = []

    class Held(Watching):
        def sync_data(self, fd):
            number = len(started)
            started.append(number)
            gates[number].wait(10)
            super().sync_data(fd)

    table = Held()
    path = tmp_path / "x"
    path.write_bytes(b"")

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True)
        await node.write([0], [b"a"])
        first = [driver.start(node.flush()) for _ in range(3)]
        await driver.sleep(0.01)
        await node.write([0], [b"b"])  # not covered by the sync that runs
        later = [driver.start(node.flush()) for _ in range(3)]
        gates[0].set()
        for future in first:
            await future
        await driver.sleep(0.01)
        assert len(started) == 2
        assert not any(future.done for future in later)
        gates[1].set()
        for future in later:
            await future
        assert len(started) == 2
        gates[2].set()
        await node.close()

    with using(table):
        driver.run(steps())


def test_a_failed_flush_stays_failed_until_reopen(watch, driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"")

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True)
        await node.write([0], [b"a"])
        watch.fail["sync_data"] = errno.EIO
        with pytest.raises(OSError) as first:
            await node.flush()
        assert first.value.errno == errno.EIO
        watch.fail.clear()  # the medium works again: what was lost stays lost
        for _ in range(2):
            with pytest.raises(FlushFailed) as later:
                await node.flush()
            assert later.value.errno == errno.EIO
        with pytest.raises(FlushFailed):
            await node.write([0], [b"b"], FUA)
        (await node.reopen()).keep()
        await node.write([0], [b"c"])
        await node.flush()
        await node.close()
        node = await FileNode.open(driver, str(path), writable=True)
        await node.write([0], [b"a"])
        watch.fail["sync_data"] = errno.ENOSPC
        with pytest.raises(OSError) as at_close:
            await node.close()
        assert at_close.value.errno == errno.ENOSPC
        watch.fail.clear()
        node = await FileNode.open(driver, str(path), writable=True)  # the lock is gone
        await node.write([0], [b"a"])
        watch.fail["sync_data"] = errno.EIO
        with pytest.raises(OSError):
            await node.flush()
        with pytest.raises(FlushFailed):
            await node.close()

    driver.run(steps())


def test_a_failed_write_does_not_poison_and_keeps_the_length(watch, driver, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")

    async def steps():
        node = await FileNode.open(driver, str(path), writable=True)
        watch.fail["fast_write"] = errno.ENOSPC
        with pytest.raises(OSError) as error:
            await node.write([0, 100], [b"a", b"b"])
        assert error.value.errno == errno.ENOSPC
        assert node.size == 5
        watch.fail.clear()
        await node.write([5], [b"6"])
        await node.flush()
        assert node.size == 6
        await node.close()

    driver.run(steps())
    assert path.read_bytes() == b"123456"


def test_what_will_be_flushed_soon_is_begun_with(
    watch, driver, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(watch, "memory_backed", lambda fd: False)
    monkeypatch.setattr(watch, "write_out", lambda fd, *span: begun.append(span))
    piece = bytes(1 << 20)

    async def steps(cache: str, soon: bool) -> int:
        begun.clear()
        node = await FileNode.open(
            driver, str(tmp_path / "x"), create=True, cache=cache, writable=True
        )
        node.will_flush(soon)
        for at in range(0, 32 << 20, 1 << 20):
            await node.write([at], [piece])
            await node.write([100 << 20], [b"metadata"])
        node.will_flush(False)
        await node.write([0], [piece] * 1)
        await node.close()
        return len(begun)

    assert driver.run(steps("writeback", False)) == 0
    assert driver.run(steps("unsafe", True)) == 0
    assert 1 <= driver.run(steps("writeback", True)) <= 4
    assert begun[0][0] == 0
    assert all(offset + length <= 32 << 20 for offset, length in begun)
    monkeypatch.setattr(watch, "memory_backed", lambda fd: True)
    assert driver.run(steps("writeback", True)) == 0
