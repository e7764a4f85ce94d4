"""Writers beside bitmaps that are emptied, merged and stored, under many interleavings."""

from __future__ import annotations

import random
from typing import Any

import pytest

from diskwright.contract import MAY_UNMAP
from diskwright.engine import bitmaps
from diskwright.engine.tables import Tables
from diskwright.formats import qcow2
from diskwright.graph.mapped import MappedNode
from diskwright.testing.memory import RecordingNode
from diskwright.testing.scheduler import SeededDriver

from .cases import qcow2_image

SIZE = 64 * 1024
GRAIN = 512
SEEDS = 60


class Race:
    """Writers, and one who works with the bitmaps.  ``written``: (begun, offset, length);
    ``emptied``: when the emptying of each bitmap had ended."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.driver = SeededDriver(seed, eager=None)
        image = qcow2_image(("cluster_size", 512), ("size", SIZE))
        self.leaf = RecordingNode(self.driver, image, delay=10)
        self.written: list[tuple[int, int, int]] = []
        self.emptied: dict[str, int] = {}

    def open(self) -> tuple[MappedNode, Any]:
        assert qcow2.DRIVER.open is not None
        format, opening = qcow2.DRIVER.open({"writable": True})
        node = MappedNode(self.driver, "qcow2", format, {"file": self.leaf}, Tables(1600))
        return node, opening

    async def writer(self, node: MappedNode) -> None:
        for _ in range(12):
            length = self.rng.choice([1, 512, 3000])
            offset = self.rng.randrange(SIZE - length)
            self.written.append((self.driver.tick(), offset, length))
            what = self.rng.random()
            if what < 0.6:
                await node.write([offset], [b"\xaa" * length])
            elif what < 0.8:
                await node.zero([offset], [length], self.rng.choice([0, MAY_UNMAP]))
            else:
                await node.discard([offset], [length])

    async def keeper(self, node: MappedNode) -> None:
        engine = node.engine
        for _ in range(10):
            name = self.rng.choice(["one", "two"])
            what = self.rng.random()
            if what < 0.3:
                await bitmaps.clear(engine, name)
                self.emptied[name] = self.driver.tick()
            elif what < 0.6:
                await bitmaps.merge(engine, "two", [await bitmaps.load(engine, "one")])
            elif what < 0.8:
                await bitmaps.store(engine)
            else:
                await node.flush()

    async def main(self) -> None:
        node, opening = self.open()
        await node.run_procedure(opening, whole_image=False)
        for name in ("one", "two"):
            await bitmaps.add(node.engine, name, GRAIN, persistent=True)
            self.emptied[name] = self.driver.tick()
        tasks = [self.driver.spawn(self.writer(node)) for _ in range(3)]
        tasks.append(self.driver.spawn(self.keeper(node)))
        for task in tasks:
            await task
        await node.close()
        node, opening = self.open()
        await node.run_procedure(opening, whole_image=False)
        for name, ended in self.emptied.items():
            bitmap = await bitmaps.load(node.engine, name)
            for begun, offset, length in self.written:
                if begun > ended:
                    for at in range(offset, offset + length, GRAIN):
                        assert bitmap.bits.get(at // GRAIN), (name, offset, length)
        result = await node.run_procedure(node.format.check(), whole_image=False)
        assert not result.corruptions and not result.leaks, result.findings[:4]
        await node.close()


def test_no_write_is_missed() -> None:
    for seed in range(SEEDS):
        race = Race(seed)
        race.driver.run(race.main())


def test_a_mark_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans do not mark, as if the engine did so in place alone."""
    from diskwright.engine import allocate

    monkeypatch.setattr(allocate, "spans_of", lambda ranges: [])
    with pytest.raises(AssertionError):
        test_no_write_is_missed()
