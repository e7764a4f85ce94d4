"""Rebuilding the refcounts of an image whose dirty bit is set."""

from __future__ import annotations

from ....contract import Barrier, MetaWrite, Procedure, Progress, Write
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_bytes, zeros
from .. import header as hd
from ..check.counts import Counts
from ..check.meter import Meter
from ..check.references import Walker
from ..machine.core import SLOT
from ..machine.refblock import empty
from ..snapshots.sharing import set_copied

if TYPE_CHECKING:
    from ..format import Qcow2


def rebuild(image: Qcow2) -> Procedure:
    """Write a new refcount table and blocks from what the L1 and L2 tables refer to, switch the
    header to them, then clear the dirty bit.

    The old table and blocks are overwritten by nothing until the switch is durable, so a crash
    leaves the image as dirty as it was.  Raises CorruptImage when the tables themselves break the
    specification, for then no count would be right.
    """
    walker = Walker(image, Meter())
    packed = walker.packed = Counts()
    yield from walker.walk(refcounts=False)
    result, counts = walker.result, walker.counts
    # Only compressed clusters, and those of snapshots, may be shared, as far as a count can say so.
    most = (1 << image.refcount_bits) - 1
    snapshots = bool(image.snapshot_table)
    if result.corruptions or any(
        counts.get(cluster) > most
        or (counts.get(cluster) != packed.get(cluster) and not snapshots)
        or cluster in image.reserved
        for cluster in counts.several()
    ):
        raise CorruptImage(
            "Could not repair dirty image: its tables contradict each other"
            + (f" ({result.findings[0]})" if result.findings else "")
        )
    yield from renew(image, counts, image.fresh)
    if snapshots or walker.uncopied:
        # Whoever takes or deletes a snapshot clears COPIED first and sets it last.
        yield from set_copied(image)
    image.header.incompatible &= ~hd.DIRTY
    yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, image.header.features())])
    yield Barrier()


def renew(image: Qcow2, counts: Counts, file_clusters: int, start: int = 0) -> Procedure:
    """Write a refcount table and blocks that say ``counts``, at or behind cluster ``start``, and
    switch the header to them.

    The old table and blocks are overwritten by nothing.  A count that the width cannot say becomes
    the largest.  ``counts`` gets the new clusters, too.
    """
    h = image.header
    table_clusters, indexes, start = _layout(image, counts, file_clusters, start)
    bits, shift, per_block = image.cluster_bits, image.block_shift, image.per_block
    most = (1 << image.refcount_bits) - 1
    total = table_clusters + len(indexes)
    for cluster in range(start, start + total):
        counts.add(cluster)
    reftable = zeros(64, table_clusters << bits >> 3)
    for i, index in enumerate(indexes):
        reftable[index] = (start + table_clusters + i) << bits
        block = empty(image.refcount_bits, image.cluster_size)
        first = index << shift
        for cluster, end in counts.used(first, first + per_block):
            for each in range(cluster, end):
                block.set(each - first, min(counts.get(each), most))
        data = block.encode(0, image.cluster_size)
        yield Write([MetaWrite(SLOT, reftable[index], data, "refblock_alloc_write_blocks")])
        yield Progress(i, len(indexes))
    data = big_endian_bytes(reftable)
    yield Write([MetaWrite(SLOT, start << bits, data, "refblock_alloc_write_table")])
    yield Barrier()
    h.reftable_offset, h.reftable_clusters = start << bits, table_clusters
    switch = h.fields()[hd.REFTABLE_OFFSET : hd.REFTABLE_OFFSET + 12]
    yield Write([MetaWrite(SLOT, hd.REFTABLE_OFFSET, switch, "refblock_alloc_switch_table")])
    yield Barrier()
    image.reftable = reftable
    image.reserve_structures()
    image.fresh = max(image.fresh, start + total)


def _layout(
    image: Qcow2, counts: Counts, file_clusters: int, start: int
) -> tuple[int, list[int], int]:
    """Clusters of the new refcount table, the indexes of its blocks, and where it all starts:
    behind everything that is referred to or that holds the old table and blocks."""
    bits, shift = image.cluster_bits, image.block_shift
    h = image.header
    start = max(start, counts.end)
    if h.reftable_offset >> bits < file_clusters:
        start = max(start, (h.reftable_offset >> bits) + h.reftable_clusters)
    for entry in image.reftable:
        # What a broken entry names is nothing to be kept.
        if entry and not entry & (image.cluster_size - 1) and entry >> bits < file_clusters:
            start = max(start, (entry >> bits) + 1)
    needed = counts.blocks(shift)
    table_clusters = extra = 1
    while True:
        end = start + table_clusters + extra
        indexes = sorted(needed | set(range(start >> shift, ((end - 1) >> shift) + 1)))
        wanted = -(-(indexes[-1] + 1) * 8 >> bits)
        if wanted <= table_clusters and len(indexes) <= extra:
            break
        table_clusters, extra = max(wanted, table_clusters), max(len(indexes), extra)
    if table_clusters << bits > max(hd.MAX_REFTABLE_BYTES, image.cluster_size):
        raise CorruptImage("Could not repair dirty image: its refcount table would be too large")
    return table_clusters, indexes, start

