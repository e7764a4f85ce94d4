"""Bytes that a transform (a cipher) stands before: decoded behind a read, encoded before a write,
in pieces that go through the pool side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ..abilities import Transform
from ..contract import OP_DATA, Step
from ..extents import Data
from ..hints import TYPE_CHECKING, Any
from ..records import NamedTuple
from .buffers import page_buffer
from .kernel import wait_all
from .node import Buffer

if TYPE_CHECKING:
    from .engine import Engine

# What one job works on, at most: few jobs, and still some for each processor.
JOB = 512 << 10
# Less is done at once: the way to the pool and back costs as much.
_INLINE = 4 << 10
# Buffers of a job that are kept.
_MOST_SPARE = 8

_Place = tuple[int, int, int]


class _Group(NamedTuple):
    """Ranges of one slot with the same transforms; ``places`` are (guest, host, length)."""

    slot: str
    xform: tuple[Transform, ...]
    places: list[_Place]
    views: list[memoryview]


class Transformer:
    """The transformed bytes of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._spare: list[memoryview] = []

    async def fill(self, wanted: Iterable[tuple[Data, int, memoryview]]) -> None:
        """Fill each view with the guest's bytes from (extent, guest offset)."""
        start = self.engine.driver.start
        parts = ((e.slot, e.xform, guest, e.host, view) for e, guest, view in wanted)
        groups = list(_groups(parts))
        for slot in dict.fromkeys(group.slot for group in groups):
            if self.engine.slots[slot].wants_events:
                await self.engine.announce(slot, "read_aio")
        await wait_all([start(self._read(group), io=True) for group in groups])

    async def _read(self, group: _Group) -> None:
        child = self.engine.slots[group.slot]
        hosts = [place[1] for place in group.places]
        lengths = [place[2] for place in group.places]
        await child.read(hosts, lengths, group.views)
        room = group.views[0] if len(group.views) == 1 else self._room()
        if sum(lengths) <= _INLINE:
            _decode(group, room)
        else:
            await self.engine.driver.compute(_decode, group, room)
        if len(group.views) > 1:
            self.give_back([room])

    async def encoded(
        self, steps: Sequence[Step], sources: Sequence[Buffer]
    ) -> tuple[list[Step], list[Buffer], list[memoryview]]:
        """The steps, in pieces, the bytes for the file of each, and the memory that these are in:
        to be given back (`give_back`) when they have been written."""
        parts = (
            (step.slot, step.xform, step.guest, step.host, memoryview(source))
            for step, source in zip(steps, sources, strict=True)
        )
        groups = list(_groups(parts))
        rooms = [self._room() for _ in groups]
        if len(groups) == 1 and sum(len(view) for view in groups[0].views) <= _INLINE:
            _encode(groups[0], rooms[0])
        else:
            compute = self.engine.driver.compute
            await wait_all([compute(_encode, *job) for job in zip(groups, rooms, strict=True)])
        out_steps: list[Step] = []
        out: list[Buffer] = []
        for group, room in zip(groups, rooms, strict=True):
            at = 0
            for guest, host, length in group.places:
                out_steps.append(Step(OP_DATA, guest, length, group.slot, host))
                out.append(room[at : at + length])
                at += length
        return out_steps, out, rooms

    def _room(self) -> memoryview:
        return self._spare.pop() if self._spare else page_buffer(JOB)

    def give_back(self, rooms: list[memoryview]) -> None:
        """Nobody uses them any more."""
        self._spare += rooms[: _MOST_SPARE - len(self._spare)]


def _groups(
    parts: Iterable[tuple[str, tuple[Any, ...], int, int, memoryview]],
) -> Iterator[_Group]:
    """What one job each works on: long ranges are divided, short ones put together."""
    open_groups: dict[tuple[str, tuple[Any, ...]], tuple[_Group, int]] = {}
    for slot, xform, guest, host, view in parts:
        at = 0
        while at < len(view):
            key = slot, xform
            group, weight = open_groups.get(key) or (_Group(slot, xform, [], []), 0)
            length = min(len(view) - at, JOB - weight)
            group.places.append((guest + at, host + at, length))
            group.views.append(view[at : at + length])
            at += length
            if weight + length == JOB:
                yield group
                open_groups.pop(key, None)
            else:
                open_groups[key] = group, weight + length
    for group, _ in open_groups.values():
        yield group


def _decode(group: _Group, room: memoryview) -> None:
    """Decode the views where they are, by way of ``room`` if there are several."""
    data, alone = _joined(group, room), len(group.views) == 1
    for transform in reversed(group.xform):
        transform.decode(group.places, data, data)
    at = 0
    for view in () if alone else group.views:
        view[:] = data[at : at + len(view)]
        at += len(view)


def _encode(group: _Group, room: memoryview) -> None:
    """Leave the bytes for the file in ``room``."""
    data = _joined(group, room)
    into = room[: len(data)]
    for transform in group.xform:
        transform.encode(group.places, data, into)
        data = into


def _joined(group: _Group, room: memoryview) -> memoryview:
    """The views as one."""
    if len(group.views) == 1:
        return group.views[0]
    at = 0
    for view in group.views:
        room[at : at + len(view)] = view
        at += len(view)
    return room[:at]
