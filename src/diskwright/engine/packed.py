"""Reading compressed units: each once a batch, unpacked in the pool; the last of which only a part
was wanted are kept."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

from ..abilities import Buffer
from ..errors import DamagedData
from ..extents import Packed
from ..hints import TYPE_CHECKING, Any
from .buffers import page_buffer
from .kernel import wait_all
from .spans import merge_spans

if TYPE_CHECKING:
    from .engine import Engine

# Unpacked units that are kept for the next request (bytes): a client that reads a unit of 64 KiB
# in pieces of 4 KiB would otherwise have it unpacked sixteen times.
KEPT = 8 << 20
# What one job of the pool unpacks, about; less is not worth the way there and back.
JOB = 1 << 20
_INLINE = 64 << 10
# Buffers for what is stored, of a job each, that are kept.
_MOST_SPARE = 4

Wanted = list[tuple[Packed, memoryview]]
_Key = tuple[str, int, Any]


class Unpacker:
    """The compressed units of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._kept: OrderedDict[_Key, bytes] = OrderedDict()
        self._weight = 0
        self._spare: list[memoryview] = []
        """Buffers for what is stored."""

    def forget(self) -> None:
        """Host space may hold something else from now on."""
        self._kept.clear()
        self._weight = 0

    async def fill(self, wanted: Wanted) -> None:
        """Fill each view with its part of a unit.

        Raises DamagedData where a unit does not unpack.
        """
        missing: dict[_Key, Wanted] = {}
        for extent, view in wanted:
            key = _key(extent)
            unit = self._kept.get(key)
            if unit is None:
                missing.setdefault(key, []).append((extent, view))
            else:
                self._kept.move_to_end(key)
                _lay(unit, extent, view)
        if not missing:
            return
        by_slot: dict[str, list[Wanted]] = {}
        for key, users in missing.items():
            by_slot.setdefault(key[0], []).append(users)
        for slot, units in by_slot.items():
            await self._read(slot, units)

    async def _read(self, slot: str, units: list[Wanted]) -> None:
        """Units of one slot, in groups that a pool job each unpacks."""
        if self.engine.slots[slot].wants_events:
            await self.engine.announce(slot, "read_compressed")
        groups: list[list[Wanted]] = []
        size = JOB
        for users in units:
            if size >= JOB:
                groups.append([])
                size = 0
            groups[-1].append(users)
            size += users[0][0].unit
        start = self.engine.driver.start
        await wait_all([start(self._group(slot, group), io=True) for group in groups])

    async def _group(self, slot: str, units: list[Wanted]) -> None:
        extents = [users[0][0] for users in units]
        # Units that follow each other in the file are read as one.
        spans = merge_spans([(e.host, e.host + e.host_length) for e in extents])
        starts = [start for start, _ in spans]
        lengths = [end - start for start, end in spans]
        size = sum(lengths)
        room = self._spare.pop() if self._spare and size <= JOB else page_buffer(max(size, JOB))
        places = list(accumulate(lengths, initial=0))
        views = [room[at : at + n] for at, n in zip(places, lengths, strict=False)]
        await self.engine.slots[slot].read(starts, lengths, views)
        stored = []
        for extent in extents:
            i = bisect_right(starts, extent.host) - 1
            at = places[i] + extent.host - starts[i]
            stored.append(room[at : at + extent.host_length])
        if len(extents) == 1 and extents[0].unit <= _INLINE:
            left = _unpack(units, stored)
        else:
            left = await self.engine.driver.compute(_unpack, units, stored)
        if len(room) == JOB and len(self._spare) < _MOST_SPARE:
            self._spare.append(room)
        for extent, unit in left:
            self._keep(_key(extent), unit)

    def _keep(self, key: _Key, unit: bytes) -> None:
        self._weight += len(unit) - len(self._kept.pop(key, b""))
        self._kept[key] = unit
        while self._weight > KEPT:
            self._weight -= len(self._kept.popitem(last=False)[1])


def _key(extent: Packed) -> _Key:
    # The codec, too: it may know whose unit it is, and refuse to be another's.
    return extent.slot, extent.host, extent.codec


def _lay(unit: bytes, extent: Packed, view: memoryview) -> None:
    if extent.length < len(unit):
        view[:] = memoryview(unit)[extent.skip : extent.skip + extent.length]
    else:
        view[:] = unit


def _unpack(units: list[Wanted], stored: Sequence[Buffer]) -> list[tuple[Packed, bytes]]:
    """Fill the views; runs in the pool.  Returns the units of which somebody may soon want more:
    who took one as a whole, a copy or a comparison, goes on to others."""
    left = []
    for users, data in zip(units, stored, strict=True):
        extent = users[0][0]
        try:
            unit = extent.codec.unpack(data, extent.unit)
        except ValueError as error:
            raise DamagedData(str(error), field="compressed unit", offset=extent.host) from error
        for part, view in users:
            _lay(unit, part, view)
        if extent.length < extent.unit:
            left.append((extent, unit))
    return left
