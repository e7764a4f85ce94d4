"""Writes in the pool into one file run one after the other."""

from __future__ import annotations

import threading

import pytest

from diskwright.protocols import fileio
from diskwright.protocols.filenode import FileNode

MIB = 1 << 20


def test_one_write_at_a_time_and_in_order(driver, tmp_path, monkeypatch):
    running, most, order = 0, 0, []
    guard = threading.Lock()
    real = fileio.put_all

    def counted(table, fd, offsets, buffers):
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
            order.append(offsets[0])
        real(table, fd, offsets, buffers)
        with guard:
            running -= 1

    monkeypatch.setattr(fileio, "put_all", counted)

    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
        node.inline_write = 0
        tasks = [driver.spawn(node.write([i * MIB], [bytes([i + 1]) * MIB])) for i in range(8)]
        for task in tasks:
            await task
        await node.close()

    driver.run(steps())
    assert most == 1
    assert order == [i * MIB for i in range(8)]
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([i + 1]) * MIB for i in range(8))


def test_an_error_goes_to_whom_it_concerns(driver, tmp_path, monkeypatch):
    real = fileio.put_all

    def failing(table, fd, offsets, buffers):
        if offsets[0] == MIB:
            raise OSError(28, "No space left on device")
        real(table, fd, offsets, buffers)

    monkeypatch.setattr(fileio, "put_all", failing)

    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
        node.inline_write = 0
        tasks = [driver.spawn(node.write([i * MIB], [b"x" * MIB])) for i in range(3)]
        await tasks[0]
        with pytest.raises(OSError, match="No space"):
            await tasks[1]
        await tasks[2]
        await node.close()

    driver.run(steps())
    data = (tmp_path / "x").read_bytes()
    assert data == b"x" * MIB + bytes(MIB) + b"x" * MIB


def test_a_copy_leaves_the_asking_thread_free(driver, tmp_path, monkeypatch):
    """While a file is filled only small writes run on the thread that reads and plans."""
    threads = []
    real = fileio.put_all

    def told(table, fd, offsets, buffers):
        threads.append(threading.current_thread() is threading.main_thread())
        real(table, fd, offsets, buffers)

    monkeypatch.setattr(fileio, "put_all", told)

    async def steps():
        node = await FileNode.open(driver, str(tmp_path / "x"), create=True)
        block = b"x" * (128 << 10)
        await node.write([0], [block])
        assert not threads
        node.will_flush(True)
        await node.write([0], [block])
        assert threads == [False]
        node.will_flush(False)
        await node.write([0], [block])
        assert threads == [False]
        await node.close()

    driver.run(steps())
