"""What internal snapshots refer to, for a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...contract import Procedure

if TYPE_CHECKING:
    from .references import Walker


def count_snapshots(walker: Walker) -> Procedure:
    """Count the snapshot table, and what each L1 table in it refers to.

    Of a table that breaks the specification nothing is known, so nothing counts as leaked.
    """
    image, result = walker.image, walker.result
    if image.snapshot_damage is not None:
        result.corruption(str(image.snapshot_damage))
        result.uncovered.append("internal snapshots")
        return
    walker.add_region(walker.header.snapshots_offset, image.snapshot_bytes)
    for snapshot in image.snapshot_table:
        yield from walker.inactive_l1(snapshot.l1_offset, snapshot.l1_size)
