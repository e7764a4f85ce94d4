"""``disk.snapshots`` of both Python APIs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import diskwright
from diskwright import aio
from diskwright.errors import NoSuchSnapshot, NotSupported, UsageError

MIB = 1 << 20


def test_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    diskwright.create(path, format="qcow2", size=4 * MIB)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"first" * 100)
        one = disk.snapshots.create("one", date=1_000_000_000.5)
        assert (one.id, one.name, one.date_sec, one.disk_size) == ("1", "one", 10**9, 4 * MIB)
        disk.write_at(0, b"other" * 100)
        disk.resize(8 * MIB)
        disk.snapshots.write_vm_state(100, b"state" * 1000)
        two = disk.snapshots.create("two", vm_state_size=5100, icount=7)
        # It went with the snapshot.
        assert disk.snapshots.read_vm_state(0, 5100) == bytes(5100)
        assert [info.name for info in disk.snapshots.list()] == ["one", "two"]
        disk.snapshots.apply("one")
        assert (disk.size, disk.read_at(0, 5)) == (4 * MIB, b"first")
        disk.write_at(MIB, b"third")
        disk.snapshots.apply(two.id)
        assert (disk.size, disk.read_at(0, 5), disk.read_at(MIB, 5)) == (
            8 * MIB,
            b"other",
            bytes(5),
        )
        assert disk.snapshots.read_vm_state(100, 5000) == b"state" * 1000
        with pytest.raises(NoSuchSnapshot):
            disk.snapshots.delete("three")
        disk.snapshots.delete("two")
        with pytest.raises(UsageError):
            disk.snapshots.show("one")
    with diskwright.open(path) as disk:
        assert disk.size == 8 * MIB
        disk.snapshots.show("one")
        assert (disk.size, disk.read_at(0, 5)) == (4 * MIB, b"first")
    assert not diskwright.check(path).findings


def test_formats_without(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    diskwright.create(path, format="raw", size=MIB)
    with diskwright.open(path, format="raw", writable=True) as disk:
        assert disk.snapshots.list() == []
        with pytest.raises(NotSupported):
            disk.snapshots.create("one")


def test_asyncio(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    diskwright.create(path, format="qcow2", size=4 * MIB)

    async def work() -> None:
        async with aio.open(path, writable=True) as disk:
            await disk.write_at(0, b"first")
            await disk.snapshots.create("one")
            await disk.write_at(0, b"other")
            await disk.snapshots.write_vm_state(0, b"state")
            assert await disk.snapshots.read_vm_state(0, 6) == b"state\0"
            await disk.snapshots.apply("one")
            assert await disk.read_at(0, 5) == b"first"
            assert [info.name for info in disk.snapshots.list()] == ["one"]
            await disk.snapshots.delete("one")
        async with aio.open(path) as disk:
            with pytest.raises(NoSuchSnapshot):
                await disk.snapshots.show("one")

    asyncio.run(work())
