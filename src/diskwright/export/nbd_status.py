"""``base:allocation``: what the graph knows of a range, in the terms of NBD block status."""

from __future__ import annotations

from ..engine.node import Node
from ..graph.status import block_status
from ..wire.nbd_const import STATE_HOLE, STATE_ZERO

Row = tuple[int, int]  # (length in bytes, state flags)

EXTENTS_LIMIT = 4096
"""Most rows in one answer: a client asks again behind them."""
_FIRST_WINDOW = 1 << 20
_LAST_WINDOW = 1 << 30


async def allocation(node: Node, offset: int, length: int, only_one: bool) -> list[Row]:
    """Rows from ``offset`` on, at least one, none empty, together at most ``length``.

    The range is looked at in windows that grow while they are all alike: a client that wants one
    row at a time would otherwise make us walk over the rest of the disk for each.
    """
    rows: list[Row] = []
    end = offset + length
    window = _FIRST_WINDOW if only_one else _LAST_WINDOW
    while offset < end:
        for part in await block_status(node, offset, min(end - offset, window)):
            state = (0 if part.data else STATE_HOLE) | (STATE_ZERO if part.zero else 0)
            if rows and rows[-1][1] == state:
                rows[-1] = (rows[-1][0] + part.length, state)
            elif len(rows) == (1 if only_one else EXTENTS_LIMIT):
                return rows
            else:
                rows.append((part.length, state))
            offset += part.length
        window = min(window * 2, _LAST_WINDOW)
    return rows
