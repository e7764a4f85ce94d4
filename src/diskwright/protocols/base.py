"""What all leaves of the graph share."""

from __future__ import annotations

from ..engine.node import Buffer, Node
from ..errors import NodeClosed

__all__ = ["Buffer", "Leaf", "PERMISSIONS", "clear"]

# In the order of their lock bytes.
PERMISSIONS = ("consistent-read", "write", "write-unchanged", "resize")

_ZEROES = bytes(1 << 16)


class Leaf(Node):
    """A node without children: a protocol.  Reads beyond its end give zeroes; writes beyond its
    end grow it, unless it cannot grow."""

    closed = False

    def check_open(self) -> None:
        """Raise :class:`~diskwright.errors.NodeClosed` after close or fork."""
        if self.closed:
            raise NodeClosed(f"node '{self.name or self.driver_name}' is closed")


def clear(view: bytearray | memoryview, start: int, end: int) -> None:
    """Fill ``view[start:end]`` with zeroes."""
    while start < end:
        step = min(end - start, len(_ZEROES))
        view[start : start + step] = _ZEROES[:step]
        start += step
