"""Internal snapshots as callers know them: told in text, found by id and name, shown as a disk."""

from __future__ import annotations

from array import array

from ....abilities import SnapshotInfo
from ....contract import Procedure, Quiesce
from ....errors import NoSuchSnapshot
from ....hints import TYPE_CHECKING
from ....ondisk import zeros
from .. import header as hd
from . import procedures as work
from .table import Snapshot, described

if TYPE_CHECKING:
    from ..format import Qcow2
    from ..image import Image


def _found(image: Image, snapshot_id: str | None, name: str | None) -> Snapshot:
    snapshot = work.find(image, snapshot_id, name)
    if snapshot is None:
        raise NoSuchSnapshot
    return snapshot


def create(image: Qcow2, info: SnapshotInfo) -> Procedure:
    """See `work.create`; returns a SnapshotInfo."""
    new = Snapshot(
        b"",
        info.name.encode(errors="surrogateescape"),
        0,
        0,
        info.date_sec,
        info.date_nsec,
        info.vm_clock_nsec,
        info.vm_state_size,
        icount=info.icount,
    )
    return described((yield from work.create(image, new)))


def apply(image: Qcow2, snapshot_id: str | None, name: str | None) -> Procedure:
    """See `work.apply`."""
    yield from work.apply(image, _found(image, snapshot_id, name))


def delete(image: Qcow2, snapshot_id: str | None, name: str | None) -> Procedure:
    """See `work.delete`."""
    yield from work.delete(image, _found(image, snapshot_id, name))


def show(image: Image, snapshot_id: str | None, name: str | None) -> Procedure:
    """Put the snapshot's L1 table and size in the place of the disk's own; nothing is written from
    then on, so the file stays as it is."""
    snapshot = _found(image, snapshot_id, name)
    l1: array[int] = yield from work.read_l1(image, snapshot)
    image.writable = image.ready = False
    if snapshot.disk_size is not None:
        image.size = snapshot.disk_size
    l1.extend(zeros(64, max(hd.l1_bytes(image.header, image.size) // 8 - len(l1), 0)))
    image.replace_l1(l1)
    yield Quiesce()
