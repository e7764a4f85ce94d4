"""What snapshots and the disk share: counting it once more or once less, and the COPIED flags that
say that a cluster is not shared (qcow2 specification, "Snapshots" and "L1 and L2 table entry").

These procedures walk a whole L1 table.  They run alone with nothing dirty, hold a few tables at a
time, and leave nothing dirty behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ....contract import Length, MetaWrite, Procedure, Progress, Quiesce, Read, Table, Write
from ....errors import CorruptImage
from ....ondisk import big_endian_array, big_endian_bytes
from ...editing import ask, flush, unpin
from ..check.counts import Counts
from ..machine.core import COPIED, OFFSET, PACKED, SLOT
from ..machine.refblock import RefBlock, decode

if TYPE_CHECKING:
    from ..format import Qcow2

# Bytes of L2 tables that are read at once, and of refcount blocks between two flushes.
_BATCH = 1 << 20
_BLOCKS = 16 << 20
# Entries between two yields: a few milliseconds.
_SLICE = 8192
_PART = 4096
_CLEAR = bytes(value & 0x7F for value in range(256))

Clusters = dict[int, int]  # host cluster: references


def tables_of(image: Qcow2, l1: Sequence[int]) -> list[int]:
    """Where the L2 tables of these L1 entries are.  Raises CorruptImage."""
    out = [entry & OFFSET for entry in l1 if entry & OFFSET]
    for offset in out:
        if offset & image.cluster_mask:
            raise CorruptImage(f"L2 table offset {offset:#x} unaligned", field="L1 entry")
    return out


def each_table(
    image: Qcow2, offsets: Sequence[int], look: Callable[[int, bytes], Procedure]
) -> Procedure:
    """Run ``look(offset, bytes)`` for every table."""
    size = image.cluster_size
    batch = max(1, _BATCH // size)
    for start in range(0, len(offsets), batch):
        part = offsets[start : start + batch]
        raws = yield Read(SLOT, [(offset, size) for offset in part], "l2_load")
        for offset, raw in zip(part, raws, strict=True):
            yield from look(offset, raw)
        yield Progress(start, len(offsets))


def hosts(image: Qcow2, offset: int, raw: bytes, start: int, out: Clusters) -> None:
    """Add what `_SLICE` entries of the L2 table at ``offset`` from ``start`` on refer to.

    Raises CorruptImage for an entry that means nothing.
    """
    bits, mask = image.cluster_bits, image.cluster_mask
    step = image.stride
    entries = big_endian_array(64, raw[start << 3 : start + _SLICE << 3])
    if entries.count(0) == len(entries):
        return
    for index in range(0, len(entries), step):
        entry = entries[index]
        if entry & PACKED:
            for cluster in range(*image.hosts_of(entry)):
                out[cluster] = out.get(cluster, 0) + 1
            continue
        host = entry & OFFSET
        if not host:
            continue
        if host & mask:
            image.host_of(entry, offset, start + index)
        cluster = host >> bits
        out[cluster] = out.get(cluster, 0) + 1


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
        yield from each_table(self.image, tables_of(self.image, entries), self._table)
        yield from self.finish()

    def _table(self, offset: int, raw: bytes) -> Procedure:
        found: Clusters = {offset >> self.image.cluster_bits: 1}
        for start in range(0, len(raw) >> 3, _SLICE):
            hosts(self.image, offset, raw, start, found)
            yield from self.clusters(found)
            found = {}

    def region(self, start: int, end: int) -> Procedure:
        """The host clusters [start, end)."""
        for at in range(start, end, _SLICE):
            yield from self.clusters(dict.fromkeys(range(at, min(end, at + _SLICE)), 1))

    def clusters(self, found: Clusters) -> Procedure:
        """These clusters, as often as is said."""
        shift = self.image.block_shift
        by_block: dict[int, list[int]] = {}
        for cluster in sorted(found):
            by_block.setdefault(cluster >> shift, []).append(cluster)
        for index, members in by_block.items():
            if index not in self.touched:
                if len(self.touched) >= self.most:
                    yield from self.finish()
                self.touched.add(index)
            yield from self._have(members[0])
            if self.change < 0:
                self.image.freeing = "snapshot"
                for cluster in members:
                    for _ in range(found[cluster]):
                        self.image.free_later(cluster, cluster + 1)
                self.image.freeing = "other"
            else:
                self._raise(members, found)

    def _have(self, cluster: int) -> Procedure:
        runs = [(cluster, cluster + 1)]
        yield from ask(self.image, lambda: self.image.missing_blocks(runs), self.pins)

    def _raise(self, members: list[int], found: Clusters) -> None:
        image = self.image
        most = (1 << image.refcount_bits) - 1
        ((table, first, _),) = image.block_spans(members[0], members[0] + 1)
        block, base = image.block(table), members[0] - first
        for cluster in members:
            count = block.get(cluster - base) + found[cluster]
            if count > most:
                raise CorruptImage(f"Cluster {cluster} has more references than its count says")
            block.set(cluster - base, count)
        image.touch_block(table, first, members[-1] - base + 1)

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

    def look(offset: int, raw: bytes) -> Procedure:
        flags = raw[0::step]
        cleared = flags.translate(_CLEAR)
        if flags == cleared:
            return
        data = bytearray(raw)
        data[0::step] = cleared
        yield from _write_parts(offset, raw, bytes(data))

    yield from each_table(image, tables_of(image, l1), look)


def _write_parts(offset: int, old: bytes, new: bytes) -> Procedure:
    """Write what differs, in parts of 4 KiB."""
    writes = [
        MetaWrite(SLOT, offset + at, new[at : at + _PART], "l2_update")
        for at in range(0, len(new), _PART)
        if old[at : at + _PART] != new[at : at + _PART]
    ]
    if writes:
        yield Write(writes)


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
        yield from each_table(image, list(seen), self._table)
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

    def _table(self, offset: int, raw: bytes) -> Procedure:
        image = self.image
        bits, shift, mask = image.cluster_bits, image.block_shift, image.cluster_mask
        inside = image.per_block - 1
        table = big_endian_array(64, raw)
        for index in range(0, len(table), image.stride):
            entry = table[index]
            host = entry & OFFSET
            if not host or entry & PACKED or host & mask:
                continue
            if host >> bits >> shift != self.index:
                yield from self._load(host >> bits >> shift)
            alone = self.block is not None and self.block.get(host >> bits & inside) == 1
            if alone != bool(entry & COPIED):
                table[index] = entry ^ COPIED
        new = big_endian_bytes(table)
        if new != raw:
            yield from _write_parts(offset, raw, new)


def set_copied(image: Qcow2) -> Procedure:
    """Make COPIED in the tables of the disk say whether a count is one.

    Counts on the disk must be right, which makes either state of a flag safe until then: one that
    is clear without need costs a copy.
    """
    yield from _Flags(image).run()


# -- before anything changes
def check_counted(image: Qcow2, clusters: Iterable[int]) -> None:
    """Raise CorruptImage where a cluster has no refcount block to count it."""
    shift = image.block_shift
    for index in {cluster >> shift for cluster in clusters}:
        if not image.block_offset(index):
            raise CorruptImage(
                f"Clusters are in use that have no refcount block (index {index:#x})",
                field="refcount table entry",
                offset=image.header.reftable_offset + 8 * index,
            )


def survey(image: Qcow2, l1: Sequence[int], raises: bool) -> Procedure:
    """Look at all that ``l1`` refers to.  Raises CorruptImage where an entry means nothing, or
    names what is not in the file or not counted.

    ``raises``: every reference is about to be counted once more.  Returns whether all counts have
    room for that.
    """
    offsets = tables_of(image, l1)
    most = (1 << image.refcount_bits) - 1
    full = set((yield from _nearly_full(image, most))) if raises else set()
    need = Counts()
    length = yield Length(SLOT)
    end = -(-length >> image.cluster_bits)

    def look(offset: int, raw: bytes) -> Procedure:
        found: Clusters = {offset >> image.cluster_bits: 1}
        for start in range(0, len(raw) >> 3, _SLICE):
            hosts(image, offset, raw, start, found)
            if found and max(found) >= end:
                raise CorruptImage(
                    "A table names a cluster outside of the file", field="L2 table", offset=offset
                )
            check_counted(image, found)
            if full:
                _note(found, full, image.block_shift, need)
            found.clear()
            yield Progress(start, len(raw) >> 3)

    yield from each_table(image, offsets, look)
    return (yield from _has_room(image, need, most))


def _note(found: Clusters, full: set[int], shift: int, need: Counts) -> None:
    for cluster, times in found.items():
        if cluster >> shift in full:
            need.add(cluster, times)


def _nearly_full(image: Qcow2, most: int) -> Procedure:
    """The refcount blocks with a count that is more than half of what the width can say: below,
    adding as many references as a cluster has cannot be too much."""
    out = []
    indexes = [i for i, entry in enumerate(image.reftable) if entry]
    for done, index in enumerate(indexes):
        offset = image.block_offset(index)
        (raw,) = yield Read(SLOT, [(offset, image.cluster_size)], "refblock_load")
        if most == 1 or highest(image.refcount_bits, raw) > most // 2:
            out.append(index)
        yield Progress(done, len(indexes))
    return out


def highest(bits: int, raw: bytes) -> int:
    """The largest count in a refcount block."""
    if bits < 8:
        mask = (1 << bits) - 1
        return max(value >> at & mask for value in set(raw) for at in range(0, 8, bits))
    return max(big_endian_array(bits, raw))


def _has_room(image: Qcow2, need: Counts, most: int) -> Procedure:
    index, block = -1, None
    used = (each for run in need.used(0, need.end) for each in range(*run))
    for done, cluster in enumerate(used):
        if cluster >> image.block_shift != index:
            index = cluster >> image.block_shift
            (raw,) = yield Read(SLOT, [(image.block_offset(index), image.cluster_size)])
            block = decode(image.refcount_bits, raw)
            yield Progress(done, done + 1)
        assert block is not None
        if block.get(cluster & image.per_block - 1) + need.get(cluster) > most:
            return False
    return True


__all__ = ["Recounter", "clear_copied", "set_copied", "survey", "tables_of"]
