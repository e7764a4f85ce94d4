"""Cutting off the end of an image file that nothing uses any more."""

from __future__ import annotations

from ...contract import Barrier, Length, MetaWrite, Procedure, Quiesce, Read, Truncate, Write
from ...errors import NotSupported
from ...hints import TYPE_CHECKING
from .check.checking import check
from .machine.core import REFTABLE_OFFSET_MASK, SLOT
from .machine.refblock import RefBlock, decode

if TYPE_CHECKING:
    from .format import Qcow2


def cut_end(image: Qcow2) -> Procedure:
    """Make the file end behind the last cluster in use, with nothing dirty.

    Refcount blocks at the end that count nothing but themselves go first.  Then a check must find
    no corruption, so that what is referred to and not counted is not lost; it is made only where
    the counts say that there is something to cut off.
    """
    if not image.options.get("zero_beyond_end", True):
        return  # a device
    length: int = yield Length(SLOT)
    end, idle = yield from _counted(image, length)
    if end >= length:
        return
    found = yield from check(image)
    if found.corruptions or found.check_errors or found.uncovered:
        return
    if idle:
        table = image.header.reftable_offset
        yield Write([MetaWrite(SLOT, table + 8 * index, bytes(8)) for index in idle])
        yield Barrier()
        for index in idle:
            image.reftable[index] = 0
        yield Quiesce()
        image.use_reftable(image.reftable, 0)
    try:
        yield Truncate(SLOT, end)
    except NotSupported:  # the end stays, and is free: the image lies in a part of a file
        return
    yield Barrier()


def _counted(image: Qcow2, length: int) -> Procedure:
    """The end in bytes of the last cluster that is counted, but for refcount blocks that count
    themselves alone; and the numbers of these blocks.  ``length`` where the table is not sound."""
    bits = image.cluster_bits
    idle: list[int] = []
    seen: set[int] = set()
    for index in range(len(image.reftable) - 1, -1, -1):
        offset = image.reftable[index]
        if not offset:
            continue
        if offset & ~REFTABLE_OFFSET_MASK or offset & image.cluster_mask:
            break
        if offset >= length or offset in seen:
            break
        seen.add(offset)
        (raw,) = yield Read(SLOT, [(offset, image.cluster_size)], "refblock_load")
        block = decode(image.refcount_bits, raw)
        first = index << image.block_shift
        own = (offset >> bits) - first
        alone = 0 <= own < block.entries and block.get(own) == 1
        if alone:
            block.set(own, 0)
        last = _last(block)
        if last >= 0:
            if alone:
                last = max(last, own)
            return (first + last + 1) << bits, idle
        if alone:
            idle.append(index)
    return length, []


def _last(block: RefBlock) -> int:
    """The last cluster whose count is not zero; -1 without one."""
    at, end = 0, block.entries
    while (run := block.zero_run(at)) is not None:
        if run[1] == end:
            return run[0] - 1
        at = run[1]
    return end - 1


__all__ = ["cut_end"]
