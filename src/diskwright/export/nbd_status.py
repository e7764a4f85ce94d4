"""``base:allocation``: what the graph knows of a range, in the terms of NBD block status."""

from __future__ import annotations

from ..engine.node import Node
from ..extents import HOLE, ZERO, Data
from ..wire.nbd_const import STATE_HOLE, STATE_ZERO

Row = tuple[int, int]  # (length in bytes, state flags)

EXTENTS_LIMIT = 4096
"""Most rows in one answer: a client asks again behind them."""
_WINDOW = 1 << 30


async def allocation(node: Node, offset: int, length: int, only_one: bool) -> list[Row]:
    """Rows from ``offset`` on, at least one, none empty, together at most ``length``."""
    rows: list[Row] = []
    end = offset + length
    while offset < end:
        window = min(end - offset, _WINDOW)
        for size, state in await _rows(node, offset, window):
            if rows and rows[-1][1] == state:
                rows[-1] = (rows[-1][0] + size, state)
                continue
            if len(rows) == (1 if only_one else EXTENTS_LIMIT):
                return rows
            rows.append((size, state))
        offset += window
    return rows


async def _rows(node: Node, offset: int, length: int) -> list[Row]:
    """The same for one window: zeroes and holes are followed through backing files, data down
    to the protocol, which knows the holes of its file."""
    rows: list[Row] = []
    for extent in await node.extents(offset, length):
        size = extent.length
        if extent.kind == ZERO:
            rows.append((size, STATE_ZERO | (STATE_HOLE if extent.host < 0 else 0)))  # type: ignore[union-attr]
        elif extent.kind == HOLE:
            backing = node.child("backing")
            covered = 0 if backing is None else min(max(backing.size - offset, 0), size)
            if backing is not None and covered:
                rows.extend(await _rows(backing, offset, covered))
            if covered < size:
                rows.append((size - covered, STATE_ZERO | STATE_HOLE))
        elif isinstance(extent, Data) and extent.slot and not extent.xform:
            below = node.child(extent.slot)
            if below is None:
                rows.append((size, 0))
            else:
                rows.extend(await _rows(below, extent.host, size))
        else:
            rows.append((size, 0))
        offset += size
    return rows
