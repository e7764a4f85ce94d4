"""The NBD requests that move no payload: flush, trim, zeroes, cache, block status."""

from __future__ import annotations

from collections.abc import Callable

from ..contract import FUA, MAY_UNMAP
from ..engine.node import Node
from ..wire import nbd_const as c
from ..wire import nbd_reply as reply
from ..wire.nbd_batch import Other
from .nbd_status import allocation

_CACHE_PIECE = 1 << 20


async def perform(node: Node, other: Other, stopped: Callable[[], bool]) -> bytes:
    """Carry it out; returns the reply of success and raises what the node raises.

    ``stopped`` ends what is only advice early.
    """
    command, flags, cookie, offset, length = other
    fua = bool(flags & c.CMD_FLAG_FUA)
    if command == c.CMD_FLUSH:
        await node.flush()
    elif command == c.CMD_TRIM:
        await node.discard([offset], [length])
        if fua:
            await node.flush()
    elif command == c.CMD_WRITE_ZEROES:
        mode = (FUA if fua else 0) | (0 if flags & c.CMD_FLAG_NO_HOLE else MAY_UNMAP)
        await node.zero([offset], [length], mode)
    elif command == c.CMD_CACHE:
        await _cache(node, offset, length, stopped)
    else:
        only_one = bool(flags & c.CMD_FLAG_REQ_ONE)
        return reply.block_status(cookie, await allocation(node, offset, length, only_one))
    return reply.done((cookie,))


async def _cache(node: Node, offset: int, length: int, stopped: Callable[[], bool]) -> None:
    """Read it, so that the host has it in memory."""
    end = offset + length
    while offset < end and not stopped():
        piece = min(_CACHE_PIECE, end - offset)
        await node.read([offset], [piece])
        offset += piece
        await node.driver.turn()
