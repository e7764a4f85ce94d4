"""Protocols memory, null-co and null-aio."""

from __future__ import annotations

import errno

import pytest

from diskwright.errors import NodeClosed, NotSupported
from diskwright.extents import Data, Zero
from diskwright.protocols import memory, null
from diskwright.protocols.memory import MemoryNode
from diskwright.protocols.null import NullNode


def test_memory(driver):
    async def steps():
        node = MemoryNode(driver, b"hello", limit=1000)
        assert node.size == 5
        await node.write([3, 10], [b"LO!", b"end"])
        assert node.size == 13
        view = memoryview(bytearray(b"\xff" * 6))
        assert [bytes(p) for p in await node.read([0, 12], [6, 4])] == [b"helLO!", b"d\0\0\0"]
        await node.read([10], [6], [view])
        assert bytes(view) == b"end\0\0\0"
        await node.zero([0, 12], [2, 8])
        await node.discard([4, 19], [1, 100])
        assert bytes(node.data) == b"\0\0lL\0!\0\0\0\0en" + bytes(8)
        assert await node.extents(10, 20) == [Data("", 10, 10, True), Zero(10, False)]
        with pytest.raises(OSError) as error:
            await node.write([999], [b"xx"])
        assert error.value.errno == errno.ENOSPC
        assert node.size == 20
        await node.truncate(3)
        await node.truncate(6)
        assert bytes(node.data) == b"\0\0l\0\0\0"
        await node.flush()
        node.read_only = True
        with pytest.raises(PermissionError):
            await node.write([0], [b"x"])
        await node.close()
        with pytest.raises(NodeClosed):
            await node.read([0], [1])
        made = await memory.DRIVER.open(driver, {"size": 4096})
        assert made.size == 4096

    driver.run(steps())


def test_null(driver):
    async def steps():
        node = await null.DRIVER.open(driver, {})
        assert (node.size, node.driver_name) == (1 << 30, "null-co")
        assert [len(p) for p in await node.read([0, 1], [5, 6])] == [5, 6]
        await node.write([0], [b"x"])
        await node.zero([0], [1])
        await node.discard([0], [1])
        await node.flush()
        assert await node.extents(0, 10) == [Data("", 0, 10, True)]
        with pytest.raises(NotSupported):
            await node.truncate(0)
        await node.close()
        with pytest.raises(NodeClosed):
            await node.read([0], [1])
        slow = NullNode(driver, 1000, 20_000_000, True, driver_name="null-aio")
        view = memoryview(bytearray(b"\xff" * 10))
        began = driver.now()
        await slow.read([0], [10], [view])
        assert driver.now() - began >= 0.02
        assert not any(view)
        assert await slow.extents(990, 20) == [Zero(20, False)]
        named = await null.DRIVER_AIO.open(
            driver, {"driver": "null-aio", "size": "512", "latency-ns": 0, "read-zeroes": "on"}
        )
        assert (named.size, named.read_zeroes, named.driver_name) == (512, True, "null-aio")

    driver.run(steps())
