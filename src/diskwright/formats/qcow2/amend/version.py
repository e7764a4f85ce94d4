"""Another version of the format, in place (qcow2 specification, "Header", "Cluster mapping")."""

from __future__ import annotations

from array import array

from ....contract import (
    Barrier,
    Compute,
    Length,
    MetaWrite,
    NeedMeta,
    Procedure,
    Progress,
    Quiesce,
    Read,
    Table,
    Truncate,
    Write,
)
from ....errors import CorruptImage, UsageError
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from ...editing import ask, flush, unpin
from .. import header as hd
from ..bitmaps.add import drop_bitmaps
from ..check.scan import Loose, pieces_of
from ..creation import FEATURE_TABLE_CLUSTER
from ..edit import announce
from ..machine.core import COPIED, OFFSET, PACKED, SLOT, ZERO_FLAG
from ..machine.runs import Run
from ..replacing import replace_header

if TYPE_CHECKING:
    from ..format import Qcow2

_ZEROES = 1 << 20
_BATCH = 1 << 20


def upgrade(image: Qcow2) -> Procedure:
    """Version 2 becomes version 3: only the header changes, and the table of snapshots where an
    entry is short."""
    if image.header.version > 2:
        return
    yield from announce(image)
    if image.snapshot_table:
        from ..snapshots.procedures import complete

        yield from complete(image)
    yield from flush(image)
    new = image.header.copy()
    new.version, new.refcount_order = 3, 4
    new.tail = bytes(hd.WRITTEN_LENGTH - hd.V3_LENGTH)
    bare = new.copy()
    if new.cluster_bits >= FEATURE_TABLE_CLUSTER.bit_length() - 1:
        new.set_extension(hd.EXT_FEATURE_NAMES, hd.feature_table())
    try:
        new.encode()
    except UsageError:  # a long name leaves no room for those of features
        new = bare
    yield from replace_header(image, new)


def check_downgrade(image: Qcow2) -> Procedure:
    """Raise UsageError for what version 2 cannot say; nothing is changed."""
    h = image.header
    if h.incompatible & hd.DATA_FILE:
        raise UsageError("Cannot downgrade an image with a data file")
    others = h.incompatible & ~(hd.DIRTY | hd.COMPRESSION)
    if others:
        raise UsageError(
            f"Cannot downgrade an image with incompatible features {others:#x} set"
        )
    for snapshot in image.snapshot_table:
        known = image.size if snapshot.disk_size is None else snapshot.disk_size
        if known != image.size or snapshot.vm_state_size >> 32:
            raise UsageError("Internal snapshots prevent downgrade of image")
    if h.compression_type and (yield from _has_packed(image)):
        raise UsageError(
            "Cannot downgrade an image with zstd compression type and existing compressed clusters"
        )


def _has_packed(image: Qcow2) -> Procedure:
    """Whether any cluster is compressed."""
    offsets = list((yield from _all_tables(image)))
    step = max(1, _BATCH >> image.cluster_bits)
    for start in range(0, len(offsets), step):
        part = offsets[start : start + step]
        for raw in (yield Read(SLOT, [(at, image.cluster_size) for at in part])):
            if any(entry & PACKED for entry in big_endian_array(64, raw)):
                return True
        yield Progress(start, len(offsets))
    return False


def _all_tables(image: Qcow2) -> Procedure:
    """Where the L2 tables are, of the disk and of all snapshots: offset -> index in the L1 table,
    each once."""
    from ..snapshots.procedures import read_l1

    found: dict[int, int] = {}
    for i in range(len(image.l1)):
        offset = image.l2_offset(i)
        if offset:
            found[offset] = i
    for snapshot in image.snapshot_table:
        l1 = yield from read_l1(image, snapshot)
        for i, entry in enumerate(l1):
            offset = entry & OFFSET
            if offset & image.cluster_mask:
                raise CorruptImage(
                    f"L2 table offset {offset:#x} unaligned (L1 index: {i:#x})",
                    field="L1 entry of a snapshot",
                    offset=snapshot.l1_offset + 8 * i,
                )
            if offset:
                found.setdefault(offset, i)
        yield Progress(0, 1)
    return found


def downgrade(image: Qcow2) -> Procedure:
    """Version 3 becomes version 2.

    Clusters that read as zeroes by a flag, which version 2 has not, become unallocated where
    nothing shows through, and zeroes in the file elsewhere; then the header is switched.  Every
    state between is a version 3 image of the same content.
    """
    if image.header.version == 2:
        return
    yield from check_downgrade(image)
    yield from drop_bitmaps(image)
    yield from announce(image)
    backing_size = (yield Length("backing")) if image.has_backing else 0
    tables: dict[int, int] = yield from _all_tables(image)
    offsets = list(tables)
    size = image.cluster_size
    step = max(1, _BATCH // size)
    for start in range(0, len(offsets), step):
        part = offsets[start : start + step]
        raws = yield Read(SLOT, [(offset, size) for offset in part], "l2_load")
        found = yield Compute(pieces_of, (raws, size, False))
        for offset, table in zip(part, found, strict=True):
            if any(_flagged(piece.entries) for piece in table if isinstance(piece, Loose)):
                yield from _expand(image, offset, tables[offset] << image.l1_shift, backing_size)
        yield Quiesce()  # a large disk has more tables than memory should hold
        yield Progress(start, len(offsets))
    yield from flush(image)
    new = image.header.copy()
    new.version, new.refcount_order, new.tail = 2, 4, b""
    new.incompatible = new.compatible = new.autoclear = 0
    new.set_extension(hd.EXT_FEATURE_NAMES, None)
    new.set_extension(hd.EXT_BITMAPS, None)
    yield from replace_header(image, new)
    image.announced = True


def _flagged(entries: array[int]) -> list[int]:
    """The numbers of those that read as zeroes by their flag."""
    return [i for i, entry in enumerate(entries) if entry & (PACKED | ZERO_FLAG) == ZERO_FLAG]


def _expand(image: Qcow2, offset: int, base: int, backing_size: int) -> Procedure:
    """Rid the L2 table at ``offset``, for guest space from ``base`` on, of its zero flags.

    It is changed in place also where several L1 entries share it: the content stays the same.
    """
    pins: list[Table] = []

    def load() -> Table | NeedMeta:
        return image.l2_table(offset) or NeedMeta(SLOT, [(offset, image.cluster_size)], "l2_load")

    table: Table = yield from ask(image, load, pins)
    image.check_table(table)
    entries: array[int] = table.data
    flagged = _flagged(entries)
    own: Run = (offset >> image.cluster_bits, (offset >> image.cluster_bits) + 1)
    yield from ask(image, lambda: image.missing_blocks([own]), pins)
    users = _count(image, own[0])
    kept, moved, freed = [], [], []
    for i in flagged:
        host = entries[i] & OFFSET
        if host and entries[i] & COPIED:
            kept.append(i)  # its space is its own: it stays, and is made to hold zeroes
        elif base + (i << image.cluster_bits) < backing_size:
            moved.append(i)
        if host and not entries[i] & COPIED:
            freed += [image.hosts_of(host)] * users
    yield from ask(image, lambda: image.missing_blocks(freed), pins)
    if image.encrypted:
        for i in kept:
            yield from _zero_encrypted(image, entries[i] & OFFSET, base, i)
    else:
        for start, stop in _as_runs([(entries[i] & OFFSET) >> image.cluster_bits for i in kept]):
            yield from _zero(image, start, stop)
    places: dict[int, int] = {}
    if moved:
        chosen = yield from ask(image, lambda: image.choose(len(moved)), pins)
        for taken in image.take(chosen):
            taken.pins += 1
            pins.append(taken)
        hosts = [cluster for start, end, _ in chosen for cluster in range(start, end)]
        places = dict(zip(moved, hosts, strict=True))
        for i, host in places.items() if image.encrypted else ():
            yield from _zero_encrypted(image, host << image.cluster_bits, base, i)
        for start, end, _ in chosen:
            if not image.encrypted:
                yield from _zero(image, start, end)
            for cluster in range(start, end) if users > 1 else ():
                _raise(image, cluster, users)
    yield Barrier()
    copied = COPIED if users == 1 else 0
    for i in flagged:
        if i in places:
            entries[i] = places[i] << image.cluster_bits | copied
        elif entries[i] & COPIED:
            entries[i] &= ~ZERO_FLAG
        else:
            entries[i] = 0
    for run in freed:
        image.free_later(*run)
    image.touch_l2(table, flagged[0], flagged[-1] + 1)
    yield from flush(image)
    unpin(pins)


def _count(image: Qcow2, cluster: int) -> int:
    ((block, first, _),) = image.block_spans(cluster, cluster + 1)
    return max(1, image.block(block).get(first))


def _raise(image: Qcow2, cluster: int, count: int) -> None:
    ((block, first, stop),) = image.block_spans(cluster, cluster + 1)
    image.block(block).set(first, count)
    image.touch_block(block, first, stop)


def _as_runs(clusters: list[int]) -> list[Run]:
    runs: list[Run] = []
    for cluster in sorted(clusters):
        if runs and runs[-1][1] == cluster:
            runs[-1] = (runs[-1][0], cluster + 1)
        else:
            runs.append((cluster, cluster + 1))
    return runs


def _zero(image: Qcow2, start: int, stop: int) -> Procedure:
    """Make the host clusters [start, stop) read as zeroes: beyond the end of the file by its
    length alone, where that may be relied on."""
    bits = image.cluster_bits
    length = yield Length(SLOT)
    written = stop << bits
    if image.options.get("zero_beyond_end", True):
        written = min(max(length, start << bits), stop << bits)
        if length < stop << bits:
            yield Truncate(SLOT, stop << bits)
    for host in range(start << bits, written, _ZEROES):
        yield Write([MetaWrite(SLOT, host, bytes(min(_ZEROES, written - host)))])
        yield Progress(host - (start << bits), written - (start << bits))


def _zero_encrypted(image: Qcow2, host: int, base: int, index: int) -> Procedure:
    """Make the cluster at ``host``, which is that of entry ``index`` of a table for guest space
    from ``base`` on, read as zeroes once it is decrypted."""
    guest = base + (index << image.cluster_bits)
    for at in range(0, image.cluster_size, _ZEROES):
        data = image.zeroes(guest + at, host + at, min(_ZEROES, image.cluster_size - at))
        yield Write([MetaWrite(SLOT, host + at, data)])
        yield Progress(at, image.cluster_size)
