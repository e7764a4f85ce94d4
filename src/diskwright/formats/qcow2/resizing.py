"""Changing the virtual size of a qcow2 image."""

from __future__ import annotations

import struct

from ...contract import (
    WRITE,
    WRITE_ZERO,
    Barrier,
    GuestRead,
    GuestWrite,
    HostRange,
    Length,
    MetaWrite,
    Plan,
    Procedure,
    Progress,
    Punch,
    Quiesce,
    Range,
    Table,
    Truncate,
    Write,
)
from ...errors import NotSupported, UsageError
from ...extents import DATA, PACKED
from ...hints import TYPE_CHECKING
from ...ondisk import big_endian_bytes, zeros
from ...units import align_down, align_up
from ..editing import ask, flush, unpin
from . import header as hd
from .bitmaps.add import before_resize
from .creation import PREALLOCATIONS
from .cutting import cut_end
from .edit import announce
from .machine.core import DATA_SLOT, SLOT
from .rewrite import drop_clusters

if TYPE_CHECKING:
    from .format import Qcow2

# Guest bytes per turn of the loops.
_TURN = 1 << 30
_SIZE_OFFSET = 24
_ZEROES = 1 << 20
# L2 tables that preallocation fills in one turn, in bytes.
_TABLES_BYTES = 4 << 20


def resize(image: Qcow2, size: int, preallocation: str, shrink: bool) -> Procedure:
    """Change the virtual size to ``size`` bytes (a multiple of 512); new space reads as zeroes.

    A crash leaves the old or the new size; of a shrinking image the end may be gone already.
    Raises UsageError for sizes and modes that do not go.
    """
    image.check_write()
    if image.snapshot_table and image.header.version < 3:
        raise NotSupported("Can't resize a v2 image which has snapshots")
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
    if size < image.size:
        if not shrink:
            raise UsageError("Use the --shrink option to perform a shrink operation.")
        if preallocation != "off":
            raise UsageError("Preallocation can't be used for shrinking an image")
    entries = hd.l1_entries(size, image.cluster_bits, image.extended)
    if entries * 8 > hd.MAX_L1_BYTES:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    if image.external and size > hd.MAX_OFFSET:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    if preallocation != "off" and image.encrypted and image.header.version == 2:
        raise NotSupported("Preallocation of an encrypted image requires compat=1.1")
    yield from before_resize(image, size)
    yield from announce(image)
    if size < image.size:
        yield from _shrink(image, size)
    elif size > image.size:
        yield from _grow(image, size, entries, preallocation)


def _shrink(image: Qcow2, size: int) -> Procedure:
    """Clusters behind the new end go first, so that a later growth cannot show them again."""
    cluster = image.cluster_size
    keep = align_up(size, cluster)
    yield from _zero_guest_data(image, size, min(keep, image.size))
    if keep < image.size:
        yield from drop_clusters(image, keep, image.size, unmap=not image.has_backing)
    yield from _write_size(image, size)
    yield from drop_clusters(
        image, align_up(keep, cluster << image.l2_bits), len(image.l1) << image.l1_shift, unmap=True
    )
    if image.external:
        yield Truncate(DATA_SLOT, size)
        yield Barrier()
    yield from cut_end(image)


def _grow(image: Qcow2, size: int, entries: int, preallocation: str) -> Procedure:
    old = image.size
    cluster = image.cluster_size
    if image.external:
        yield from _grow_data_file(old, size, preallocation)
        if image.raw_data and preallocation == "off":
            preallocation = "metadata"
    backing_size = (yield Length("backing")) if image.has_backing else 0
    if len(image.l1) > hd.l1_bytes(image.header, old) // 8:
        # VM state is kept there, which must not show.
        yield from drop_clusters(
            image,
            hd.l1_bytes(image.header, old) // 8 << image.l1_shift,
            len(image.l1) << image.l1_shift,
            unmap=True,
        )
    if old % cluster:
        yield from _zero_tail(image, old, backing_size)
        if image.external and image.encrypted:
            yield from _zero_encrypted_tail(image, old, size)
    if entries > len(image.l1):
        yield from grow_l1(image, entries)
    covered = min(size, backing_size)
    first = align_up(old, cluster)
    if image.header.version > 2:
        yield from _zero_clusters(image, align_up(old, image.zero_unit), covered)
    if preallocation != "off":
        yield from _preallocate(image, first, size, preallocation)
    yield from _write_size(image, size)
    if first < covered and image.header.version == 2:
        for offset in range(first, covered, _ZEROES):
            yield GuestWrite(offset, bytes(min(_ZEROES, covered - offset)))
            yield Progress(offset - first, covered - first)
        yield from flush(image)


def _grow_data_file(old: int, size: int, preallocation: str) -> Procedure:
    """Make the data file as long as the disk will be; what is new in it reads as zeroes."""
    length = yield Length(DATA_SLOT)
    if length > old:  # what stands there is not the disk's
        yield Truncate(DATA_SLOT, old)
    mode = preallocation if preallocation != "metadata" else "off"
    yield Truncate(DATA_SLOT, size, mode)
    if length > old and (yield Length(DATA_SLOT)) >= length:  # a device keeps its length
        end = min(size, length)
        if not (yield Punch([HostRange(DATA_SLOT, old, end - old)])):
            for at in range(old, end, _ZEROES):
                data = bytes(min(_ZEROES, end - at))
                yield Write([MetaWrite(DATA_SLOT, at, data)])
                yield Progress(at - old, end - old)
    yield Barrier()


def _write_size(image: Qcow2, size: int) -> Procedure:
    """Switch to the new size, with everything before it on disk."""
    yield from flush(image)
    image.header.size = image.size = size
    image.bitmaps.truncate(size)
    yield Write([size_fields(image)])
    yield Barrier()


def size_fields(image: Qcow2) -> MetaWrite:
    """Virtual size and place of the L1 table, which a write of one sector changes at once."""
    h = image.header
    data = struct.pack(">QIIQ", h.size, h.crypt_method, h.l1_size, h.l1_offset)
    return MetaWrite(SLOT, _SIZE_OFFSET, data, "l1_grow_activate_table")


def _zero_guest_data(image: Qcow2, start: int, end: int) -> Procedure:
    """Make [start, end), which is inside one cluster, read as zeroes, if data are stored there."""
    whole = align_up(start, image.zero_unit)
    if whole < end and (yield from _zero_by_map(image, whole, end)):
        end = whole
    if start >= end:
        return
    pins: list[Table] = []
    extents, _ = yield from ask(image, lambda: _mapped(image, start, end - start), pins)
    unpin(pins)
    if extents[0].kind in (DATA, PACKED):
        yield GuestWrite(start, bytes(end - start))


def _mapped(image: Qcow2, offset: int, length: int) -> object:
    extents, miss = image.map([(offset, length)])
    return miss if miss is not None else (extents, None)


def _zero_by_map(image: Qcow2, start: int, end: int) -> Procedure:
    """Zero subclusters of one cluster, if data are stored there.  False where the map cannot say
    so."""
    pins: list[Table] = []
    extents, _ = yield from ask(image, lambda: _mapped(image, start, end - start), pins)
    done = extents[0].kind != PACKED
    if done and any(extent.kind == DATA for extent in extents):
        plan = yield from _plan(image, (start, end - start), WRITE_ZERO, pins)
        image.commit(plan)
        yield from flush(image)
    unpin(pins)
    return done


def _zero_tail(image: Qcow2, old: int, backing_size: int) -> Procedure:
    """The bytes behind the end in the last cluster must read as zeroes before they are shown."""
    unit = image.zero_unit
    pins: list[Table] = []
    extents, _ = yield from ask(image, lambda: _mapped(image, old - 1, 1), pins)
    owned = image.owned(old - 1)
    unpin(pins)
    (extent,) = extents
    if extent.kind == PACKED:
        unit = image.cluster_size
    base = align_down(old, unit)
    whole, end = align_up(old, unit), align_up(old, image.cluster_size)
    if whole < end:
        yield from _zero_by_map(image, whole, end)
    if base == old:
        return
    if extent.kind == DATA and owned:
        # Another program may have left anything there.
        if not image.external:
            tail = image.zeroes(old, extent.host + 1, unit - (old - base))
            yield Write([MetaWrite(SLOT, extent.host + 1, tail)])
            yield Barrier()
    elif extent.kind in (DATA, PACKED) or (
        backing_size > old and not getattr(extent, "explicit", False)
    ):
        # Copying the cluster (up, or from a snapshot), or unpacking it, puts zeroes behind the end.
        data = yield GuestRead(base, old - base)
        yield GuestWrite(base, data)
        yield from flush(image)


def _zero_encrypted_tail(image: Qcow2, old: int, size: int) -> Procedure:
    """What the data file has got behind the old end, in its last cluster, are zeroes that have yet
    to be encrypted."""
    pins: list[Table] = []
    extents, _ = yield from ask(image, lambda: _mapped(image, old - 1, 1), pins)
    unpin(pins)
    end = min(align_up(old, image.cluster_size), size)
    if extents[0].kind == DATA:
        for at in range(old, end, _ZEROES):
            data = image.zeroes(at, at, min(_ZEROES, end - at))
            yield Write([MetaWrite(DATA_SLOT, at, data)])
        yield Barrier()


def grow_l1(image: Qcow2, entries: int) -> Procedure:
    """A longer L1 table: in its place while its last cluster has room, else in a new one that the
    header switches to; then the old one is freed."""
    h, bits = image.header, image.cluster_bits
    old_clusters = -(-h.l1_size * 8 >> bits)
    added = zeros(64, entries - len(image.l1))
    if entries * 8 <= old_clusters << bits:
        yield Write([MetaWrite(SLOT, h.l1_offset + 8 * h.l1_size, big_endian_bytes(added))])
        yield Barrier()
        image.l1.extend(added)
        h.l1_size = entries
        yield Write([size_fields(image)])
        yield Barrier()
        return
    pins: list[Table] = []
    wanted = -(-entries * 8 >> bits)
    start = yield from ask(image, lambda: image.take_region(wanted), pins)
    old_start = h.l1_offset >> bits
    if old_clusters:
        old_run = (old_start, old_start + old_clusters)
        yield from ask(image, lambda: image.missing_blocks([old_run]), pins)
        image.free_later(*old_run)
    table = image.l1[:]
    table.extend(added)
    data = big_endian_bytes(table).ljust(wanted << bits, b"\0")
    yield Write([MetaWrite(SLOT, start << bits, data, "l1_grow_write_table")])
    groups = image.freeze()
    yield Write(groups.lead)
    yield Barrier()
    for group in groups.groups:
        yield Write(group)
        yield Barrier()
    image.l1 = table
    h.l1_size, h.l1_offset = entries, start << bits
    yield Write([size_fields(image)])
    yield Barrier()
    image.reserve_structures()
    freed = image.settle(groups.token)
    zeroed = yield Punch(freed)
    image.release(freed, zeroed)
    yield from flush(image)
    unpin(pins)


def _plan(image: Qcow2, area: Range, kind: str, pins: list[Table]) -> Procedure:
    """A plan whose tables are pinned until ``pins`` are let go."""
    plan: Plan = yield from ask(image, lambda: image.plan([area], kind), pins)
    for table in plan.pins:
        table.pins += 1
    pins += plan.pins
    return plan


def _zero_clusters(image: Qcow2, start: int, end: int) -> Procedure:
    """Zero flags over a backing file that is longer than the disk was."""
    while start < end:
        stop = min(end, start + _TURN)
        pins: list[Table] = []
        plan = yield from _plan(image, (start, stop - start), WRITE_ZERO, pins)
        image.commit(plan)
        yield from flush(image)
        unpin(pins)
        start = stop
        yield Progress(start, end)


def _preallocate(image: Qcow2, start: int, end: int, preallocation: str) -> Procedure:
    """Give every cluster of [start, end) host space that reads as zeroes."""
    per_table = image.cluster_size << image.l2_bits
    turn = per_table * max(1, _TABLES_BYTES // image.cluster_size)
    first = start
    image.size = end
    try:
        while start < end:
            stop = min(end, align_down(start, per_table) + turn)
            pins: list[Table] = []
            plan = yield from _plan(image, (start, stop - start), WRITE, pins)
            if image.extended:
                image.space_alone(plan)
            if not image.external:  # otherwise the places are there, and zero
                yield from _zero_hosts(image, plan, preallocation)
            image.commit(plan)
            yield from flush(image)
            unpin(pins)
            if image.encrypted and not image.extended:  # zeroes of the file are none of the guest
                yield from _zero_clusters(image, start, stop)
            yield Quiesce()  # a large disk has more tables than should be kept
            start = stop
            yield Progress(start - first, end - first)
    except BaseException:
        image.size = image.header.size
        raise


def _zero_hosts(image: Qcow2, plan: Plan, preallocation: str) -> Procedure:
    """Make the host space of a plan part of the file, and read as zeroes."""
    length = yield Length(SLOT)
    host_end = max(align_up(s.host + s.length, image.cluster_size) for s in plan.steps)
    if host_end > length:
        yield Truncate(SLOT, host_end, preallocation if preallocation != "metadata" else "off")
    for step in plan.steps:
        # Beyond the old end of the file all is zero.
        for host in range(step.host, min(step.host + step.length, length), _ZEROES):
            size = min(_ZEROES, step.host + step.length - host)
            yield Write([MetaWrite(SLOT, host, bytes(size))])
    yield Barrier()
