"""The VM state, which is kept at guest offsets behind the disk (qcow2 specification, "Snapshots").

It begins at the first guest offset that is mapped by an L1 entry of its own, so the disk's L1 table
grows when it is written, and goes into a snapshot with it.
"""

from __future__ import annotations

import errno

from ....contract import Procedure
from ....hints import TYPE_CHECKING
from .. import header as hd
from ..edit import announce
from ..resizing import grow_l1
from .procedures import check_can_share

if TYPE_CHECKING:
    from ..format import Qcow2


def grow(image: Qcow2, end: int) -> Procedure:
    """Make room for ``end`` bytes of VM state.  Raises OSError (EFBIG) where no L1 table reaches
    so far, NoSpace."""
    check_can_share(image)
    total = image.vm_state_offset + end
    entries = 0 if total >= 1 << 63 else hd.l1_bytes(image.header, total) // 8
    if not entries or entries * 8 > hd.MAX_L1_BYTES:
        raise OSError(errno.EFBIG, "File too large")
    if entries > len(image.l1):
        yield from announce(image)
        # A state comes in many pieces, so that more than the next one gets room.
        wanted = max(entries, min(len(image.l1) * 3 // 2, hd.MAX_L1_BYTES // 8))
        yield from grow_l1(image, wanted)
