"""Persistent bitmaps in a workload: whatever a crash leaves, none of them may call a part clean
that is another than when the bitmap was emptied last."""

from __future__ import annotations

import random
from typing import Any

from diskwright.engine import bitmaps
from diskwright.graph.mapped import MappedNode
from diskwright.testing.model import Mismatch


class Followed:
    """The bitmaps of one workload.  ``bases``: when each was emptied (begun, ended), and what the
    disk read as then."""

    def __init__(self, node: MappedNode, rng: random.Random, tick: Any) -> None:
        self.node, self.rng, self.tick = node, rng, tick
        self.bases: dict[str, list[tuple[int, int, bytes]]] = {}
        self.made = 0

    async def step(self) -> None:
        """One of all that can be done with bitmaps."""
        engine = self.node.engine
        names = [bitmap.name for bitmap in engine.bitmaps]
        what = self.rng.random()
        if not names or (what < 0.25 and len(names) < 4):
            self.made += 1
            name = f"bitmap{self.made}"
            await self._empty(
                name,
                bitmaps.add(
                    engine, name, self.rng.choice([512, 512, 2048, 65536]), persistent=True
                ),
            )
        elif what < 0.35:
            await bitmaps.remove(engine, self.rng.choice(names))
        elif what < 0.5:
            name = self.rng.choice(names)
            await self._empty(name, bitmaps.clear(engine, name))
        elif what < 0.65:
            source = await bitmaps.load(engine, self.rng.choice(names))
            await bitmaps.merge(engine, self.rng.choice(names), [source])
        else:
            await bitmaps.store(engine)

    async def _empty(self, name: str, work: Any) -> None:
        (content,) = await self.node.read([0], [self.node.size])
        begun = self.tick()
        await work
        self.bases.setdefault(name, []).append((begun, self.tick(), bytes(content)))

    def resized(self, size: int) -> None:
        """What was cut off is no longer spoken of, also when the disk grows again."""
        for name, bases in self.bases.items():
            self.bases[name] = [(begun, ended, content[:size]) for begun, ended, content in bases]

    async def judge(self, node: Any, content: bytes, moment: int, what: str) -> int:
        """Look at the bitmaps of a crash state; how many can be relied on."""
        good = 0
        for bitmap in node.engine.bitmaps:
            if bitmap.inconsistent:
                continue
            good += 1
            # Of an emptying that was on its way nobody can say whether it was stored.
            bases = [b for b in self.bases[bitmap.name] if b[0] <= moment]
            if not bases or bases[-1][1] > moment:
                continue
            base = bases[-1][2]
            await bitmaps.load(node.engine, bitmap.name)
            for offset, length, dirty in bitmap.extents():
                end = min(offset + length, len(base), len(content))
                if not dirty and content[offset:end] != base[offset:end]:
                    raise Mismatch(f"{what}: {bitmap.name} calls {offset:#x}-{end:#x} clean")
        return good
