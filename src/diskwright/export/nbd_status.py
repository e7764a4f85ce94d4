"""What is known of a range of an export, in the terms of NBD block status."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import and_

from ..bitmaps import DirtyBitmap
from ..engine import bitmaps as at
from ..engine.node import Node
from ..errors import UsageError
from ..graph.status import Status, block_status
from ..units import align_down, align_up
from ..wire.nbd_const import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    STATE_DIRTY,
    STATE_HOLE,
    STATE_ZERO,
)

Row = tuple[int, int]  # (length in bytes, state flags)

EXTENTS_LIMIT = 4096
"""Most rows in one answer: a client asks again behind them."""
_FIRST_WINDOW = 1 << 20
_MANY_WINDOW = 1 << 30
_LAST_WINDOW = 1 << 40
_ROUNDS = 64
"""Most windows of one answer."""


async def find_bitmaps(node: Node, names: Sequence[str]) -> dict[bytes, DirtyBitmap]:
    """The contexts of these dirty bitmaps, each of the first layer that has one of its name, with
    all of its bits in memory.  Raises UsageError and BitmapError."""
    return dict([await find_bitmap(node, name) for name in names])


async def find_bitmap(node: Node, name: str) -> tuple[bytes, DirtyBitmap]:
    """The same of one bitmap."""
    layer: Node | None = node
    while layer is not None:
        engine = getattr(layer, "engine", None)
        if engine is not None and engine.bitmaps.find(name) is not None:
            return DIRTY_BITMAP + name.encode(), await at.load(engine, name)
        layer = layer.child("backing")
    raise UsageError(f"Bitmap '{name}' is not found")


def contexts_of(depth: bool, bitmaps: Mapping[bytes, DirtyBitmap]) -> tuple[bytes, ...]:
    """The names of all contexts of an export that tells its allocation depth and these bitmaps."""
    return (BASE_ALLOCATION, *((ALLOCATION_DEPTH,) if depth else ()), *bitmaps)


def block_of(node: Node) -> int:
    """The smallest block of an export in bytes, in which it is also told what is where.  Writes to
    a disk that was only guessed to be raw are looked at by sectors."""
    return 512 if node.probed else 1


async def status_of(
    node: Node,
    context: bytes,
    bitmaps: Mapping[bytes, DirtyBitmap],
    offset: int,
    length: int,
    only_one: bool,
) -> list[Row]:
    """Rows from ``offset`` on, at least one, none empty, together at most ``length``."""
    if context == BASE_ALLOCATION:
        return await _in_blocks(node, _allocation, and_, offset, length, only_one)
    if context == ALLOCATION_DEPTH:
        return await _in_blocks(node, _depth, max, offset, length, only_one)
    return _dirty(bitmaps[context], offset, length, only_one)


def _allocation(part: Status) -> int:
    return (0 if part.data else STATE_HOLE) | (STATE_ZERO if part.zero else 0)


def _depth(part: Status) -> int:
    """0: in no layer, 1: in the disk itself, 2: in its backing file, and so on."""
    return part.depth + 1 if part.present else 0


async def _graph(
    node: Node, state_of: Callable[[Status], int], offset: int, length: int, only_one: bool
) -> list[Row]:
    """The range is looked at in windows that grow while they are all alike: a client that wants
    one row at a time would otherwise make us walk over the rest of the disk for each."""
    rows: list[Row] = []
    end = offset + length
    window = _FIRST_WINDOW if only_one else _MANY_WINDOW
    for _ in range(_ROUNDS):
        for part in await block_status(node, offset, min(end - offset, window)):
            state = state_of(part)
            if rows and rows[-1][1] == state:
                rows[-1] = (rows[-1][0] + part.length, state)
            elif len(rows) == (1 if only_one else EXTENTS_LIMIT):
                return rows
            else:
                rows.append((part.length, state))
            offset += part.length
        if offset >= end:
            break
        window = min(window * 2, _LAST_WINDOW)
    return rows


async def _in_blocks(
    node: Node,
    state_of: Callable[[Status], int],
    common: Callable[[int, int], int],
    offset: int,
    length: int,
    only_one: bool,
) -> list[Row]:
    """By blocks of the export: one that several rows meet in has what is ``common`` to them."""
    block = block_of(node)
    if block == 1:
        return await _graph(node, state_of, offset, length, only_one)
    first = align_down(offset, block)
    last = min(align_up(offset + length, block), node.size)
    rows: list[Row] = []
    part = mixed = 0  # of a block that is not whole yet: bytes, and their state
    for count, state in await _graph(node, state_of, first, last - first, False):
        if part:
            mixed = common(mixed, state)
            taken = min(block - part, count)
            part, count = part + taken, count - taken
            if part == block:
                rows.append((block, mixed))
                part = 0
        if count >= block:
            rows.append((align_down(count, block), state))
        if count % block:
            part, mixed = count % block, state
    found: list[Row] = []
    at, end = first, offset + length
    for count, state in rows:
        start, at = max(at, offset), at + count
        row = (min(at, end) - start, state)
        if found and found[-1][1] == state:
            row = (found.pop()[0] + row[0], state)
        found.append(row)
    return found[:1] if only_one else found


def _dirty(bitmap: DirtyBitmap, offset: int, length: int, only_one: bool) -> list[Row]:
    """A disk may be longer than a bitmap of its backing file: what is behind that is clean."""
    rows: list[Row] = []
    end = offset + length
    for start, count, dirty in bitmap.extents(offset, length):
        if len(rows) == (1 if only_one else EXTENTS_LIMIT):
            return rows
        rows.append((count, STATE_DIRTY if dirty else 0))
        offset = start + count
    if offset < end:
        if rows and not rows[-1][1]:
            rows[-1] = (rows[-1][0] + end - offset, 0)
        elif not rows or not only_one:
            rows.append((end - offset, 0))
    return rows
