"""Snapshots that nothing can be done with: entries whose L1 table cannot be one, and what is behind
the place where the snapshot table breaks its bounds.  Of an entry with too much extra data only
these are lost, as long as its end can be found.

As long as they are there nobody can tell which clusters are in use, so nothing else can be mended.
"""

from __future__ import annotations

import struct

from ....contract import Barrier, Length, MetaWrite, Procedure, Progress, Read, Write
from ....hints import TYPE_CHECKING
from ....units import align_up
from .. import header as hd
from ..machine.core import SLOT
from ..snapshots.table import (
    ENTRY,
    EXTRA_AT,
    KNOWN_EXTRA,
    LEAST_EXTRA,
    MAX_EXTRA,
    MAX_TABLE_BYTES,
    Snapshot,
    damage,
    described,
    encode_table,
    parse_entry,
)

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
    dropped: list[str] = []
    found: list[Snapshot] = yield from _entries(image, dropped)
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


def _entries(image: Qcow2, dropped: list[str]) -> Procedure:
    """The entries that can be read."""
    h = image.header
    found: list[Snapshot] = []
    at = h.snapshots_offset
    for number in range(h.nb_snapshots):
        last = number + 1 == h.nb_snapshots
        entry = yield from _entry(image, at, last)
        if entry is None or at + entry[1] - h.snapshots_offset > MAX_TABLE_BYTES:
            left = h.nb_snapshots - number
            dropped.append(f"{left} entries of the snapshot table from byte {at:#x} on are dropped")
            break
        snapshot, length, cut = entry
        if cut:
            info = described(snapshot)
            dropped.append(f"extra data of snapshot {info.id} ({info.name}) are cut off")
        found.append(snapshot)
        at += length
        yield Progress(number, h.nb_snapshots)
    return found


def _entry(image: Qcow2, at: int, last: bool) -> Procedure:
    """The entry at ``at``, its length, and whether extra data were cut off; None where there is no
    telling where it ends.

    What says that there are more of them than can be is either true or damaged itself: then what
    follows looks like names and another entry in the place of one of the usual sizes.
    """
    (head,) = yield Read(SLOT, [(at, ENTRY.size)])
    _, _, id_length, name_length, *_, extra = ENTRY.unpack(head)
    cut = extra > MAX_EXTRA
    sizes = id_length + name_length
    for size in (extra, KNOWN_EXTRA, LEAST_EXTRA, 0) if cut else (extra,):
        kept = min(size, KNOWN_EXTRA) if cut else size
        first = at + ENTRY.size
        length = align_up(ENTRY.size + size + sizes, 8)
        data, names, after = yield Read(
            SLOT, [(first, kept), (first + size, sizes), (at + length, ENTRY.size)]
        )
        raw = head[:EXTRA_AT] + struct.pack(">I", kept) + data + names
        snapshot, _ = parse_entry(image.header, raw, 0, at)
        if not cut or (_text(snapshot) and (last or (yield from _begins(image, after)))):
            return snapshot, length, cut
    return None


def _text(snapshot: Snapshot) -> bool:
    """Names that somebody gave."""
    try:
        return bool(snapshot.id) and (snapshot.id + snapshot.name).decode().isprintable()
    except UnicodeDecodeError:
        return False


def _begins(image: Qcow2, head: bytes) -> Procedure:
    """``head`` looks like the beginning of an entry."""
    length = yield Length(SLOT)
    offset, size, id_length, *_, extra = ENTRY.unpack(head)
    aligned = not offset & image.cluster_mask and 0 < offset < length
    return aligned and 8 * size <= hd.MAX_L1_BYTES and bool(id_length) and extra <= MAX_EXTRA
