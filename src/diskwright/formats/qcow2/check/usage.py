"""How much of an image file its reference counts say is in use."""

from __future__ import annotations

from array import array

from ....contract import Procedure, Progress, Read
from ....hints import TYPE_CHECKING
from ..machine.core import SLOT

if TYPE_CHECKING:
    from ..image import Image

_OFFSET = 0xFFFF_FFFF_FFFF_FE00
_BATCH = 1 << 20
_TYPES = {8: "B", 16: "H", 32: "I", 64: "Q"}


def referenced_clusters(image: Image) -> Procedure:
    """The number of clusters whose refcount is not zero, as the file has it (what is still dirty
    in memory is not counted).  Changes nothing."""
    size = image.cluster_size
    offsets = [entry & _OFFSET for entry in image.reftable if entry & _OFFSET]
    count = done = 0
    step = max(1, _BATCH // size)
    for start in range(0, len(offsets), step):
        blocks = yield Read(SLOT, [(offset, size) for offset in offsets[start : start + step]])
        for block in blocks:
            count += _nonzero(block, image.refcount_bits)
        done += len(blocks)
        yield Progress(done, len(offsets))
    return count


def _nonzero(block: bytes, bits: int) -> int:
    """How many entries of a refcount block are not zero."""
    if bits >= 8:
        values = array(_TYPES[bits], block)  # the byte order does not matter here
        return len(values) - values.count(0)
    mask = (1 << bits) - 1
    full = bytes(sum(1 for at in range(0, 8, bits) if byte >> at & mask) for byte in range(256))
    return sum(block.translate(full))
