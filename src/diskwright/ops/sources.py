"""What a copy of disks reads, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from ..engine.copy import Segment
from ..graph.node import Node
from ..graph.status import Status, block_status
from ..units import SECTOR, align_up

SPARSE = 4096
"""Blocks in which zeroes are looked for when nobody says (bytes)."""
_LEAST_HOLE = 64 << 10
"""Shorter holes of a file are read like data, where their zeroes are found then as well."""

_BEGIN = 64 << 20
_STEP = 256 << 20
"""How much is looked through before anything is copied, and at once where there is data (bytes):
meanwhile nothing else is read, and what is written must wait for the interpreter."""


class Sources:
    """The sources as one range of bytes, cut into what is data and what is zero."""

    def __init__(
        self,
        nodes: list[Node],
        sparse: int,
        base: Node | None,
        covered: int,
        deep: bool,
        on_unknown: Callable[[int, OSError], None] | None = None,
    ) -> None:
        self.nodes = nodes
        self.sparse = sparse > 0
        self.least_hole = 0 if deep or sparse > SPARSE else _LEAST_HOLE
        self.base = base
        self.covered = covered
        """Bytes for which the target's backing file stands for ``base``."""
        self.deep = deep
        """Name the files that hold the data, so that the host can copy between them."""
        self.on_unknown = on_unknown
        """Told where nobody can say what a sector is, which is then read; None: that is an
        error."""

    async def data(self) -> int:
        """Bytes that will be read."""
        return sum([part.length async for part in self.segments() if not part.zero])

    async def segments(self, begin: int = 0) -> AsyncIterator[Segment]:
        """What to copy from byte ``begin`` on, in order."""
        start = 0
        for node in self.nodes:
            offset = max(begin - start, 0)
            most = _BEGIN
            while offset < node.size:
                inside = self.base is not None and offset < self.covered
                end = min(self.covered, node.size) if inside else node.size
                length = min(most, end - offset)
                try:
                    below = self.base if inside else None
                    found = await block_status(
                        node, offset, length, base=below, least_hole=self.least_hole
                    )
                except OSError as error:
                    if self.on_unknown is None:
                        raise
                    if length > SECTOR:  # half of it may be known
                        most = align_up(length // 2, SECTOR)
                        continue
                    self.on_unknown(start + offset, error)
                    found = [Status(offset, length, 0, True, False, True)]
                most = _STEP if any(part.data for part in found) else 4 * most
                for part in found:
                    offset += part.length
                    if inside and not (part.present or part.zero or part.data):
                        continue
                    source, at = node, part.start
                    if self.deep and part.data and not part.zero and part.offset >= 0:
                        source, at = part.node or node, part.offset
                    zero = part.zero and self.sparse
                    yield Segment(source, at, start + part.start, part.length, zero)
            start += align_up(node.size, SECTOR)
