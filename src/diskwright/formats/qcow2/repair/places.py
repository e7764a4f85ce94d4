"""New places for what lies over something else, and what must never be written over."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Table, Write
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from ....records import NamedTuple
from ...editing import ask, flush, unpin
from ..check.checking import Checker
from ..check.counts import Counts
from ..check.references import Structures
from ..machine.core import SLOT
from ..snapshots.sharing import Recounter

if TYPE_CHECKING:
    from ..format import Qcow2

_BATCH_BYTES = 1 << 20
# Bytes of copies beyond as many as the file has: more would be an image made to fill a disk.
_MOST_COPIES = 4 << 30


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
        self.most = (1 << image.refcount_bits) - 1
        """The largest count; what was found may be more."""
        self.highest = found.counts.highest
        """No cluster has more references than that."""
        self.claims = Counts()
        self.copies = 0
        self.mended = 0

    # -- space
    def take(self, count: int, times: int = 1) -> Procedure:
        """``count`` clusters, each with ``times`` references, whose counts are durable."""
        if not count:
            return []
        self.copies += count
        self._bound(self.copies)
        image = self.image
        pins: list[Table] = []
        chosen = yield from ask(image, lambda: image.choose(count), pins)
        image.take(chosen)
        yield from flush(image)
        unpin(pins)
        yield from self._taken([(start, stop) for start, stop, _ in chosen], times)
        return [cluster for start, stop, _ in chosen for cluster in range(start, stop)]

    def _take_run(self, count: int, times: int = 1) -> Procedure:
        """The first of ``count`` clusters in one run, likewise."""
        self.copies += count
        self._bound(self.copies)
        image = self.image
        pins: list[Table] = []
        start: int = yield from ask(image, lambda: image.take_region(count), pins)
        yield from flush(image)
        unpin(pins)
        yield from self._taken([(start, start + count)], times)
        return start

    def _taken(self, runs: list[tuple[int, int]], times: int) -> Procedure:
        for start, stop in runs:
            self.claims.add_run(start, stop)
        more = min(times, self.most) - 1
        if more > 0:
            recounter = Recounter(self.image, 1)
            yield from recounter.claims([(start, stop, more) for start, stop in runs])
            yield from recounter.finish()

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

    def _crowded(self, first: int, stop: int, more: int = 0) -> bool:
        """Some of the clusters [first, stop) would have more references than can be counted, with
        ``more`` beside those that were found."""
        if self.highest + more <= self.most:
            return False
        counts = self.found.counts
        return any(counts.get(cluster) + more > self.most for cluster in range(first, stop))

    def _name_once_more(self, first: int, stop: int) -> None:
        """Count a reference that was not there yet."""
        counts = self.found.counts
        counts.add_run(first, stop)
        self.highest = max([self.highest, *map(counts.get, range(first, stop))])

    def _region(self, data: bytes, tag: str) -> Procedure:
        """Write ``data`` to a new place of its own; returns its offset, counted and durable."""
        count = -(-len(data) >> self.bits)
        start: int = yield from self._take_run(count)
        data = data.ljust(count << self.bits, b"\0")
        for at in range(0, len(data), _BATCH_BYTES):
            part = data[at : at + _BATCH_BYTES]
            yield Write([MetaWrite(SLOT, (start << self.bits) + at, part, tag)])
        yield Barrier()
        return start << self.bits

    # -- L1 tables
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
        structures = Structures(self.image, self.found.meter)
        yield from structures.walk()
        return structures.counts
