"""Which grains of a seSparse file are in use: the free bitmap and the reverse map.

Both are tables of the engine in slices of 4 KiB: the bitmap as ``bytearray``, the reverse map
("backmap") as ``array('Q')``.  A bit is set when its grain is reserved and cleared once nothing on
disk refers to the grain, so a crash can only leave a grain marked that nobody uses.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence

from ....contract import HostRange, MetaWrite, NeedMeta, Procedure, Read, Table
from ....errors import NoSpace
from ....ondisk import little_endian_array, little_endian_bytes
from ....units import SECTOR
from ..parts import Image
from .header import GRAIN, Header

SLICE = 4096
BITS = SLICE * 8
PLACES = SLICE // 8
LOAD, UPDATE = "refblock_load", "refblock_update"
_READ_AHEAD = 16  # slices of the bitmap
_NOT_FULL, _NOT_EMPTY = re.compile(rb"[^\xff]"), re.compile(rb"[^\0]")

Run = tuple[int, int]  # grains [start, end)


def next_clear(data: bytearray, bit: int) -> int:
    """The first clear bit from ``bit`` on; the number of bits when there is none."""
    byte = bit >> 3
    left = ~data[byte] >> (bit & 7) & 0xFF >> (bit & 7)
    if left:
        return bit + _lowest(left)
    found = _NOT_FULL.search(data, byte + 1)
    if found is None:
        return len(data) * 8
    return found.start() * 8 + _lowest(~data[found.start()] & 0xFF)


def next_set(data: bytearray, bit: int) -> int:
    """The first set bit from ``bit`` on; the number of bits when there is none."""
    byte = bit >> 3
    if byte >= len(data):
        return len(data) * 8
    left = data[byte] >> (bit & 7)
    if left:
        return bit + _lowest(left)
    found = _NOT_EMPTY.search(data, byte + 1)
    if found is None:
        return len(data) * 8
    return found.start() * 8 + _lowest(data[found.start()])


def _lowest(value: int) -> int:
    return (value & -value).bit_length() - 1


def fill(data: bytearray, start: int, end: int, value: bool) -> None:
    """Set or clear the bits [start, end)."""
    while start < end:
        byte, bit = start >> 3, start & 7
        if not bit and end - start >= 8:
            count = (end - start) >> 3
            data[byte : byte + count] = (b"\xff" if value else b"\0") * count
            start += count * 8
            continue
        stop = min(end, start - bit + 8)
        mask = (1 << (stop - start)) - 1 << bit
        data[byte] = data[byte] | mask if value else data[byte] & ~mask
        start = stop


def runs_of(grains: Iterable[int]) -> list[Run]:
    """Grains in any order as ascending runs."""
    out: list[Run] = []
    for grain in sorted(grains):
        if out and out[-1][1] == grain:
            out[-1] = (out[-1][0], grain + 1)
        else:
            out.append((grain, grain + 1))
    return out


class SesparseSpace:
    """The grains of one extent file."""

    def __init__(self, image: Image, slot: str, header: Header) -> None:
        self.image = image
        self.slot = slot
        self.header = header
        self.cursor = 0
        """No grain below this one is free."""
        self.lost: list[int] = []
        """Grains that nothing in memory refers to any more."""
        self._quarantine: set[int] = set()
        self._held: dict[int, tuple[bytearray | array[int], int]] = {}
        """Slices of lost grains, and how many of these wait for their bits to be cleared: if a
        slice is evicted meanwhile, it comes back as the same object."""

    # -- tables
    def bitmap_at(self, grain: int) -> int:
        """Where the slice of the bitmap for a grain is."""
        return self.header.bitmap.start + grain // BITS * SLICE

    def backmap_at(self, grain: int) -> int:
        """Where the slice of the reverse map for a grain is."""
        return self.header.backmap.start + grain // PLACES * SLICE

    def places(self, runs: Sequence[Run]) -> list[int]:
        """All slices that describe ``runs``."""
        out: dict[int, None] = {}
        for start, end in runs:
            for grain in range(start - start % PLACES, end, PLACES):
                out[self.backmap_at(grain)] = None
                out[self.bitmap_at(grain)] = None
        return list(out)

    def missing(self, places: Iterable[int]) -> list[int]:
        """Those that are not in memory."""
        tables, slot = self.image.tables, self.slot
        return [place for place in places if tables.get(slot, place) is None]

    def table(self, place: int) -> Table:
        """A slice that is in memory."""
        table = self.image.tables.get(self.slot, place)
        assert table is not None
        return table

    def owns(self, offset: int) -> bool:
        """True for the place of a slice."""
        return any(
            region.start <= offset < region.end * SECTOR
            for region in (self.header.bitmap, self.header.backmap)
        )

    def load(self, offset: int, data: bytes) -> None:
        """Decode a slice."""
        held = self._held.get(offset)
        bitmap = self.header.bitmap
        decoded: bytearray | array[int]
        if held is not None:
            decoded = held[0]
        elif bitmap.start <= offset < bitmap.end * SECTOR:
            decoded = bytearray(data)
        else:
            decoded = little_endian_array(64, data)
        self.image.tables.put(self.slot, offset, decoded, SLICE)

    # -- taking
    def choose(self, count: int) -> list[Run] | NeedMeta:
        """The ``count`` lowest free grains; changes nothing.  Raises NoSpace."""
        runs: list[Run] = []
        limit = self.header.grain_count
        at = self.cursor
        while count:
            if at >= limit:
                raise NoSpace
            table = self.image.tables.get(self.slot, self.bitmap_at(at))
            if table is None:
                last = min(limit - 1, at + (_READ_AHEAD - 1) * BITS)
                wanted = dict.fromkeys(
                    self.bitmap_at(grain) for grain in (*range(at, last, BITS), last)
                )
                return self.need(self.missing(wanted))
            first = at - at % BITS
            for start, end in self._clear_runs(table.data, first, at, min(limit, first + BITS)):
                end = min(end, start + count)
                if runs and runs[-1][1] == start:
                    runs[-1] = (runs[-1][0], end)
                else:
                    runs.append((start, end))
                count -= end - start
                if not count:
                    break
            at = first + BITS
        missing = self.missing(self.places(runs))
        return self.need(missing) if missing else runs

    def _clear_runs(self, data: bytearray, first: int, at: int, limit: int) -> Iterator[Run]:
        while at < limit:
            start = first + next_clear(data, at - first)
            end = min(first + next_set(data, start - first), limit)
            if start >= limit:
                return
            if self._quarantine:
                for grain in range(start, end):
                    if grain not in self._quarantine:
                        yield grain, grain + 1
            else:
                yield start, end
            at = end

    def need(self, places: Iterable[int]) -> NeedMeta:
        """The request for these slices."""
        return NeedMeta(self.slot, [(place, SLICE) for place in places], LOAD)

    def take(self, runs: Sequence[Run]) -> list[Table]:
        """Reserve what `choose` has found; returns the slices that will change."""
        self._mark(runs, True)
        if runs:
            self.cursor = runs[-1][1]
        return [self.table(place) for place in self.places(runs)]

    def give_back(self, runs: Sequence[Run]) -> None:
        """Grains that were reserved and not used; their slices are pinned."""
        self._mark(runs, False)
        if runs:
            self.cursor = min(self.cursor, runs[0][0])

    def _mark(self, runs: Sequence[Run], value: bool) -> None:
        for start, end in runs:
            while start < end:
                first = start - start % BITS
                stop = min(end, first + BITS)
                table = self.table(self.bitmap_at(start))
                fill(table.data, start - first, stop - first, value)
                self.image.tables.mark(table)
                start = stop

    def point(self, grain: int, guest: int) -> None:
        """``grain`` has the data of guest grain ``guest``."""
        table = self.table(self.backmap_at(grain))
        table.data[grain % PLACES] = guest
        self.image.tables.mark(table)

    def is_of(self, grain: int, guest: int) -> bool:
        """True when bitmap and reverse map say that ``grain`` is that of ``guest`` (both in
        memory)."""
        bits: bytearray = self.table(self.bitmap_at(grain)).data
        bit = grain % BITS
        owner: int = self.table(self.backmap_at(grain)).data[grain % PLACES]
        return bool(bits[bit >> 3] >> (bit & 7) & 1) and owner == guest

    # -- giving
    def lose(self, grain: int) -> None:
        """Nothing in memory refers to a grain any more; its slices are pinned."""
        self.lost.append(grain)
        for place in (self.bitmap_at(grain), self.backmap_at(grain)):
            count = self._held[place][1] if place in self._held else 0
            self._held[place] = self.table(place).data, count + 1

    def settle(self, grains: list[int]) -> list[HostRange]:
        """Nothing on disk refers to these lost grains any more."""
        tables = self.image.tables
        for grain in grains:
            for place in (self.bitmap_at(grain), self.backmap_at(grain)):
                data, count = self._held.pop(place)
                if count > 1:
                    self._held[place] = data, count - 1
                table = tables.get(self.slot, place)
                if table is None:
                    table = tables.put(self.slot, place, data, SLICE)
                tables.mark(table)
            self.table(self.backmap_at(grain)).data[grain % PLACES] = 0
        runs = runs_of(grains)
        self._mark(runs, False)
        self._quarantine.update(grains)
        start = self.header.grains.start
        return [HostRange(self.slot, start + a * GRAIN, (b - a) * GRAIN) for a, b in runs]

    def release(self, ranges: Sequence[HostRange]) -> None:
        """The space was punched: the grains may be used again."""
        start = self.header.grains.start
        for part in ranges:
            first = (part.offset - start) // GRAIN
            self._quarantine.difference_update(range(first, first + part.length // GRAIN))
            self.cursor = min(self.cursor, first)

    # -- the way to the disk
    def encode(self, table: Table) -> MetaWrite:
        """A slice as it is stored."""
        data = table.data
        raw = bytes(data) if isinstance(data, bytearray) else little_endian_bytes(data)
        return MetaWrite(self.slot, table.offset, raw, UPDATE)


def agreement(slot: str, header: Header, samples: Sequence[tuple[int, int]]) -> Procedure:
    """Whether free bitmap and reverse map say of all ``samples`` (guest grain, grain of the file)
    what the tables say; returns True or False."""
    bits = yield Read(slot, [(header.bitmap.start + grain // 8, 1) for _, grain in samples])
    owners = yield Read(slot, [(header.backmap.start + grain * 8, 8) for _, grain in samples])
    return all(
        bit[0] >> (grain & 7) & 1 and int.from_bytes(owner, "little") == guest
        for (guest, grain), bit, owner in zip(samples, bits, owners, strict=True)
    )
