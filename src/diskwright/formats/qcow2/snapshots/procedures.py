"""Taking, applying and deleting internal snapshots (qcow2 specification, "Snapshots").

A snapshot is a copy of the L1 table; everything below it is shared and counted once for each L1
table.  The order keeps every state on the disk a good image:

- taking: COPIED is cleared, then counts are raised, then the snapshot table names the copy;
- deleting: the table forgets the snapshot, then counts are lowered, then COPIED is set;
- applying: the snapshot's counts are raised, then the header switches to a new L1 table (and size),
  then those of the old one are lowered.

A flag and a count cannot change at once, so between them COPIED may be clear where a count is one,
which costs a copy and no data; version 3 has the dirty bit set meanwhile, so that whoever opens the
image after a crash sets counts and flags right.
"""

from __future__ import annotations

import struct
from array import array

from ....contract import Barrier, Length, MetaWrite, Procedure, Quiesce, Read, Table, Write
from ....errors import CorruptImage, MalformedImage, NotSupported, UsageError
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array, big_endian_bytes, zeros
from ...editing import ask, flush, unpin
from .. import header as hd
from ..edit import announce
from ..machine.core import COPIED, OFFSET, SLOT, Core
from ..machine.runs import Run
from ..resizing import size_fields
from ..rewrite import drop_clusters
from .sharing import Recounter, clear_copied, set_copied
from .survey import check_counted, survey
from .table import Snapshot, damage, encode_table

if TYPE_CHECKING:
    from ..format import Qcow2
    from ..image import Image

_SNAPSHOTS_OFFSET = 60
_LONGEST_NAME = (1 << 16) - 1
_PIECE = 1 << 20


def find(image: Image, snapshot_id: str | None, name: str | None) -> Snapshot | None:
    """The first snapshot with this id and name; what is None matches all."""
    for snapshot in image.snapshot_table:
        if snapshot_id is not None and snapshot.id != snapshot_id.encode(errors="surrogateescape"):
            continue
        if name is None or snapshot.name == name.encode(errors="surrogateescape"):
            return snapshot
    return None


def check_can_share(image: Qcow2) -> None:
    """Raise for what an image cannot have together with snapshots."""
    image.check_write()
    if image.header.incompatible & hd.DATA_FILE:
        raise NotSupported("Internal snapshots are not possible with an external data file")


def read_l1(image: Core, snapshot: Snapshot) -> Procedure:
    """The L1 table of a snapshot, at most 32 MiB.  Raises MalformedImage, and CorruptImage for one
    that is not in the file: nothing can be told of what it held."""
    wrong = damage(image.header, snapshot)
    if wrong is not None:
        raise MalformedImage(wrong[1], field=wrong[0])
    last = snapshot.l1_offset + 8 * snapshot.l1_size
    if last > (yield Length(SLOT)):
        raise CorruptImage(
            "Snapshot L1 table is outside of the file",
            field="l1_table_offset",
            offset=snapshot.l1_offset,
        )
    raw = yield Read(SLOT, [(snapshot.l1_offset, 8 * snapshot.l1_size)])
    return big_endian_array(64, raw[0])


# -- taking
def create(image: Qcow2, new: Snapshot) -> Procedure:
    """Take a snapshot with the name, dates and VM state size of ``new``; returns its entry.

    Its id becomes one more than the largest there is.  VM state that was saved behind the disk goes
    with it and is dropped from the disk.  Raises UsageError (a name that is too long, too many
    snapshots), NotSupported where the width of the counts has no room, CorruptImage; nothing has
    changed then.  NoSpace.
    """
    check_can_share(image)
    if len(new.name) > _LONGEST_NAME:
        raise UsageError("The name of a snapshot has at most 65535 bytes")
    if len(image.snapshot_table) >= hd.MAX_SNAPSHOTS:
        raise UsageError(f"An image has at most {hd.MAX_SNAPSHOTS} snapshots")
    if not (yield from survey(image, image.l1, raises=True)):
        raise _no_room(image)
    new = new._replace(
        id=_next_id(image.snapshot_table),
        l1_size=len(image.l1),
        disk_size=image.size,
    )
    table_size = len(encode_table([*image.snapshot_table, new]))
    places = yield from _take(image, [8 * new.l1_size, table_size])
    new = new._replace(l1_offset=places[0])
    yield from _write_l1(places[0], image.l1, image.cluster_size)
    yield from begin(image)
    for index, entry in enumerate(image.l1):
        if entry & COPIED:
            image.set_l1(index, entry & ~COPIED)
    yield from clear_copied(image, image.l1)
    yield from flush(image)
    yield Quiesce()
    yield from Recounter(image, 1).l1(image.l1)
    yield from _switch(image, [*image.snapshot_table, new], places[1])
    if new.vm_state_size:
        # It would only be copied with the next writes.
        last = len(image.l1) << image.l1_shift
        yield from drop_clusters(image, image.vm_state_offset, last, unmap=True)
    yield from end(image)
    return new


def _no_room(image: Qcow2) -> NotSupported:
    return NotSupported(
        f"reference counts of {image.refcount_bits} bit{'s' * (image.refcount_bits > 1)} have no "
        "room for another snapshot"
    )


def _next_id(snapshots: list[Snapshot]) -> bytes:
    most = 0
    for snapshot in snapshots:
        digits = snapshot.id.lstrip(b" \t\n\v\f\r")
        length = len(digits) - len(digits.lstrip(b"0123456789"))
        most = max(most, min(int(digits[: min(length, 20)] or b"0"), (1 << 64) - 2))
    return str(most + 1).encode()


# -- applying
def apply(image: Qcow2, snapshot: Snapshot) -> Procedure:
    """Make the disk what it was when ``snapshot`` was taken, its size included.

    Raises NotSupported where the width of the counts has no room, CorruptImage; nothing has changed
    then.  NoSpace.
    """
    check_can_share(image)
    if len(image.bitmaps):
        # They would have to call dirty whatever is another then.
        raise NotSupported("Device has active dirty bitmaps")
    size = image.size if snapshot.disk_size is None else snapshot.disk_size
    theirs = yield from read_l1(image, snapshot)
    table = array("Q", [entry & ~COPIED for entry in theirs])
    table.extend(zeros(64, max(hd.l1_bytes(image.header, size) // 8 - len(table), 0)))
    mine = image.l1[:]
    # What both have needs neither one more reference nor one less.
    gained = _without(table, mine)
    if not (yield from survey(image, gained, raises=True)):
        raise _no_room(image)
    lost = _without(mine, table)
    yield from survey(image, lost, raises=False)
    (place,) = yield from _take(image, [8 * len(table)])
    yield from _write_l1(place, table, image.cluster_size)
    yield from clear_copied(image, gained)
    yield Barrier()
    yield from Recounter(image, 1).l1(gained)
    h = image.header
    old = _run(image, h.l1_offset, 8 * h.l1_size)
    h.size = image.size = size
    h.l1_size, h.l1_offset = len(table), place
    image.replace_l1(table)
    yield Write([size_fields(image)])
    yield Barrier()
    image.reserve_structures()
    lower = Recounter(image, -1)
    yield from lower.region(*old)
    yield from lower.l1(lost)


def _without(one: array[int], other: array[int]) -> array[int]:
    """Entries of ``one`` whose tables are not those of ``other`` in the same place."""
    common = min(len(one), len(other))
    out = array("Q", [a for a, b in zip(one, other, strict=False) if (a ^ b) & OFFSET])
    out.extend(one[common:])
    return out


# -- deleting
def delete(image: Qcow2, snapshot: Snapshot) -> Procedure:
    """Forget a snapshot and give back what nothing else refers to.  Raises CorruptImage (nothing
    has changed then), NoSpace."""
    check_can_share(image)
    l1 = yield from read_l1(image, snapshot)
    yield from survey(image, l1, raises=False)
    own = _run(image, snapshot.l1_offset, 8 * snapshot.l1_size)
    check_counted(image, [(*own, 1)])
    rest = [other for other in image.snapshot_table if other is not snapshot]
    (place,) = yield from _take(image, [len(encode_table(rest))])
    yield from begin(image)
    yield from _switch(image, rest, place)
    lower = Recounter(image, -1)
    yield from lower.region(*own)
    yield from lower.l1(l1)
    yield from set_copied(image)
    yield from end(image)


# -- another version of the format
def complete(image: Qcow2) -> Procedure:
    """Give each entry of the table the extra data that version 3 asks for."""
    table = [
        old if old.disk_size is not None else old._replace(disk_size=image.size)
        for old in image.snapshot_table
    ]
    if table != image.snapshot_table:
        (place,) = yield from _take(image, [len(encode_table(table))])
        yield from _switch(image, table, place)


# -- parts
def begin(image: Qcow2) -> Procedure:
    """Say that counts and flags may disagree."""
    h = image.header
    image.sharing_dirty = h.version > 2 and not h.incompatible & hd.DIRTY
    if image.sharing_dirty:
        h.incompatible |= hd.DIRTY
        yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
        yield Barrier()


def end(image: Qcow2) -> Procedure:
    """Take back what `begin` said, with everything on the disk."""
    h = image.header
    if image.sharing_dirty:
        image.sharing_dirty = False
        yield Barrier()
        h.incompatible &= ~hd.DIRTY
        yield Write([MetaWrite(SLOT, hd.FEATURES_OFFSET, h.features())])
        yield Barrier()


def _run(image: Qcow2, offset: int, length: int) -> Run:
    """The clusters of a region."""
    first = offset >> image.cluster_bits
    return first, first + -(-length >> image.cluster_bits)


def _take(image: Qcow2, lengths: list[int]) -> Procedure:
    """Take a region for each length in bytes and count it; their offsets (0 for no bytes).

    Of what does not all fit nothing is kept; nothing has been written then.
    """
    pins: list[Table] = []
    taken: list[Run] = []
    places = []
    try:
        for length in lengths:
            count = -(-length >> image.cluster_bits)
            if not count:
                places.append(0)
                continue
            start = yield from _take_region(image, count, pins)
            taken.append((start, start + count))
            places.append(start << image.cluster_bits)
    except BaseException:
        for run in taken:
            image.give_back(*run)
        unpin(pins)
        raise
    yield from announce(image)
    yield from flush(image)
    unpin(pins)
    return places


def _take_region(image: Qcow2, count: int, pins: list[Table]) -> Procedure:
    return (yield from ask(image, lambda: image.take_region(count), pins))


def _write_l1(place: int, l1: array[int], cluster: int) -> Procedure:
    """Write an L1 table without COPIED to a new place, to the end of its last cluster."""
    data = big_endian_bytes(array("Q", [entry & ~COPIED for entry in l1]))
    data = data.ljust(-(-len(data) // cluster) * cluster, b"\0")
    for at in range(0, len(data), _PIECE):
        yield Write([MetaWrite(SLOT, place + at, data[at : at + _PIECE], "l1_shrink_write_table")])


def _switch(image: Qcow2, snapshots: list[Snapshot], place: int) -> Procedure:
    """Write the snapshot table to ``place``, switch the header to it, and give the old one back."""
    h = image.header
    data = encode_table(snapshots)
    padded = data.ljust(-(-len(data) // image.cluster_size) * image.cluster_size, b"\0")
    if padded:
        yield Write([MetaWrite(SLOT, place, padded)])
    yield Barrier()
    old = _run(image, h.snapshots_offset, image.snapshot_bytes)
    h.nb_snapshots, h.snapshots_offset = len(snapshots), place
    image.snapshot_table, image.snapshot_bytes = snapshots, len(data)
    switch = struct.pack(">IQ", h.nb_snapshots, h.snapshots_offset)
    yield Write([MetaWrite(SLOT, _SNAPSHOTS_OFFSET, switch)])
    yield Barrier()
    image.reserve_structures()
    lower = Recounter(image, -1)
    yield from lower.region(*old)
    yield from lower.finish()


__all__ = ["apply", "complete", "create", "delete", "find", "read_l1"]
