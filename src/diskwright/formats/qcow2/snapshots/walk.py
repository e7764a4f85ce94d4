"""What internal snapshots refer to, for a check."""

from __future__ import annotations

from ....contract import Procedure
from ....hints import TYPE_CHECKING
from .table import damage, described

if TYPE_CHECKING:
    from ..check.references import Walker


def count_snapshots(walker: Walker) -> Procedure:
    """Count the snapshot table, and what each L1 table in it refers to.

    Of a table or an entry that breaks the specification nothing is known, so nothing counts as
    leaked; see `uncovered`.
    """
    image, result = walker.image, walker.result
    if image.snapshot_damage is not None:
        result.corruption(str(image.snapshot_damage))
        return
    walker.add_region(walker.header.snapshots_offset, image.snapshot_bytes)
    for number, snapshot in enumerate(image.snapshot_table):
        if image.header.version > 2 and snapshot.disk_size is None:
            result.corruption(f"snapshot table entry {number} is incomplete")
        wrong = damage(walker.header, snapshot)
        if wrong is None:
            yield from walker.inactive_l1(snapshot.l1_offset, snapshot.l1_size)
            continue
        info = described(snapshot)
        result.corruption(
            f"snapshot {info.id} ({info.name}) {wrong[2]}; snapshot table entry corrupted"
        )
