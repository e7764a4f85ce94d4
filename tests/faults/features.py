"""The workload of qcow2's features: snapshots with VM state, bitmaps, amendments, compressed
clusters and resizes of one image, some of it refused where two do not go together."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from crash.kits import Kit
from diskwright.contract import COMPRESSED
from diskwright.engine import bitmaps
from diskwright.errors import NotSupported
from diskwright.ops import snapshots
from diskwright.testing.model import Mismatch, pattern

from .large import Large

STATE = pattern(4000, 0, 1500)


@lru_cache(maxsize=8)
def kit_of(kind: str) -> Kit:
    """The same image every time."""
    kit = Kit(kind, random.Random(2))
    if kit.packs:
        kit.create["refcount_bits"] = 16
    return kit


class Features(Large):
    """``held``: what snapshots that were taken for sure hold."""

    refcounted = True
    kit_of = staticmethod(kit_of)

    def __init__(self, kind: str, which: int, at: int, code: int) -> None:
        super().__init__(kind, which, at, code)
        self.held: dict[str, bytes] = {}
        self.sizes += [self.kit.size + 5 * self.kit.unit]

    async def content(self) -> bytes:
        (content,) = await self.node.read([0], [self.node.size])
        return bytes(content)

    async def pack(self, offset: int) -> None:
        request, data = self.model.write(offset, self.kit.pack_unit)
        try:
            await self.node.write([offset], [data], COMPRESSED)
        except BaseException:
            request.finish(self.tick(), False)
            raise
        request.finish(self.tick(), True)

    async def take(self) -> None:
        content = await self.content()
        try:
            await snapshots.write_vm_state(self.node, 0, STATE)
            made = await snapshots.create(self.node, "fault", vm_state_size=len(STATE))
        except NotSupported:
            assert self.kit.slots == ("file", "data-file")
        else:
            self.held[made.id] = content

    async def apply(self) -> None:
        if not self.held:
            return
        which, content = next(iter(self.held.items()))
        self.sizes.append(len(content))
        request = self.model.put(content.ljust(len(self.model.base), b"\0"))
        try:
            await snapshots.apply(self.node, snapshots.Selector(id=which))
        except BaseException:
            request.finish(self.tick(), False)
            raise
        request.finish(self.tick(), True, True)

    async def give_up(self) -> None:
        if not self.held:
            return
        which = next(iter(self.held))
        del self.held[which]
        await snapshots.delete(self.node, snapshots.Selector(id=which))

    async def bitmap(self, name: str) -> None:
        await bitmaps.add(self.node.engine, name, 512, persistent=True)

    async def merge(self) -> None:
        engine = self.node.engine
        if {"one", "two"} <= {bitmap.name for bitmap in engine.bitmaps}:
            await bitmaps.merge(engine, "two", [await bitmaps.load(engine, "one")])

    async def drop(self) -> None:
        engine = self.node.engine
        for name in [bitmap.name for bitmap in engine.bitmaps][:1]:
            await bitmaps.clear(engine, name)
            await bitmaps.remove(engine, name)

    async def amend(self, **changes: Any) -> None:
        format: Any = self.node.format
        await self.node.run_procedure(format.amend(changes, False))

    def steps(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        unit, size = self.kit.unit, self.kit.size
        key = {"encrypt.state": "active", "encrypt.new-secret": "s1", "encrypt.iter-time": 1}
        steps: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("allocate", lambda: self.write(unit // 2, 6 * unit)),
        ]
        if self.kit.packs:
            steps += [("compress", lambda: self.pack(20 * self.kit.pack_unit))]
        if self.kit.bitmaps:
            steps += [
                ("add a bitmap", lambda: self.bitmap("one")),
                ("write", lambda: self.write(9 * unit, unit)),
                ("add another", lambda: self.bitmap("two")),
                ("write", lambda: self.write(12 * unit, unit)),
                ("store", lambda: bitmaps.store(self.node.engine)),
                ("merge", self.merge),
            ]
        if self.kit.snapshots or "data-file" in self.kit.slots:
            steps += [("take", self.take), ("write", lambda: self.write(3 * unit, 4 * unit))]
            steps += [("take another", self.take)]
        steps += [
            ("grow", lambda: self.resize(size + 5 * unit)),
            ("write", lambda: self.write(size - 700, unit + 700)),
            ("discard", lambda: self.clear(4 * unit, 2 * unit, not self.kit.packs)),
            ("wider counts", lambda: self.amend(refcount_bits=32)),
        ]
        if self.kind.startswith("luks"):
            steps += [("another key", lambda: self.amend(**key))]
        if self.kit.snapshots:
            steps += [("apply", self.apply), ("write", lambda: self.write(100, 2 * unit))]
            steps += [("give one up", self.give_up), ("and write", lambda: self.write(700, unit))]
        if self.kit.bitmaps:
            steps += [("drop", self.drop)]
        return [*steps, ("flush", self.flush), ("close", self.node.close)]

    async def look_more(self, node: Any) -> None:
        """What is there of the snapshots reads as it did."""
        there = {info.id for info in snapshots.listed(node)}
        if not self.at and there != set(self.held):
            raise Mismatch(f"{there} for {set(self.held)}")
        node.read_only = True
        for which in there & set(self.held):
            await snapshots.show(node, snapshots.Selector(id=which))
            (content,) = await node.read([0], [node.size])
            if bytes(content) != self.held[which]:
                raise Mismatch(f"snapshot {which} has other bytes")
            if await snapshots.read_vm_state(node, 0, len(STATE)) != STATE:
                raise Mismatch(f"snapshot {which} has another VM state")
        if set(self.held) - there:
            raise Mismatch(f"lost: {set(self.held) - there}")
