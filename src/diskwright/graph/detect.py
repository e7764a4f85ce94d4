"""``detect-zeroes``: buffers of zeroes are written as zero requests."""

from __future__ import annotations

from collections.abc import Sequence

from ..contract import COMPRESSED, MAY_UNMAP
from ..hints import Any
from .node import Buffer, Node

_ZEROES = bytes(1 << 16)


def detect_zeroes(node: Node, how: str) -> None:
    """From now on look at what is written to ``node`` (``on``), also give up the space of zeroes
    (``unmap``), or do not (``off``).  A node that does not look pays nothing."""
    vars(node).pop("write", None)
    node.detect_zeroes = how
    if how == "off":
        return
    write: Any = node.write
    zero: Any = node.zero
    unmap = MAY_UNMAP if how == "unmap" else 0

    async def looked_at(
        offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0, **more: Any
    ) -> None:
        # Of overlapping requests the later wins, so a batch becomes zeroes as a whole or not.
        if buffers and not flags & COMPRESSED and all(map(is_zero, buffers)):
            await zero(offsets, [len(buffer) for buffer in buffers], flags | unmap)
        else:
            await write(offsets, buffers, flags, **more)

    vars(node)["write"] = looked_at


def is_zero(buffer: Buffer) -> bool:
    """True when every byte is zero."""
    view = memoryview(buffer).cast("B")
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        if part != _ZEROES[: len(part)]:
            return False
    return True
