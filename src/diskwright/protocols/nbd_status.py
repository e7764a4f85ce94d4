"""What an NBD server tells of its blocks, as extents."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from ..extents import Data, Extent, Zero
from ..wire import nbd_const as c
from ..wire.nbd_negotiation import Agreement
from .nbd_link import Trip

MOST_BYTES = 1 << 30
"""That one request without data is about, where lengths have 32 bits."""
_MANY = 1 << 16
"""Extents that are told at once; what is behind them is called data, as it may be."""
_DEPTH = c.ALLOCATION_DEPTH.decode()


async def rows(
    carry: Callable[[Trip], Awaitable[None]], agreed: Agreement, at: int, end: int
) -> list[tuple[int, int]]:
    """(length, flags) of the beginning of a range, from the one context that was agreed on."""
    (context,) = agreed.contexts
    told: list[tuple[int, int]] = []
    mask = agreed.min_block - 1
    while at < end and len(told) < _MANY:
        first = at & ~mask
        stop = (end + mask) & ~mask
        stop = stop if agreed.extended else min(stop, first + MOST_BYTES)
        trip = Trip(c.CMD_BLOCK_STATUS, [first], [stop - first])
        await carry(trip)
        for count, flags in by_blocks(trip.status[context], mask + 1):
            part = min(first + count, end) - at
            first += count
            if part <= 0:
                break
            told.append((part, flags))
            at += part
    return told


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


def extent_of(offset: int, length: int, flags: int, writable: bool) -> Extent:
    """One extent."""
    if flags & c.STATE_ZERO:
        return Zero(length, explicit=not flags & c.STATE_HOLE)
    return Data("", offset, length, writable)


def claim_of(context: str, value: int) -> tuple[bool, bool]:
    """(data, zero) for a value of any context, as if it were one of ``base:allocation``: so does
    qemu-img show it (measured), with all depths from 2 on alike."""
    flags = min(value, 2) if context == _DEPTH else value
    return not flags & c.STATE_HOLE, bool(flags & c.STATE_ZERO)
