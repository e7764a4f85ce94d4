"""New places for what lies over something else, and what must never be written over."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Table, Write
from ....errors import CorruptImage
from ....ondisk import big_endian_array, big_endian_bytes
from ...editing import ask, flush, unpin
from .. import header as hd
from ..check.checking import Checker
from ..check.counts import Counts
from ..check.references import Structures
from ..machine.core import SLOT
from ..snapshots.table import encode_table

if TYPE_CHECKING:
    from ..format import Qcow2

_BATCH_BYTES = 1 << 20
# Bytes of copies beyond as many as the file has: more would be an image made to fill a disk.
_MOST_COPIES = 4 << 30
_SNAPSHOTS_AT = 64


class Root(NamedTuple):
    """An L1 table at byte ``offset``; ``snapshot`` is its number, -1 for the active one."""

    offset: int
    entries: array[int]
    snapshot: int


class Places:
    """Space behind the end of the file, and claims: which clusters have an owner."""

    def __init__(self, image: Qcow2, found: Checker) -> None:
        self.image = image
        self.header = image.header
        self.found = found
        self.bits, self.size = image.cluster_bits, image.cluster_size
        self.end = found.file_clusters
        self.claims = Counts()
        self.copies = 0
        self.mended = 0

    # -- space
    def _take(self, count: int) -> Procedure:
        """``count`` clusters whose counts are durable."""
        self.copies += count
        self._bound(self.copies)
        image = self.image
        pins: list[Table] = []
        chosen = yield from ask(image, lambda: image.choose(count), pins)
        image.take(chosen)
        yield from flush(image)
        unpin(pins)
        out = [cluster for start, stop, _ in chosen for cluster in range(start, stop)]
        for cluster in out:
            self.claims.add(cluster)
        return out

    def _bound(self, copies: int) -> None:
        if copies > self.end + (_MOST_COPIES >> self.bits):
            raise CorruptImage("Could not repair image: too many of its clusters lie over others")

    def _copy(self, pairs: Iterable[tuple[int, int]]) -> Procedure:
        """Copy host clusters: (from, to)."""
        step = max(1, _BATCH_BYTES >> self.bits)
        todo = list(pairs)
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            raws = yield Read(SLOT, [(old << self.bits, self.size) for old, _ in part])
            yield Write(
                [
                    MetaWrite(SLOT, new << self.bits, raw, "cow_write")
                    for (_, new), raw in zip(part, raws, strict=True)
                ]
            )
            yield Progress(start, len(todo))

    def _region(self, data: bytes, tag: str) -> Procedure:
        """Write ``data`` to a new place of its own; returns its offset, counted and durable."""
        image = self.image
        count = -(-len(data) >> self.bits)
        self.copies += count
        self._bound(self.copies)
        pins: list[Table] = []
        start: int = yield from ask(image, lambda: image.take_region(count), pins)
        yield from flush(image)
        unpin(pins)
        data = data.ljust(count << self.bits, b"\0")
        for at in range(0, len(data), _BATCH_BYTES):
            part = data[at : at + _BATCH_BYTES]
            yield Write([MetaWrite(SLOT, (start << self.bits) + at, part, tag)])
        yield Barrier()
        return start << self.bits

    def _l1_place(self) -> Procedure:
        """An L1 table that the file does not hold as a whole gets a new place."""
        image, h = self.image, self.header
        length = 8 * h.l1_size
        if not h.l1_size or (h.l1_offset + length - 1) >> self.bits < self.end:
            return
        h.l1_offset = yield from self._region(big_endian_bytes(image.l1), "l1_grow_write_table")
        fields = struct.pack(">IQ", h.l1_size, h.l1_offset)
        yield Write([MetaWrite(SLOT, hd.L1_OFFSET, fields, "l1_grow_activate_table")])
        yield Barrier()
        image.reserve_structures()
        self.mended += 1
        self.found.result.say(f"Repairing L1 table: it is at {h.l1_offset:#x} now")

    # -- snapshots
    def _snapshot_places(self) -> Procedure:
        """A snapshot table that the file does not hold, or whose entries lack what version 3 asks
        for, is written anew; so is the L1 table of a snapshot that is outside the file or lies over
        something."""
        image, h = self.image, self.header
        table = list(image.snapshot_table)
        counts = self.found.counts
        moved = False
        for number, snapshot in enumerate(table):
            length = 8 * snapshot.l1_size
            if not length:
                continue
            first, last = snapshot.l1_offset >> self.bits, snapshot.l1_offset + length - 1
            last >>= self.bits
            inside = first > 0 and last < self.end
            if inside and all(counts.get(cluster) < 2 for cluster in range(first, last + 1)):
                continue
            raw = yield from self._read_region(snapshot.l1_offset, length)
            place = yield from self._region(raw, "l1_grow_write_table")
            table[number] = snapshot._replace(l1_offset=place)
            moved = True
        if h.version > 2 and any(snapshot.disk_size is None for snapshot in table):
            table = [s if s.disk_size is not None else s._replace(disk_size=h.size) for s in table]
            moved = True
        last = (h.snapshots_offset + image.snapshot_bytes - 1) >> self.bits
        inside = last < self.end
        first = h.snapshots_offset >> self.bits
        if not moved and inside and all(counts.get(c) < 2 for c in range(first, last + 1)):
            return
        data = encode_table(table)
        h.snapshots_offset = yield from self._region(data, "none")
        yield Write([MetaWrite(SLOT, _SNAPSHOTS_AT, struct.pack(">Q", h.snapshots_offset))])
        yield Barrier()
        image.snapshot_table, image.snapshot_bytes = table, len(data)
        image.reserve_structures()
        self.mended += 1
        self.found.result.say(f"Repairing snapshot table: it is at {h.snapshots_offset:#x} now")

    def _read_region(self, offset: int, length: int) -> Procedure:
        out = bytearray()
        for at in range(0, length, _BATCH_BYTES):
            (raw,) = yield Read(SLOT, [(offset + at, min(_BATCH_BYTES, length - at))])
            out += raw
        return bytes(out)

    def _roots(self) -> Procedure:
        """The active L1 table and those of the snapshots."""
        roots = [Root(self.header.l1_offset, self.image.l1, -1)]
        for number, snapshot in enumerate(self.image.snapshot_table):
            raw = yield from self._read_region(snapshot.l1_offset, 8 * snapshot.l1_size)
            roots.append(Root(snapshot.l1_offset, big_endian_array(64, raw), number))
        return roots

    # -- claims
    def _structures(self) -> Procedure:
        """What everything but L2 tables and guest data has: counts of its clusters."""
        structures = Structures(self.image)
        yield from structures.walk()
        return structures.counts
