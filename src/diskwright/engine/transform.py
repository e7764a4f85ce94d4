"""Bytes that a transform (a cipher) stands before: decoded behind a read, encoded before a write,
in pieces that go through the pool side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..abilities import Transform
from ..contract import OP_DATA, Step
from ..extents import Data
from .kernel import wait_all
from .node import Buffer

if TYPE_CHECKING:
    from .engine import Engine

# What one job of the pool works on, about: few jobs, and still some for each processor.
JOB = 512 << 10
# Less is done at once: the way to the pool and back costs as much.
_INLINE = 4 << 10

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
        if sum(lengths) <= _INLINE:
            _decode(group)
        else:
            await self.engine.driver.call(_decode, group)

    async def encoded(
        self, steps: Sequence[Step], sources: Sequence[Buffer]
    ) -> tuple[list[Step], list[Buffer]]:
        """The steps, in pieces, and the bytes for the file of each."""
        parts = (
            (step.slot, step.xform, step.guest, step.host, memoryview(source))
            for step, source in zip(steps, sources, strict=True)
        )
        groups = list(_groups(parts))
        if len(groups) == 1 and sum(len(view) for view in groups[0].views) <= _INLINE:
            done = [_encode(groups[0])]
        else:
            done = await wait_all([self.engine.driver.call(_encode, group) for group in groups])
        out_steps: list[Step] = []
        out: list[Buffer] = []
        for group, data in zip(groups, done, strict=True):
            at = 0
            for guest, host, length in group.places:
                out_steps.append(Step(OP_DATA, guest, length, group.slot, host))
                out.append(data[at : at + length])
                at += length
        return out_steps, out


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


def _joined(group: _Group) -> Buffer:
    return group.views[0] if len(group.views) == 1 else b"".join(group.views)


def _decode(group: _Group) -> None:
    """Runs in the pool."""
    data = _joined(group)
    for transform in reversed(group.xform):
        data = transform.decode(group.places, data)
    source, at = memoryview(data), 0
    for view in group.views:
        view[:] = source[at : at + len(view)]
        at += len(view)


def _encode(group: _Group) -> memoryview:
    """Runs in the pool."""
    data = _joined(group)
    for transform in group.xform:
        data = transform.encode(group.places, data)
    return memoryview(data)
