"""Images that are put over a disk while it is written to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diskwright.cli.main import main
from diskwright.engine.kernel import Driver
from diskwright.errors import UsageError
from diskwright.graph.backend import Backend
from diskwright.graph.perms import root_use
from diskwright.monitor import all_commands, nodes
from diskwright.monitor.daemon import Daemon
from diskwright.monitor.exports import BlockExport
from diskwright.monitor.overlays import blockdev_snapshot_sync
from diskwright.monitor.transactions import Transaction, abort

WRITERS, BLOCKS, BLOCK = 4, 64, 6000  # blocks that share clusters with their neighbours
LAYERS = 5

all_commands()


def test_snapshots_under_load(tmp_path: Path) -> None:
    base = str(tmp_path / "0.qcow2")
    size = WRITERS * BLOCKS * BLOCK // 512 * 512 + 512
    assert main("qemu-img", ["create", "-q", "-f", "qcow2", base, str(size)]) == 0
    written: dict[int, int] = {}
    chance = random.Random(1)
    driver = Driver()
    done = False

    async def writer(disk: Backend, first: int) -> None:
        while not done:
            block = first + chance.randrange(BLOCKS)
            value = chance.randrange(1, 256)
            await disk.write([block * BLOCK], [bytes([value]) * BLOCK])
            written[block] = value
            if not chance.randrange(8):
                await disk.flush()
            await driver.turn()

    async def load() -> None:
        nonlocal done
        daemon = Daemon(driver)
        file = {"driver": "file", "filename": base}
        bottom = await nodes.add(daemon, {"driver": "qcow2", "node-name": "n0", "file": file})
        disk = Backend(bottom)
        daemon.exports["e"] = export = BlockExport("e", disk, True)
        daemon.use(bottom, export.user, root_use(True))
        writers = [driver.spawn(writer(disk, i * BLOCKS)) for i in range(WRITERS)]
        for number in range(1, LAYERS):
            below = disk.node
            for fails in (True, False):
                for _ in range(chance.randrange(200)):
                    await driver.turn()
                one = Transaction(daemon)

                async def work(
                    one: Transaction = one, number: int = number, fails: bool = fails
                ) -> None:
                    await blockdev_snapshot_sync(
                        one,
                        str(tmp_path / f"{number}.qcow2"),
                        node_name=f"n{number - 1}",
                        snapshot_node_name=f"n{number}",
                    )
                    if fails:
                        await abort(one)

                if fails:
                    with pytest.raises(UsageError):
                        await one.run(work)
                    assert disk.node is below and not below.read_only
                else:
                    await one.run(work)
                    assert disk.node.name == f"n{number}" and below.read_only
        done = True
        for task in writers:
            await task
        for block, value in written.items():
            (found,) = await disk.read([block * BLOCK], [BLOCK])
            assert bytes(found) == bytes([value]) * BLOCK, block
        daemon.use(disk.node, export.user, None)
        del daemon.exports["e"]
        await nodes.release(daemon, disk.node)
        assert list(daemon.graph.nodes) == ["#block100", "n0"]
        daemon.stop()
        await daemon.until_stopped()

    try:
        driver.run(load())
    finally:
        driver.close()
    assert len(written) > WRITERS * BLOCKS // 2
    for number in range(LAYERS):
        assert main("qemu-img", ["check", "-q", str(tmp_path / f"{number}.qcow2")]) == 0
