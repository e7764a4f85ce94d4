"""The VM state, which is kept at guest offsets behind the disk (qcow2 specification, "Snapshots").

It begins at the first guest offset that is mapped by an L1 entry of its own, so the disk's L1 table
grows when it is written, and goes into a snapshot with it.  A backing file has no part in it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from ...contract import GuestRead, GuestWrite, NeedMeta, Procedure, Progress, Table
from ...errors import NoSpace
from ...extents import DATA, PACKED
from ...units import align_down, align_up
from ..editing import ask, flush, unpin
from . import header as hd
from .edit import announce
from .resizing import grow_l1
from .snapshots import check_can_share, vm_state_offset

if TYPE_CHECKING:
    from .format import Qcow2

_PIECE = 1 << 20


def read(image: Qcow2, offset: int, length: int) -> Procedure:
    """``length`` bytes of the VM state from ``offset``; zeroes where nothing was saved."""
    image.check_read()
    base = vm_state_offset(image)
    _check(image, base, offset, length)
    kept, image.size = image.size, base + offset + length
    try:
        parts = []
        for at in range(base + offset, base + offset + length, _PIECE):
            size = min(_PIECE, base + offset + length - at)
            parts.append((yield from _stored(image, at, size)))
            yield Progress(at - base - offset, length)
        return b"".join(parts)
    finally:
        image.size = kept


def _stored(image: Qcow2, start: int, length: int) -> Procedure:
    """Guest bytes that this layer has, zeroes where it has none."""
    out = []
    end = start + length
    while start < end:
        pins: list[Table] = []
        extents = yield from _extents(image, start, end - start, pins)
        unpin(pins)
        for extent in extents:
            if extent.kind in (DATA, PACKED):
                out.append((yield GuestRead(start, extent.length)))
            else:
                out.append(bytes(extent.length))
            start += extent.length
    return b"".join(out)


def _extents(image: Qcow2, start: int, length: int, pins: list[Table]) -> Procedure:
    def question() -> object:
        extents, miss = image.map([(start, length)])
        return miss if not extents and isinstance(miss, NeedMeta) else extents

    return (yield from ask(image, question, pins))


def write(image: Qcow2, offset: int, data: bytes) -> Procedure:
    """Write ``data`` at ``offset`` of the VM state.  Raises OSError: EFBIG, ENOSPC."""
    check_can_share(image)
    if not data:
        return
    base = vm_state_offset(image)
    _check(image, base, offset, len(data))
    yield from announce(image)
    start, end = base + offset, base + offset + len(data)
    entries = hd.l1_bytes(image.header, end) // 8
    if entries > len(image.l1):
        yield from grow_l1(image, entries)
    cluster = image.cluster_size
    kept, image.size = image.size, align_up(end, cluster)
    try:
        first, last = align_down(start, cluster), align_up(end, cluster)
        # Whole clusters, so that nothing is filled up from a backing file.
        head = yield from _stored(image, first, start - first)
        tail = yield from _stored(image, end, last - end)
        whole = head + data + tail
        for at in range(0, len(whole), _PIECE):
            yield GuestWrite(first + at, whole[at : at + _PIECE])
            yield Progress(at, len(whole))
        yield from flush(image)
    except NoSpace:
        yield from flush(image)
        raise
    finally:
        image.size = kept


def _check(image: Qcow2, base: int, offset: int, length: int) -> None:
    """Raise OSError (EFBIG) for a range that no L1 table can reach."""
    if offset < 0 or length < 0:
        raise OSError(errno.EINVAL, "Invalid argument")
    end = base + offset + length
    if end >= 1 << 63 or hd.l1_bytes(image.header, end) > hd.MAX_L1_BYTES:
        raise OSError(errno.EFBIG, "File too large")
