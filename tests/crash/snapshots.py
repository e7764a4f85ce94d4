"""Internal snapshots in a workload, with VM state: whatever a crash leaves, each holds what it held
when it was taken, or is not there yet, or not any more."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from diskwright.errors import NotSupported
from diskwright.graph.mapped import MappedNode
from diskwright.ops import snapshots
from diskwright.testing.memory import NEVER
from diskwright.testing.model import Mismatch, pattern


class Kept(NamedTuple):
    """``begun`` and ``ended``: when it was taken; ``state``: the VM's."""

    id: str
    content: bytes
    state: bytes
    begun: int
    ended: int


class Held:
    """The snapshots of one workload."""

    def __init__(self, node: MappedNode, rng: random.Random, tick: Callable[[], int]) -> None:
        self.node, self.rng, self.tick = node, rng, tick
        self.kept: list[Kept] = []
        self.gone: dict[Kept, int] = {}
        """When giving it up began."""
        self.refused = 0

    @property
    def live(self) -> list[Kept]:
        return [kept for kept in self.kept if kept not in self.gone]

    async def content(self) -> bytes:
        (content,) = await self.node.read([0], [self.node.size])
        return bytes(content)

    async def take(self) -> None:
        """With VM state, now and then; refused where counts are too narrow, or with a data file."""
        content, begun = await self.content(), self.tick()
        state = pattern(60_000 + begun % 1000, 0, self.rng.choice([0, 0, 700, 5000]))
        try:
            await snapshots.write_vm_state(self.node, 0, state)
            made = await snapshots.create(self.node, "crash", vm_state_size=len(state))
        except NotSupported:
            self.refused += 1
        else:
            self.kept.append(Kept(made.id, content, state, begun, self.tick()))

    async def give_up(self, one: Kept) -> None:
        self.gone[one] = self.tick()
        await snapshots.delete(self.node, snapshots.Selector(id=one.id))

    async def judge(self, node: MappedNode, moment: int, what: str) -> int:
        """Look into all snapshots of a crash state; how many there are."""
        there = [info.id for info in snapshots.listed(node)]
        for kept in self.kept:
            given_up = self.gone.get(kept, NEVER)
            if kept.ended <= moment < given_up and kept.id not in there:
                raise Mismatch(f"{what}: snapshot {kept.id} is lost")
        known = {kept.id: kept for kept in self.kept if kept.begun <= moment}
        node.read_only = True
        for which in there:
            await snapshots.show(node, snapshots.Selector(id=which))
            if which not in known:
                raise Mismatch(f"{what}: there never was a snapshot {which}")
            (content,) = await node.read([0], [node.size])
            wanted = known[which].content
            if node.format.header.version == 2:  # it does not say how large the disk was  # type: ignore[attr-defined]
                content = bytes(content)[: len(wanted)].ljust(len(wanted), b"\0")
            if bytes(content) != wanted:
                raise Mismatch(f"{what}: snapshot {which} has other bytes")
            state = await snapshots.read_vm_state(node, 0, len(known[which].state))
            if state != known[which].state:
                raise Mismatch(f"{what}: snapshot {which} has another VM state")
        return len(there)
