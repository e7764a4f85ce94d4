"""Dropping all guest data of an image, as a commit into the parent does at its end."""

from __future__ import annotations

from ...contract import Barrier, Length, Procedure, Progress, Quiesce, Read, Truncate
from ...hints import TYPE_CHECKING
from .core import PART
from .structures import MIB, SLOT
from .writeback import as_changes

if TYPE_CHECKING:
    from .format import Vhdx

_BATCH = 64 * PART


def make_empty(image: Vhdx) -> Procedure:
    """Let the parent show through everywhere, and give the space of all blocks back.

    A crash leaves some blocks; what they hold is in the parent already.
    """
    image.check_write()
    yield from image.announce(data=False)
    length = yield Length(SLOT)
    total = 8 * image.entries_for(image.blocks)
    for start in range(0, total, _BATCH):
        at = image.bat.offset + start
        (raw,) = yield Read(SLOT, [(at, min(_BATCH, -(-(total - start) // PART) * PART))])
        sectors = [
            (at + i, bytes(PART)) for i in range(0, len(raw), PART) if any(raw[i : i + PART])
        ]
        if sectors:
            yield from image.logged(as_changes(sectors), length)
        yield Progress(start, total)
    yield Quiesce()
    # The log says how long the file was: it must not be found in a shorter one.
    yield from image.empty_log()
    image.forget_space()
    image.reserve_structures()
    end = max(end for _, end in image.reserved)
    end = -(-end // MIB) * MIB
    if end < length:
        yield Truncate(SLOT, end)
        yield Barrier()
    image.set_length((yield Length(SLOT)))
