"""The NBD requests that move no payload: flush, trim, zeroes, cache, block status."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ..bitmaps import DirtyBitmap
from ..contract import FUA, MAY_UNMAP, NO_FALLBACK
from ..engine.node import Node
from ..wire import nbd_const as c
from ..wire.nbd_batch import Other
from ..wire.nbd_reply import block_status
from .nbd_status import status_of

_CACHE_PIECE = 1 << 20


async def perform(node: Node, other: Other, stopped: Callable[[], bool]) -> None:
    """Carry it out; raises what the node raises.  ``stopped`` ends what is only advice early."""
    command, flags, _, offset, length, _ = other
    fua = bool(flags & c.CMD_FLAG_FUA)
    if command == c.CMD_FLUSH:
        await node.flush()
    elif command == c.CMD_TRIM:
        await node.discard([offset], [length])
        if fua:
            await node.flush()
    elif command == c.CMD_WRITE_ZEROES:
        mode = (FUA if fua else 0) | (0 if flags & c.CMD_FLAG_NO_HOLE else MAY_UNMAP)
        mode |= NO_FALLBACK if flags & c.CMD_FLAG_FAST_ZERO else 0
        await node.zero([offset], [length], mode)
    else:
        await _cache(node, offset, length, stopped)


async def status(
    node: Node,
    other: Other,
    mode: int,
    contexts: Mapping[int, bytes],
    bitmaps: Mapping[bytes, DirtyBitmap],
) -> bytes:
    """The reply that says what each of ``contexts`` knows of a range."""
    only_one = bool(other.flags & c.CMD_FLAG_REQ_ONE)
    found = {
        number: await status_of(node, context, bitmaps, other.offset, other.length, only_one)
        for number, context in contexts.items()
        if not other.chosen or number in other.chosen
    }
    return block_status(mode, other.cookie, other.offset, found)


def groups(lengths: Sequence[int], size: int, most: int) -> Iterator[tuple[int, int, int]]:
    """``lengths`` in groups of up to ``most`` and of about ``size`` bytes: (first, behind the
    last, bytes)."""
    at, count = 0, len(lengths)
    while at < count:
        end, total = at + 1, lengths[at]
        while end < count and end - at < most and total + lengths[end] <= size:
            total += lengths[end]
            end += 1
        yield at, end, total
        at = end


async def _cache(node: Node, offset: int, length: int, stopped: Callable[[], bool]) -> None:
    """Read it, so that the host has it in memory."""
    end = offset + length
    while offset < end and not stopped():
        piece = min(_CACHE_PIECE, end - offset)
        await node.read([offset], [piece])
        offset += piece
        await node.driver.turn()
