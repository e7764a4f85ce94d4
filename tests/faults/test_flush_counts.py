"""Flush means flush: how many syncs lie between a client's flush and its answer."""

from __future__ import annotations

from typing import Any

import pytest

from diskwright.contract import FUA
from diskwright.engine.futures import gather
from diskwright.engine.kernel import Driver
from diskwright.engine.node import Node
from diskwright.engine.tables import Tables
from diskwright.errors import FlushFailed
from diskwright.formats import qcow2
from diskwright.graph.mapped import MappedNode
from diskwright.testing.memory import RecordingNode
from races.cases import qcow2_image

CLUSTER = 4096


class Disk:
    def __init__(self, backing: bool = False, **create: Any) -> None:
        options = {"size": 1 << 20, "cluster_size": CLUSTER, **create}
        self.driver = Driver()
        self.leaf = RecordingNode(self.driver, qcow2_image(*sorted(options.items())))
        slots: dict[str, Node] = {"file": self.leaf}
        opened: dict[str, Any] = {"writable": True}
        self.below = RecordingNode(self.driver, bytes(1 << 20))
        if backing:
            slots["backing"] = self.below
            opened["backing"] = "given"
        assert qcow2.DRIVER.open is not None
        format, opening = qcow2.DRIVER.open(opened)
        self.node = MappedNode(self.driver, "qcow2", format, slots, Tables())
        self.driver.run(self.node.run_procedure(opening, whole_image=False))

    def syncs(self, work: Any) -> int:
        before = self.leaf.counts["flush"]
        self.driver.run(work)
        return self.leaf.counts["flush"] - before

    def reopened(self) -> bytes:
        """The whole disk, read from what the file holds now."""
        assert qcow2.DRIVER.open is not None
        format, opening = qcow2.DRIVER.open({})
        leaf = RecordingNode(self.driver, bytes(self.leaf.data))
        node = MappedNode(self.driver, "qcow2", format, {"file": leaf}, Tables())
        node.read_only = True
        self.driver.run(node.run_procedure(opening, whole_image=False))
        (data,) = self.driver.run(node.read([0], [node.size]))
        return bytes(data)

    def all_durable(self) -> bool:
        return all(self.leaf.durable(c, 1 << 60) for c in self.leaf.log)


def test_a_flush_of_a_clean_disk_is_one_sync() -> None:
    disk = Disk()
    assert disk.syncs(disk.node.flush()) == 1


def test_data_in_place_take_one_sync() -> None:
    disk = Disk()
    disk.driver.run(disk.node.write([0], [b"x" * CLUSTER]))
    disk.driver.run(disk.node.flush())
    disk.driver.run(disk.node.write([10], [b"y"]))
    assert disk.syncs(disk.node.flush()) == 1
    assert disk.all_durable()


def test_a_new_cluster_is_data_then_tables() -> None:
    disk = Disk()
    assert disk.syncs(disk.node.write([0], [b"x" * CLUSTER])) == 0
    assert 2 <= disk.syncs(disk.node.flush()) <= 3
    assert disk.all_durable()
    assert disk.syncs(disk.node.flush()) == 1


def test_what_is_answered_is_durable_with_fua() -> None:
    disk = Disk()
    assert disk.syncs(disk.node.write([0], [b"x" * CLUSTER], FUA)) >= 2
    assert disk.all_durable()
    assert disk.syncs(disk.node.write([5], [b"x"], FUA)) == 1
    assert disk.syncs(disk.node.zero([0], [CLUSTER], FUA)) >= 2
    assert disk.all_durable()


def test_flushes_at_once_share_their_syncs() -> None:
    disk = Disk()
    disk.driver.run(disk.node.write([0], [b"x" * CLUSTER]))
    many = gather(disk.driver, [disk.node.flush() for _ in range(20)])
    assert disk.syncs(many) <= 6
    assert disk.all_durable()


def test_lazy_refcounts_announce_themselves_first() -> None:
    disk = Disk(lazy_refcounts=True)
    assert disk.syncs(disk.node.write([0], [b"x" * CLUSTER])) == 1
    assert disk.syncs(disk.node.write([CLUSTER], [b"x" * CLUSTER])) == 0


def test_close_leaves_nothing_to_sync() -> None:
    disk = Disk()
    disk.driver.run(disk.node.write([0], [b"x" * CLUSTER]))
    assert disk.syncs(disk.node.close()) >= 2
    assert disk.all_durable()


def test_a_backing_file_is_never_synced() -> None:
    disk = Disk(backing=True, backing_file="base", backing_fmt="raw")
    disk.driver.run(disk.node.write([5], [b"x"]))
    disk.driver.run(disk.node.flush())
    assert disk.below.counts["flush"] == disk.below.counts["write"] == 0


def test_a_failed_flush_stays_failed() -> None:
    disk = Disk()
    disk.driver.run(disk.node.write([0], [b"x" * CLUSTER]))
    flush, requests = disk.leaf.flush, disk.leaf.requests

    async def failing() -> None:
        disk.leaf.fail_at = {disk.leaf.requests + 1: 5}
        await flush()

    disk.leaf.flush = failing  # type: ignore[method-assign]
    with pytest.raises(OSError):
        disk.driver.run(disk.node.flush())
    assert disk.leaf.requests > requests
    disk.leaf.flush = flush  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(FlushFailed):
            disk.driver.run(disk.node.flush())
    with pytest.raises(FlushFailed):
        disk.driver.run(disk.node.close())


@pytest.mark.parametrize("code", [5, 28])
def test_a_full_disk_can_be_made_room_on(code: int) -> None:
    """A guest may pause when the host is full, and go on when it is not."""
    disk = Disk()
    driver, node, leaf = disk.driver, disk.node, disk.leaf
    driver.run(node.write([0], [b"x" * CLUSTER]))
    for _ in range(3):  # the tables cannot be written
        leaf.fail_at = {leaf.requests + n: code for n in range(1, 20)}
        with pytest.raises(OSError) as caught:
            driver.run(node.flush())
        assert caught.value.errno == code and not isinstance(caught.value, FlushFailed)
        leaf.fail_at = {}
        driver.run(node.write([CLUSTER], [b"y" * CLUSTER]))
    driver.run(node.flush())
    driver.run(node.close())
    assert disk.reopened()[: 2 * CLUSTER] == b"x" * CLUSTER + b"y" * CLUSTER
