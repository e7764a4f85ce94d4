"""What an NBD server tells of its blocks, as extents."""

from __future__ import annotations

from collections.abc import Iterator

from ..extents import Data, Extent, Opaque, Zero
from ..wire import nbd_const as c


def by_blocks(rows: list[tuple[int, int]], block: int) -> Iterator[tuple[int, int]]:
    """``rows`` (length, flags), each of whole blocks: one in which several meet is data."""
    end = told = 0
    for length, flags in rows:
        end += length
        whole = end - end % block
        if whole > told:
            yield whole - told, flags
            told = whole
        if end > told:
            yield block, 0
            told += block


def extent_of(offset: int, length: int, flags: int, own: bool, writable: bool) -> Extent:
    """One extent.  ``own``: of a context that the caller chose, whose first flag says whatever it
    means by it, and nothing of zeroes."""
    if own:
        return Opaque("", offset, length) if flags & 1 else Data("", offset, length, writable)
    if flags & c.STATE_ZERO:
        return Zero(length, explicit=not flags & c.STATE_HOLE)
    return Data("", offset, length, writable)
