"""Procedures that rewrite an image in place: dropping guest data, another backing file."""

from __future__ import annotations

import errno

from ...contract import HostRange, NeedMeta, Procedure, Progress, Punch, Quiesce, Table
from ...errors import CorruptImage, NoSpace, UsageError
from ...hints import TYPE_CHECKING
from ...ondisk import big_endian_bytes
from ..editing import ask, flush, unpin
from .check.scan import Loose, pieces
from .creation import set_backing
from .edit import announce
from .machine.core import COPIED, DATA_SLOT, OFFSET, PACKED, SLOT
from .machine.runs import Run
from .replacing import replace_header

if TYPE_CHECKING:
    from .format import Qcow2

# L2 tables between two flushes.
_TABLES = 64
# Empty L1 entries between two yields.
_SLICE = 8192


def drop_clusters(image: Qcow2, start: int, end: int, unmap: bool) -> Procedure:
    """Let the clusters of [start, end) go; ``start`` is aligned to clusters.

    With ``unmap`` they become unallocated, and L2 tables that lie in the range as a whole are
    freed; otherwise they read as zeroes where the version can say so.
    """
    shift, bits = image.l1_shift, image.cluster_bits
    per_table = image.l2_mask + 1
    first_cluster = start >> bits
    end_cluster = -(-end >> bits)
    zero = not unmap and image.header.version > 2
    turn = 0
    pins: list[Table] = []
    last = min(-(-end >> shift), len(image.l1))
    for l1_index in range(start >> shift, last):
        offset = image.l2_offset(l1_index)
        if not offset:
            if l1_index % _SLICE == 0:
                yield Progress(l1_index, last)
            continue
        base = l1_index * per_table
        first = max(first_cluster - base, 0)
        stop = min(end_cluster - base, per_table)
        whole = unmap and first == 0 and stop == per_table
        yield from _drop_in_table(image, l1_index, (first, stop), zero, whole, pins)
        turn += 1
        if turn % _TABLES == 0:
            yield from flush(image)
            unpin(pins)
            yield Quiesce()  # a large disk has more tables than memory should hold
        yield Progress(l1_index, last)
    yield from flush(image)
    unpin(pins)


def _drop_in_table(
    image: Qcow2, l1_index: int, span: Run, zero: bool, whole: bool, pins: list[Table]
) -> Procedure:
    bits = image.cluster_bits
    offset = image.l1[l1_index] & OFFSET

    def load() -> Table | NeedMeta:
        found = image.l2_table(offset)
        if found is None:
            return NeedMeta(SLOT, [(offset, image.cluster_size)], "l2_load")
        image.check_table(found)
        return found

    try:
        table: Table = yield from ask(image, load, pins)
    except CorruptImage:
        yield from flush(image)  # what was dropped so far is consistent
        raise
    freed: list[Run] = []
    words = big_endian_bytes(table.data, span[0] * image.stride, span[1] * image.stride)
    for piece in pieces(words, image.cluster_size, image.extended):
        if not isinstance(piece, Loose):
            start, end = image.hosts_of(piece.entry)
            freed.append((start, start + (end - start) * piece.length))
            continue
        for index, entry in enumerate(piece.entries, span[0] + piece.at):
            if entry & PACKED and not image.external:
                freed.append(image.packed_hosts(entry, offset, index))
            else:
                freed.append(image.hosts_of(entry))
    freed = [run for run in freed if run[0] < run[1]]
    if whole:
        freed.append((offset >> bits, (offset >> bits) + 1))
    shared = not image.l1[l1_index] & COPIED and not whole
    if shared:
        freed.append((offset >> bits, (offset >> bits) + 1))
    yield from ask(image, lambda: image.missing_blocks(freed), pins)
    if shared:
        freed.pop()
        table = yield from _own_table(image, l1_index, table, pins)
    for run in freed:
        image.free_later(*run)
    if whole:
        image.set_l1(l1_index, 0)
        image.drop_l2(offset)
        return
    image.empty_entries(table, *span, zero)


def _own_table(image: Qcow2, l1_index: int, table: Table, pins: list[Table]) -> Procedure:
    """A copy of an L2 table that a snapshot shares, for the disk alone."""
    chosen = yield from ask(image, lambda: image.choose(1), pins)
    image.take(chosen)
    ((cluster, _, zero),) = chosen
    tables = {l1_index: table}
    image.install_l2(tables, [l1_index], [(cluster, zero)])
    return tables[l1_index]


def make_empty(image: Qcow2) -> Procedure:
    """Drop all guest data of this layer.

    Run after everything was copied into the backing file, so every state between reads the same.
    """
    yield from announce(image)
    yield from drop_clusters(image, 0, len(image.l1) << image.l1_shift, unmap=True)
    if image.external and image.discards("snapshot"):
        yield Punch([HostRange(DATA_SLOT, 0, image.size)])


def change_backing(image: Qcow2, name: str | None, fmt: str | None) -> Procedure:
    """Put another backing file name and format into the header; all other extensions stay.

    Raises OSError: EINVAL for a name of more than 1023 bytes, ENOSPC when it does not fit into
    the header cluster.
    """
    image.check_write()
    if name is not None and image.raw_data:
        raise OSError(errno.EINVAL, "Invalid argument")
    new = image.header.copy()
    try:
        set_backing(new, name, fmt)
    except UsageError as error:
        raise OSError(errno.EINVAL, "Invalid argument") from error
    try:
        new.encode()
    except UsageError as error:
        raise NoSpace from error
    yield from announce(image)
    new = image.header.copy()
    set_backing(new, name, fmt)
    yield from replace_header(image, new)
    image.has_backing = name is not None
