"""Snapshots that nothing can be done with: entries whose L1 table cannot be one, and what is behind
the place where the snapshot table breaks its bounds.

As long as they are there nobody can tell which clusters are in use, so nothing else can be mended.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ....contract import Barrier, MetaWrite, Procedure, Write
from ....errors import MalformedImage
from ..machine.core import SLOT
from ..snapshots.table import Snapshot, damage, described, encode_table, read_table

if TYPE_CHECKING:
    from ..format import Qcow2

_COUNT_AT = 60
"""Of the number of snapshots; the place of their table follows it."""


def drop_snapshots(image: Qcow2, start: int) -> Procedure:
    """Write a snapshot table without them to cluster ``start``, behind all that the file has and
    names, and let the header name it; returns what was dropped, as sentences.

    One sector of the header switches, so a loss of power leaves the one table or the other.  The
    new one is counted by the repair that follows, which frees what the dropped ones held.
    """
    h = image.header
    found: list[Snapshot] = []
    dropped: list[str] = []
    try:
        yield from read_table(image, found)
    except MalformedImage as error:
        left = h.nb_snapshots - len(found)
        dropped.append(f"{error}: {left} entries of the snapshot table are dropped")
    kept = []
    for snapshot in found:
        wrong = damage(h, snapshot)
        if wrong is None:
            kept.append(snapshot)
        else:
            info = described(snapshot)
            dropped.append(f"snapshot {info.id} ({info.name}) is dropped: {wrong[1]}")
    data = encode_table(kept)
    offset = 0
    if kept:
        offset = start << image.cluster_bits
        size = -(-len(data) // image.cluster_size) * image.cluster_size
        yield Write([MetaWrite(SLOT, offset, data.ljust(size, b"\0"))])
        yield Barrier()
    yield Write([MetaWrite(SLOT, _COUNT_AT, struct.pack(">IQ", len(kept), offset))])
    yield Barrier()
    h.nb_snapshots, h.snapshots_offset = len(kept), offset
    image.snapshot_table, image.snapshot_bytes = kept, len(data)
    image.snapshot_damage = None
    image.reserve_structures()
    return dropped
