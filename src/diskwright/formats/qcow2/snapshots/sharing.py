"""What snapshots and the disk share: counting it once more or once less, and the COPIED flags that
say that a cluster is not shared (qcow2 specification, "Snapshots" and "L1 and L2 table entry").

These procedures walk a whole L1 table.  They run alone with nothing dirty, hold a few tables at a
time, and leave nothing dirty behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....contract import MetaWrite, Procedure, Progress, Quiesce, Read, Table, Write
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ...editing import ask, flush, unpin
from ..check.scan import Loose, Run
from ..machine.core import COPIED, OFFSET, PACKED, SLOT
from ..machine.refblock import RefBlock, decode, lift
from .named import Claim, Found, claims, each_batch, tables_of

if TYPE_CHECKING:
    from ..format import Qcow2

# Bytes of refcount blocks between two flushes.
_BLOCKS = 16 << 20
# L1 entries between two yields: a few milliseconds.
_SLICE = 8192
_PART = 4096
_CLEAR = bytes(value & 0x7F for value in range(256))
_ALONE = bytes(COPIED >> 56 if value == 1 else 0 for value in range(256))


# -- counts
class Recounter:
    """Adds a reference to clusters (``change`` 1), or takes one (-1), a few refcount blocks at a
    time."""

    def __init__(self, image: Qcow2, change: int) -> None:
        self.image = image
        self.change = change
        self.pins: list[Table] = []
        self.touched: set[int] = set()
        self.most = max(1, _BLOCKS >> image.cluster_bits)

    def l1(self, entries: Sequence[int]) -> Procedure:
        """The L2 tables of ``entries``, and all that these refer to."""
        yield from each_batch(self.image, tables_of(self.image, entries), self._tables)
        yield from self.finish()

    def _tables(self, found: list[Found]) -> Procedure:
        for table in found:
            for part in claims(self.image, table):
                yield from self.claims(part)

    def region(self, start: int, end: int) -> Procedure:
        """The host clusters [start, end)."""
        yield from self.claims([(start, end, 1)])

    def claims(self, claims: Sequence[Claim]) -> Procedure:
        """These clusters, as often as is said."""
        shift = self.image.block_shift
        for start, end, times in claims:
            while start < end:
                index = start >> shift
                stop = min(end, (index + 1) << shift)
                if index not in self.touched:
                    if len(self.touched) >= self.most:
                        yield from self.finish()
                    self.touched.add(index)
                yield from self._have(start)
                if self.change < 0:
                    self.image.freeing = "snapshot"
                    for _ in range(times):
                        self.image.free_later(start, stop)
                    self.image.freeing = "other"
                else:
                    self._raise(start, stop, times)
                start = stop

    def _have(self, cluster: int) -> Procedure:
        runs = [(cluster, cluster + 1)]
        yield from ask(self.image, lambda: self.image.missing_blocks(runs), self.pins)

    def _raise(self, start: int, end: int, times: int) -> None:
        """[start, end) is in one block."""
        image = self.image
        most = (1 << image.refcount_bits) - 1
        ((table, first, stop),) = image.block_spans(start, end)
        wrong = lift(image.block(table), first, stop, times, most)
        if wrong is not None:
            cluster = start + wrong - first
            raise CorruptImage(f"Cluster {cluster} has more references than its count says")
        image.touch_block(table, first, stop)

    def finish(self) -> Procedure:
        """Bring the counts to the disk."""
        yield from flush(self.image)
        unpin(self.pins)
        self.touched.clear()
        yield Quiesce()


# -- flags
def clear_copied(image: Qcow2, l1: Sequence[int]) -> Procedure:
    """Clear COPIED in the L2 tables that ``l1`` names; the caller lets a barrier follow."""
    step = 8 * image.stride

    def look(found: list[Found]) -> Procedure:
        writes: list[MetaWrite] = []
        for offset, raw, _ in found:
            flags = raw[0::step]
            cleared = flags.translate(_CLEAR)
            if flags != cleared:
                data = bytearray(raw)
                data[0::step] = cleared
                writes += _parts(offset, raw, bytes(data))
        if writes:
            yield Write(writes)

    yield from each_batch(image, tables_of(image, l1), look)


def _parts(offset: int, old: bytes, new: bytes) -> list[MetaWrite]:
    """Writes of what differs: parts of 4 KiB, and runs of these."""
    writes: list[MetaWrite] = []
    start = None
    for at in range(0, len(new), _PART):
        if old[at : at + _PART] != new[at : at + _PART]:
            start = at if start is None else start
        elif start is not None:
            writes.append(MetaWrite(SLOT, offset + start, new[start:at], "l2_update"))
            start = None
    if start is not None:
        writes.append(MetaWrite(SLOT, offset + start, new[start:], "l2_update"))
    return writes


class _Flags:
    """COPIED in the tables of the disk as the counts have it."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.index = -1
        self.block: RefBlock | None = None

    def run(self) -> Procedure:
        image = self.image
        seen: dict[int, None] = {}
        for l1_index, entry in enumerate(image.l1):
            if l1_index % _SLICE == 0:
                yield Progress(l1_index, len(image.l1))
            offset = entry & OFFSET
            if not offset or offset & image.cluster_mask:
                continue
            seen[offset] = None
            right = yield from self._right(entry, offset)
            if right != entry:
                image.set_l1(l1_index, right)
        yield from each_batch(image, list(seen), self._tables)
        yield from flush(image)
        yield Quiesce()

    def _right(self, entry: int, host: int) -> Procedure:
        image = self.image
        cluster = host >> image.cluster_bits
        if cluster >> image.block_shift != self.index:
            yield from self._load(cluster >> image.block_shift)
        at = cluster & image.per_block - 1
        alone = self.block is not None and self.block.get(at) == 1
        return entry | COPIED if alone else entry & ~COPIED

    def _load(self, index: int) -> Procedure:
        self.index, self.block = index, None
        image = self.image
        offset = image.block_offset(index)
        if offset:
            (raw,) = yield Read(SLOT, [(offset, image.cluster_size)], "refblock_load")
            self.block = decode(image.refcount_bits, raw)

    def _tables(self, found: list[Found]) -> Procedure:
        writes: list[MetaWrite] = []
        for offset, raw, pieces in found:
            new = bytearray(raw)
            for piece in pieces:
                if isinstance(piece, Run):
                    yield from self._run(piece, new)
                else:
                    yield from self._loose(piece, new)
            if new != raw:
                writes += _parts(offset, raw, bytes(new))
        if writes:
            yield Write(writes)

    def _run(self, run: Run, new: bytearray) -> Procedure:
        """The flags of a run stand alone in the highest bytes of its entries."""
        image = self.image
        cluster, index = (run.entry & OFFSET) >> image.cluster_bits, run.at
        end = cluster + run.length
        while cluster < end:
            if cluster >> image.block_shift != self.index:
                yield from self._load(cluster >> image.block_shift)
            at = cluster & image.per_block - 1
            count = min(end - cluster, image.per_block - at)
            flags = self._flags(at, at + count)
            new[8 * index : 8 * (index + count) : 8] = flags
            cluster += count
            index += count

    def _flags(self, start: int, stop: int) -> bytes:
        """COPIED as these counts of the block have it."""
        if self.block is None:
            return bytes(stop - start)
        counts = self.block.small(start, stop)
        if counts is None:
            counts = bytes(min(self.block.get(i), 2) for i in range(start, stop))
        return counts.translate(_ALONE)

    def _loose(self, piece: Loose, new: bytearray) -> Procedure:
        image = self.image
        bits, shift, mask = image.cluster_bits, image.block_shift, image.cluster_mask
        inside = image.per_block - 1
        for index, entry in enumerate(piece.entries, piece.at):
            host = entry & OFFSET
            if not host or entry & PACKED or host & mask:
                continue
            if host >> bits >> shift != self.index:
                yield from self._load(host >> bits >> shift)
            alone = self.block is not None and self.block.get(host >> bits & inside) == 1
            if alone != bool(entry & COPIED):
                new[8 * image.stride * index] ^= COPIED >> 56


def set_copied(image: Qcow2) -> Procedure:
    """Make COPIED in the tables of the disk say whether a count is one.

    Counts on the disk must be right, which makes either state of a flag safe until then: one that
    is clear without need costs a copy.
    """
    yield from _Flags(image).run()


__all__ = ["Recounter", "clear_copied", "set_copied"]
