"""Where qcow2 puts what is written: freed space is used again, runs stay runs."""

from __future__ import annotations

from pathlib import Path

import diskwright

MIB = 1 << 20


def test_what_was_discarded_is_used_again_without_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    diskwright.create(path, size=64 * MIB, format="qcow2")
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"a" * (10 * MIB))
        before = path.stat().st_size
        for at in range(0, 10 * MIB, MIB):  # none of them is worth a flush by itself
            disk.discard(at, MIB)
        disk.write_at(32 * MIB, b"b" * (8 * MIB))
        assert path.stat().st_size == before
        assert disk.read_at(0, 10 * MIB) == bytes(10 * MIB)
        assert disk.read_at(32 * MIB, 8 * MIB) == b"b" * (8 * MIB)
    assert diskwright.check(path).ok


def test_a_refcount_block_does_not_break_a_run_twice(tmp_path: Path) -> None:
    """With clusters of 512 bytes one block counts 128 KiB: each begins with one cluster for what
    needed the block, then the block."""
    path = tmp_path / "a.qcow2"
    diskwright.create(path, size=MIB, format="qcow2", options={"cluster_size": 512})
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"a" * (MIB // 2))
    found = diskwright.map(path)
    hosts = [entry.offset for entry in found if entry.data]
    assert hosts == sorted(hosts)
    assert len(hosts) <= 12  # 4 blocks, and the L2 tables in front
    assert diskwright.check(path).ok
