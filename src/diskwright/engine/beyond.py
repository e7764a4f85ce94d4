"""Bytes that a format keeps behind the end of its disk, such as the state of a machine.

They are mapped and written as the disk is, but no request of a guest reaches them, and a backing
file has no part in them.
"""

from __future__ import annotations

from collections.abc import Callable

from ..extents import DATA, PACKED
from ..hints import TYPE_CHECKING
from ..units import align_down, align_up

if TYPE_CHECKING:
    from .engine import Engine


async def read_beyond(engine: Engine, offset: int, length: int) -> bytes:
    """``length`` bytes from guest offset ``offset``; zeroes where nothing is stored."""
    while engine.gate is not None:
        await engine.gate
    epoch = engine.epochs.enter()
    try:
        return await _stored(engine, offset, length)
    finally:
        engine.epochs.leave(epoch)


async def _stored(engine: Engine, offset: int, length: int) -> bytes:
    if not length:
        return b""
    # The sectors of a cipher are read as a whole.
    sector = engine.format.cipher_unit
    first, end = align_down(offset, sector), align_up(offset + length, sector)
    out = bytearray(end - first)
    view = memoryview(out)
    at = 0
    starts, views = [], []
    for extent in await engine.map_range(first, end - first):
        if extent.kind in (DATA, PACKED):
            starts.append(first + at)
            views.append(view[at : at + extent.length])
        at += extent.length
    await engine.reader.fill(starts, views, zeroed=True)
    return bytes(view[offset - first : offset - first + length])


async def write_beyond(engine: Engine, place: Callable[[], int | None], data: bytes) -> bool:
    """Write ``data`` at the guest offset ``place()``.

    False, and nothing was written, when that is None once the lease is there: a procedure that came
    before has changed where things are.
    """
    offset = place()
    if offset is None or not data:
        return offset is not None
    engine.check_failed()
    engine.writeback.check_room()
    unit = engine.format.unit
    end = offset + len(data)
    first, last = align_down(offset, unit), align_up(end, unit)
    lease = await engine.leases.take([(first, last)], exclusive=True)
    try:
        if place() != offset:
            return False
        epoch = engine.epochs.enter()
        try:
            # Whole units, so that nothing is filled up from a backing file.
            head = await _stored(engine, first, offset - first)
            tail = await _stored(engine, end, last - end)
        finally:
            engine.epochs.leave(epoch)
        await engine.allocator.write_leased(first, b"".join((head, data, tail)))
    finally:
        engine.leases.drop(lease)
    engine.allocator.press()
    return True
