"""How far a copy looks ahead of what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.graph import status
from diskwright.ops import sources
from diskwright.ops.images import ImageSpec

MIB = 1 << 20


def test_little_is_looked_through_at_once_where_there_is_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer is soon there, and empty disks cost few questions."""
    name = str(tmp_path / "a.qcow2")
    diskwright.create(name, format="qcow2", size=8192 * MIB)
    with diskwright.open(name, format="qcow2", writable=True) as disk:
        for at in (0, 100 * MIB, 2048 * MIB):
            disk.write_at(at, b"x" * 65536)
    asked: list[tuple[int, int]] = []
    original = status.block_status

    async def noted(node: Any, offset: int, length: int, **keys: Any) -> Any:
        found = await original(node, offset, length, **keys)
        asked.append((offset, sum(part.length for part in found)))
        return found

    monkeypatch.setattr(sources, "block_status", noted)
    driver = Driver()

    async def segments() -> list[tuple[int, int, bool]]:
        node = await ImageSpec(name, name, "qcow2").open(driver)
        try:
            whole = sources.Sources([node], 4096, None, 0, False)
            return [(s.source_offset, s.length, bool(s.zero)) async for s in whole.segments()]
        finally:
            await node.close()

    try:
        found = driver.run(segments())
    finally:
        driver.close()
    assert asked[:2] == [(0, 64 * MIB), (64 * MIB, 256 * MIB)]
    assert asked[2] == (320 * MIB, 256 * MIB) and asked[3] == (576 * MIB, 1024 * MIB)
    assert len(asked) < 14
    assert sum(length for _, length, _ in found) == 8192 * MIB
    assert sum(length for _, length, zero in found if not zero) == 3 * 65536
