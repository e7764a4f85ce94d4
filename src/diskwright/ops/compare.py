"""Telling whether two disks have the same content."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..errors import DiskError
from ..graph.node import Node
from ..graph.status import Status, block_status
from ..hints import Any
from ..records import NamedTuple
from ..units import SECTOR, align_down

BUFFER = 1 << 20
_ZEROES = bytes(BUFFER)
_SHIFT = 16
"""Where content begins in a buffer: the allocator puts large blocks 16 bytes behind the start of
a page, and copies from the page cache to just there take six times as long (engine/buffers.py)."""


class ReadFailed(DiskError):
    """A disk could not be read (``side`` 0 or 1) at ``offset``; ``status_only``: already asking
    what is there failed."""

    def __init__(
        self, side: int, offset: int, length: int, cause: OSError | DiskError, status_only: bool
    ) -> None:
        self.side, self.offset, self.length = side, offset, length
        self.cause, self.status_only = cause, status_only
        self.exit_code = 3 if status_only else 4
        super().__init__(str(cause))


class Comparison(NamedTuple):
    """``equal``: the content is the same, where the shorter disk counts as followed by zeroes.

    ``offset``: the first 512-byte sector that differs, -1 when none does.  ``sizes_differ`` and
    (strict) ``status_offset``, the first place that one disk holds and the other does not.
    """

    equal: bool
    offset: int = -1
    sizes_differ: bool = False
    status_offset: int = -1

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``diskwright compare --output=json``; None for a place that there is not."""
        return {
            "equal": self.equal,
            "offset": self.offset if self.offset >= 0 else None,
            "sizes-differ": self.sizes_differ,
            "status-offset": self.status_offset if self.status_offset >= 0 else None,
        }


async def compare(
    one: Node,
    other: Node,
    *,
    strict: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_sizes_differ: Callable[[], None] | None = None,
) -> Comparison:
    """Compare two open disks.

    ``strict``: sizes must be the same, too, and the same ranges allocated.  ``on_sizes_differ`` is
    called when the common part is equal and the rest of the longer disk will be looked at.
    """
    nodes = (one, other)
    common, total = sorted((one.size, other.size))
    if strict and common != total:
        return Comparison(False, sizes_differ=True)
    left, right = bytearray(_SHIFT + BUFFER), bytearray(_SHIFT + BUFFER)
    cursors = (_Cursor(nodes, 0), _Cursor(nodes, 1))
    offset = 0
    while offset < common:
        first = (await cursors[0].at(offset)).part(offset, common)
        second = (await cursors[1].at(offset)).part(offset, common)
        length = min(first.length, second.length)
        if strict and first[3:6] != second[3:6]:
            return Comparison(False, status_offset=offset)
        if not (first.zero and second.zero):
            if first.zero or second.zero:
                side = 1 if first.zero else 0
                length = min(length, BUFFER)
                wrong = await _not_zero(nodes, side, offset, length, left)
            else:
                length = min(length, BUFFER)
                await _read(nodes, 0, offset, length, left)
                await _read(nodes, 1, offset, length, right)
                wrong = _difference(left, memoryview(right)[_SHIFT:], length)
            if wrong >= 0:
                return Comparison(False, offset + wrong)
        offset += length
        if on_progress is not None:
            on_progress(offset, total)
    if common == total:
        return Comparison(True)
    if on_sizes_differ is not None:
        on_sizes_differ()
    side = 0 if one.size > other.size else 1
    while offset < total:
        part = await cursors[side].at(offset)
        length = part.length
        if not part.zero:
            length = min(length, BUFFER)
            wrong = await _not_zero(nodes, side, offset, length, left)
            if wrong >= 0:
                return Comparison(False, offset + wrong, sizes_differ=True)
        offset += length
        if on_progress is not None:
            on_progress(offset, total)
    return Comparison(True, sizes_differ=True)


class _Cursor:
    """What the ranges of one disk are, asked once for each."""

    def __init__(self, nodes: tuple[Node, Node], side: int) -> None:
        self.nodes, self.side = nodes, side
        self.known: deque[Status] = deque()

    async def at(self, offset: int) -> Status:
        """The status from ``offset`` on."""
        known = self.known
        while known and offset >= known[0].start + known[0].length:
            known.popleft()
        if not known:
            node = self.nodes[self.side]
            length = node.size - offset
            try:
                known.extend(await block_status(node, offset, length))
            except (OSError, DiskError) as error:
                raise ReadFailed(self.side, offset, length, error, True) from error
        return known[0].part(offset, known[0].start + known[0].length)


async def _read(
    nodes: tuple[Node, Node], side: int, offset: int, length: int, buffer: bytearray
) -> None:
    """Fill ``buffer`` from ``_SHIFT`` on, which is used again: fresh memory costs more than the
    comparison."""
    try:
        await nodes[side].read([offset], [length], [memoryview(buffer)[_SHIFT : _SHIFT + length]])
    except (OSError, DiskError) as error:
        raise ReadFailed(side, offset, length, error, False) from error


async def _not_zero(
    nodes: tuple[Node, Node], side: int, offset: int, length: int, buffer: bytearray
) -> int:
    """The first sector of the range that is not all zeroes, relative to it; -1 for none."""
    await _read(nodes, side, offset, length, buffer)
    return _difference(buffer, memoryview(_ZEROES), length)


def _difference(a: bytearray, b: memoryview, length: int) -> int:
    """The first sector below ``length`` in which the content of ``a``, a buffer, differs from
    ``b``; -1 for none."""

    # Views compare item by item; this goes as fast as memory.
    def same(start: int, end: int) -> bool:
        return a.startswith(b[start:end], _SHIFT + start)

    if same(0, length):
        return -1
    low, high = 0, length
    while high - low > SECTOR:
        middle = low + max(SECTOR, align_down((high - low) // 2, SECTOR))
        if same(low, middle):
            low = middle
        else:
            high = middle
    return low
