"""What internal snapshots refer to, for a check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...contract import Procedure
from .snaptable import damage, described

if TYPE_CHECKING:
    from .references import Walker

_UNCOVERED = "internal snapshots"


def count_snapshots(walker: Walker) -> Procedure:
    """Count the snapshot table, and what each L1 table in it refers to.

    Of a table that breaks the specification nothing is known, so nothing counts as leaked.
    """
    image, result = walker.image, walker.result
    if image.snapshot_damage is not None:
        result.corruption(str(image.snapshot_damage))
        result.uncovered.append(_UNCOVERED)
        return
    walker.add_region(walker.header.snapshots_offset, image.snapshot_bytes)
    for snapshot in image.snapshot_table:
        wrong = damage(walker.header, snapshot)
        if wrong is not None:
            info = described(snapshot)
            result.corruption(
                f"snapshot {info.id} ({info.name}) {wrong[2]}; snapshot table entry corrupted"
            )
            known = False
        else:
            known = yield from walker.inactive_l1(snapshot.l1_offset, snapshot.l1_size)
        if not known and _UNCOVERED not in result.uncovered:
            result.uncovered.append(_UNCOVERED)
