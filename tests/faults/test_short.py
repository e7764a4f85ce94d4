"""System calls that move fewer bytes than asked, at every place of a workload on a file.

A short count is no failure: the rest follows.  Only when nothing moves at all is it the end of the
file (which reads as zeroes) or an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diskwright.engine.kernel import Driver
from diskwright.graph.opener import close_disk, create_image, open_disk
from diskwright.protocols import os_portable
from diskwright.testing.model import pattern

SIZE = 1 << 20


class Short(os_portable.Portable):
    """Call number ``at`` moves a part of what it was asked for, at least a byte."""

    def __init__(self, what: str, at: int) -> None:
        super().__init__()
        self.what, self.at = what, at
        self.calls = 0
        self.cut = False

    def _part(self, what: str, buffer: Any) -> Any:
        if what != self.what or len(buffer) < 2:
            return buffer
        self.calls += 1
        if self.calls != self.at:
            return buffer
        self.cut = True
        return memoryview(buffer)[: max(1, len(buffer) // 3)]

    def read(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return super().read(fd, [self._part("read", buffers[0])], offset)

    def write(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return super().write(fd, [self._part("write", buffers[0])], offset)

    def sync_data(self, fd: int) -> None:
        """Not what is tested here."""

    sync = sync_data


async def workload(driver: Driver, path: Path) -> None:
    content = bytearray(SIZE)
    await create_image(driver, str(path), "qcow2", SIZE, {"cluster_size": 4096})
    for turn in range(2):
        node = await open_disk(driver, str(path), format="qcow2", writable=True)
        for i, (offset, length) in enumerate([(100, 9000), (300_000, 70_000), (4096, 4096)]):
            data = pattern(10 * turn + i + 1, offset, length)
            await node.write([offset + 5000 * turn], [data])
            start = offset + 5000 * turn
            content[start : start + length] = data
        await node.flush()
        await node.discard([8192], [8192])
        content[8192:16384] = bytes(8192)
        (found,) = await node.read([0], [SIZE])
        assert bytes(found) == content
        await close_disk(node)
    node = await open_disk(driver, str(path), format="qcow2")
    result = await node.run_procedure(node.format.check(), whole_image=False)  # type: ignore[attr-defined]
    assert (result.corruptions, result.leaks) == (0, 0)
    (found,) = await node.read([0], [SIZE])
    assert bytes(found) == content
    await close_disk(node)


@pytest.mark.parametrize("what", ["read", "write"])
def test_every_call_is_short_once(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISKWRIGHT_PORTABLE", "1")

    def run(at: int) -> Short:
        table = Short(what, at)
        monkeypatch.setitem(os_portable._tables, True, table)
        path = tmp_path / "disk.qcow2"
        driver = Driver()
        try:
            driver.run(workload(driver, path))
        finally:
            driver.close()
        path.unlink()
        return table

    calls = run(0).calls
    assert calls > 20
    for at in range(1, calls + 1):
        assert run(at).cut or at > calls - 3, at  # the pool may save a call or two
