"""What all leaves of the graph share."""

from __future__ import annotations

import errno

from ..engine.node import Buffer, Node
from ..errors import NodeClosed
from ..extents import Data, Extent, Zero

__all__ = ["Buffer", "Leaf", "PERMISSIONS", "WRITING", "clear"]

# In the order of their lock bytes.
PERMISSIONS = ("consistent-read", "write", "write-unchanged", "resize")
WRITING = frozenset(PERMISSIONS[1:])
"""Those for which a file must be open for writing."""

_ZEROES = bytes(1 << 16)


class Leaf(Node):
    """A node without children: a protocol.  Reads beyond its end give zeroes; writes beyond its
    end grow it, unless it cannot grow."""

    closed = False
    filename = ""
    """The name that errors give, where there is one."""

    def check_open(self) -> None:
        """Raise :class:`~diskwright.errors.NodeClosed` after close or fork."""
        if self.closed:
            raise NodeClosed(f"node '{self.name or self.driver_name}' is closed")

    def check_writable(self) -> None:
        """The same, and OSError (EACCES) where nothing is written."""
        self.check_open()
        if self.read_only:
            raise OSError(errno.EACCES, "the node is read-only", self.filename or None)

    def all_data(self, offset: int, length: int) -> list[Extent]:
        """The extents of a range where nothing tells holes from data: bytes up to the end, zeroes
        behind it."""
        self.check_open()
        inside = max(0, min(length, self.size - offset))
        found: list[Extent] = []
        if inside:
            found.append(Data("", offset, inside, not self.read_only))
        if length > inside:
            found.append(Zero(length - inside, explicit=False))
        return found


def clear(view: bytearray | memoryview, start: int, end: int) -> None:
    """Fill ``view[start:end]`` with zeroes."""
    while start < end:
        step = min(end - start, len(_ZEROES))
        view[start : start + step] = _ZEROES[:step]
        start += step
