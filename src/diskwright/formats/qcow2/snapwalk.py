"""What internal snapshots refer to, for a check."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ...contract import Procedure, Read
from .core import SLOT

if TYPE_CHECKING:
    from .references import Walker


def count_snapshots(walker: Walker) -> Procedure:
    """Count the snapshot table; each L1 table in it is for `Walker.inactive_l1`."""
    h = walker.header
    at = h.snapshots_offset
    for _ in range(h.nb_snapshots):
        (raw,) = yield Read(SLOT, [(at, 40)])
        id_length, name_length = struct.unpack_from(">HH", raw, 12)
        (extra,) = struct.unpack_from(">I", raw, 36)
        if extra > 1024:
            walker.result.corruption("snapshot table entry has too much extra data")
            return
        at += 40 + extra + id_length + name_length
        at += -at % 8
    walker.add_region(h.snapshots_offset, at - h.snapshots_offset)
