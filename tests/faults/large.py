"""The workload of formats whose units are large: one image, what is below it never fails."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from crash.kits import Kit
from diskwright.engine.node import Node
from diskwright.engine.tables import Tables
from diskwright.graph.mapped import MappedNode
from diskwright.testing.memory import RecordingNode
from diskwright.testing.model import Model
from diskwright.testing.scheduler import InlineDriver

from .workload import Faulty


@lru_cache(maxsize=8)
def kit_of(kind: str) -> Kit:
    """The same image every time."""
    return Kit(kind, random.Random(1))


class Large(Faulty):
    """Allocates, overwrites, discards, allocates again, zeroes, resizes and closes."""

    refcounted = False
    kit_of = staticmethod(kit_of)

    def __init__(self, kind: str, which: int, at: int, code: int) -> None:
        self.kind = kind
        self.kit = self.kit_of(kind)
        self.driver = InlineDriver()
        self.clock = 0
        files = self.kit.files()
        self.leaves = [RecordingNode(self.driver, file, clock=self.tick) for file in files]
        self.which, self.at, self.code = which, at, code
        self.opening = self.layers(self.driver, self.leaves)
        self.node = self.opening[-1][0]
        size = self.kit.size
        whole = size + 5 * self.kit.unit
        self.model = Model(self.kit.base[:size].ljust(whole, b"\0"), self.tick)
        self.sizes = [size]
        self.told: list[str] = []

    def layers(self, driver: Any, leaves: list[RecordingNode]) -> list[tuple[MappedNode, Any]]:
        slots: dict[str, Node] = dict(zip(self.kit.slots, leaves, strict=True))
        if self.kit.base:
            slots["backing"] = RecordingNode(driver, self.kit.base)
        format, opening = self.kit.open()

        async def opener(*named: Any) -> None:
            """Every slot is filled."""

        tables = Tables(self.kit.budget if self.refcounted else 4200)
        node = MappedNode(driver, self.kit.format, format, slots, tables, opener=opener)
        return [(node, opening)]

    def steps(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        unit, size = self.kit.unit, self.kit.size
        hides = self.kind != "vmdk-backing"  # without zeroed grains nothing hides a parent
        resizing: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("grow", lambda: self.resize(size + unit)),
            ("write at the end", lambda: self.write(self.node.size - 600, 600)),
            ("flush", self.flush),
            ("shrink", lambda: self.resize(size - unit)),
        ]
        return [
            ("allocate", lambda: self.write(unit - 5000, 9000)),
            ("flush", self.flush),
            ("overwrite", lambda: self.write(unit - 700, 1500)),
            ("allocate beside", lambda: self.write(unit + 20_000, 600)),
            ("discard", lambda: self.clear(0, unit, True) if hides else self.flush()),
            ("flush", self.flush),
            ("allocate again", lambda: self.write(300, 5000)),
            ("zero", lambda: self.clear(unit, unit, False)),
            ("zero a part", lambda: self.clear(2000, 1000, False)),
            ("flush", self.flush),
            *(resizing if self.kit.may_resize() else []),
            ("write", lambda: self.write(unit + 5000, 700)),
            ("close", self.node.close),
        ]
