"""Units of the allocation may be far larger than any buffer should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import MAY_UNMAP, NO_FALLBACK
from diskwright.engine.kernel import Driver
from diskwright.engine.node import Buffer
from diskwright.graph.opener import close_disk, create_image, open_disk
from diskwright.protocols.filenode import FileNode
from diskwright.testing.model import pattern

UNIT = 2 << 20  # qcow2's largest cluster


class Watch:
    """What goes to the file: the lengths written and zeroed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[int] = []
        self.zeroed: list[int] = []
        write, zero = FileNode.write, FileNode.zero

        async def watched_write(
            node: FileNode, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
        ) -> None:
            self.written += map(len, buffers)
            await write(node, offsets, buffers, flags)

        async def watched_zero(
            node: FileNode, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0
        ) -> None:
            self.zeroed += lengths
            await zero(node, offsets, lengths, flags)

        monkeypatch.setattr(FileNode, "write", watched_write)
        monkeypatch.setattr(FileNode, "zero", watched_zero)


@pytest.fixture
def driver() -> Any:
    driver = Driver()
    yield driver
    driver.stop_pool()
    driver.close()


async def made(driver: Driver, folder: Path, backing: bytes | None = None) -> Any:
    options: dict[str, Any] = {"cluster_size": UNIT}
    if backing is not None:
        (folder / "base").write_bytes(backing)
        options |= {"backing_file": str(folder / "base"), "backing_fmt": "raw"}
    path = str(folder / "disk")
    await create_image(driver, path, "qcow2", 4 * UNIT, options)
    from diskwright.graph.gate import Gate

    return await open_disk(driver, path, writable=True, gate=Gate("trusted"))


def test_a_copied_unit_goes_in_pieces(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pattern(1, 0, 4 * UNIT)

    async def body() -> None:
        disk = await made(driver, tmp_path, base)
        watch = Watch(monkeypatch)
        await disk.write([UNIT + 700_000], [b"x" * 5000])
        assert max(watch.written) <= 256 << 10
        assert sum(watch.written) >= UNIT
        expected = bytearray(base)
        expected[UNIT + 700_000 : UNIT + 705_000] = b"x" * 5000
        (found,) = await disk.read([0], [4 * UNIT])
        assert bytes(found) == expected
        await close_disk(disk)

    driver.run(body())


def test_zeroes_inside_a_unit_are_not_written(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        disk = await made(driver, tmp_path)
        plain = bytearray(pattern(2, 0, 4 * UNIT))
        await disk.write([0], [bytes(plain)])
        await disk.flush()
        watch = Watch(monkeypatch)
        for flags in (0, MAY_UNMAP):
            watch.zeroed.clear()
            await disk.zero([100_000], [1_000_000], flags)
            assert watch.zeroed == [1_000_000] and not watch.written
        plain[100_000:1_100_000] = bytes(1_000_000)
        await disk.zero([UNIT + 10], [700])  # short: sooner written than zeroed
        plain[UNIT + 10 : UNIT + 710] = bytes(700)
        assert watch.written == [700]
        with pytest.raises(OSError, match="only be written as data"):
            await disk.zero([UNIT + 5000], [700], NO_FALLBACK)
        (found,) = await disk.read([0], [4 * UNIT])
        assert bytes(found) == plain
        await close_disk(disk)

    driver.run(body())
