"""Another width of the reference counts (qcow2 specification, "Host cluster management")."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

from ....contract import (
    Barrier,
    Length,
    MetaWrite,
    Procedure,
    Progress,
    Quiesce,
    Read,
    Table,
    Write,
)
from ....errors import UsageError
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_bytes, zeros
from ...editing import ask, flush, unpin
from .. import header as hd
from ..edit import announce
from ..machine.core import SLOT
from ..machine.refblock import PackedBlock, RefBlock, WideBlock, decode, empty
from ..machine.runs import Run

if TYPE_CHECKING:
    from ..format import Qcow2

_BATCH = 1 << 20


class _Survey:
    """What the old counts say, as far as the new layout depends on it."""

    def __init__(self) -> None:
        self.indexes: set[int] = set()
        """New refcount blocks that are not empty."""
        self.end = 0
        """One more than the highest cluster with references."""


def survey(image: Qcow2, bits: int) -> Procedure:
    """Read all counts; returns what a layout for counts of ``bits`` bits needs to know.

    Raises UsageError naming the first cluster whose count ``bits`` bits cannot hold.
    """
    found = _Survey()
    most = (1 << bits) - 1
    new_shift = image.cluster_bits + 3 - (bits.bit_length() - 1)
    offsets = [(i, at) for i in range(len(image.reftable)) if (at := image.block_offset(i))]
    step = max(1, _BATCH >> image.cluster_bits)
    for start in range(0, len(offsets), step):
        part = offsets[start : start + step]
        blocks = yield Read(SLOT, [(at, image.cluster_size) for _, at in part])
        for (index, _), raw in zip(part, blocks, strict=True):
            if raw.count(0) != len(raw):
                block = decode(image.refcount_bits, raw)
                _survey_block(image, found, index, block, most, new_shift)
        yield Progress(start, len(offsets))
    return found


def _survey_block(
    image: Qcow2, found: _Survey, index: int, block: RefBlock, most: int, new_shift: int
) -> None:
    base = index << image.block_shift
    if image.refcount_bits > most.bit_length():
        for at, count in _large(block, most):
            raise UsageError(
                f"Cannot decrease refcount entry width to {most.bit_length()} bits: Cluster at "
                f"offset {base + at << image.cluster_bits:#x} has a refcount of {count}"
            )
    step = 1 << new_shift
    for first in range(base, base + image.per_block, step):
        stop = min(first + step, base + image.per_block)
        used = _last_used(block, first - base, stop - base)
        if used >= 0:
            found.indexes.add(first >> new_shift)
            found.end = max(found.end, base + used + 1)


def _large(block: RefBlock, most: int) -> Iterator[tuple[int, int]]:
    """(index, count) of the counts above ``most``."""
    if isinstance(block, WideBlock):
        if max(block.values) > most:
            yield from ((i, count) for i, count in enumerate(block.values) if count > most)
    else:
        for i in range(block.entries):
            count = block.get(i)
            if count > most:
                yield i, count


def _last_used(block: RefBlock, start: int, stop: int) -> int:
    """The last index of [start, stop) whose count is not zero; -1 without."""
    if isinstance(block, WideBlock):
        size = block.values.itemsize
        used = len(block.values[start:stop].tobytes().rstrip(b"\0"))
        # the bytes are in the order of this machine: the last entry may be cut, never lost
        return start + (used - 1) // size if used else -1
    assert isinstance(block, PackedBlock)
    each = block.per_byte
    used = len(bytes(block.raw[start // each : -(-stop // each)]).rstrip(b"\0"))
    for index in range(min(stop, (start // each + used) * each) - 1, start - 1, -1):
        if block.get(index):
            return index
    return -1


class _Layout:
    """Where the new table and blocks go: in one run at ``start``, in clusters."""

    def __init__(self, image: Qcow2, found: _Survey, bits: int, start: int) -> None:
        size = image.cluster_size
        shift = image.cluster_bits + 3 - (bits.bit_length() - 1)
        self.start = start
        self.table = blocks = 1
        while True:
            end = start + self.table + blocks
            own = range(start >> shift, (end - 1 >> shift) + 1)
            self.indexes = sorted(found.indexes | set(own))
            wanted = -(-(self.indexes[-1] + 1) * 8 // size)
            if wanted <= self.table and len(self.indexes) <= blocks:
                break
            self.table, blocks = max(wanted, self.table), max(len(self.indexes), blocks)
        self.end = start + self.table + blocks
        if self.table * size > max(hd.MAX_REFTABLE_BYTES, size) or self.end > image.max_clusters:
            raise UsageError(
                f"The refcount table of this image would be too large for counts of {bits} bits"
            )


def change_refcount_bits(image: Qcow2, bits: int) -> Procedure:
    """Give the counts ``bits`` bits each (1, 2, 4, ... 64).

    A new table and its blocks are written behind everything in use, with the counts of the old
    ones and their own; when they are durable one write to the first sector of the header switches
    to them, and then the old ones are freed.  A crash leaks one or the other.  Raises UsageError
    before anything is written when a count does not fit.
    """
    if bits == image.refcount_bits:
        return
    yield from survey(image, bits)
    yield from announce(image)
    yield from flush(image)
    found = yield from survey(image, bits)
    length = yield Length(SLOT)
    start = max(found.end, (image.header.reftable_offset >> image.cluster_bits) + 1)
    if image.options.get("zero_beyond_end", True):
        start = max(start, -(-length >> image.cluster_bits))
    layout = _Layout(image, found, bits, start)
    reftable = yield from _write_blocks(image, layout, bits)
    old = _old_places(image)
    yield from _switch(image, layout, bits, reftable)
    pins: list[Table] = []
    for at in range(0, len(old), 1024):
        part = old[at : at + 1024]
        yield from ask(image, partial(image.missing_blocks, part), pins)
        for run in part:
            image.free_later(*run)
        yield from flush(image)
        unpin(pins)
        yield Progress(at, len(old))


def _write_blocks(image: Qcow2, layout: _Layout, bits: int) -> Procedure:
    """Write the new blocks, then the table; returns the table."""
    size, cluster_bits = image.cluster_size, image.cluster_bits
    reftable = zeros(64, layout.table * size // 8)
    at = (layout.start + layout.table) << cluster_bits
    batch: list[MetaWrite] = []
    kept: dict[int, RefBlock] = {}
    for done, index in enumerate(layout.indexes):
        block = yield from _new_block(image, layout, index, bits, kept)
        reftable[index] = at
        batch.append(MetaWrite(SLOT, at, block.encode(0, size), "refblock_alloc_write_blocks"))
        at += size
        if len(batch) << cluster_bits >= _BATCH or done + 1 == len(layout.indexes):
            yield Write(batch)
            batch = []
            yield Progress(done, len(layout.indexes))
    for first in range(0, len(reftable), _BATCH // 8):
        data = big_endian_bytes(reftable, first, min(len(reftable), first + _BATCH // 8))
        where = (layout.start << cluster_bits) + 8 * first
        yield Write([MetaWrite(SLOT, where, data, "refblock_alloc_write_table")])
    yield Barrier()
    return reftable


def _new_block(
    image: Qcow2, layout: _Layout, index: int, bits: int, kept: dict[int, RefBlock]
) -> Procedure:
    """The new block ``index``; ``kept`` is the old block that was read last."""
    block = empty(bits, image.cluster_size)
    base = index * block.entries
    for old in range(
        base >> image.block_shift, (base + block.entries - 1 >> image.block_shift) + 1
    ):
        offset = image.block_offset(old)
        if not offset:
            continue
        source = kept.get(old)
        if source is None:
            (raw,) = yield Read(SLOT, [(offset, image.cluster_size)])
            kept.clear()
            source = kept[old] = decode(image.refcount_bits, raw)
        first = old << image.block_shift
        start, stop = max(base, first), min(base + block.entries, first + image.per_block)
        _copy(source, start - first, block, start - base, stop - start)
    start, stop = max(base, layout.start), min(base + block.entries, layout.end)
    if start < stop:
        block.fill(start - base, stop - base, 1)
    return block


def _copy(source: RefBlock, start: int, target: RefBlock, at: int, count: int) -> None:
    """Counts ``start`` and following of one block into another of any width; all three are
    multiples of 8."""
    if isinstance(source, WideBlock):
        values = source.values[start : start + count]
    else:
        assert isinstance(source, PackedBlock)
        each = source.per_byte
        raw = bytes(source.raw[start // each : (start + count) // each])
        spread = bytearray(count)
        for i in range(each):
            spread[i::each] = raw.translate(_lane(source.bits, i))
        values = array("B", spread)
    if isinstance(target, WideBlock):
        target.values[at : at + count] = array(target.values.typecode, values)
        return
    assert isinstance(target, PackedBlock)
    each = target.per_byte
    small = array("B", values).tobytes()
    joined = 0
    for i in range(each):
        joined |= int.from_bytes(small[i::each], "little") << i * target.bits
    target.raw[at // each : (at + count) // each] = joined.to_bytes(count // each, "little")


def _lane(bits: int, i: int) -> bytes:
    """For every byte value its ``i``-th entry of ``bits`` bits."""
    mask = (1 << bits) - 1
    return bytes(value >> i * bits & mask for value in range(256))


def _old_places(image: Qcow2) -> list[Run]:
    """The clusters of the refcount table and its blocks."""
    bits = image.cluster_bits
    start = image.header.reftable_offset >> bits
    runs = [(start, start + image.header.reftable_clusters)]
    for index in range(len(image.reftable)):
        offset = image.block_offset(index)
        if offset:
            runs.append((offset >> bits, (offset >> bits) + 1))
    return runs


def _switch(image: Qcow2, layout: _Layout, bits: int, reftable: array[int]) -> Procedure:
    """Let the header name the new table: one write, all of it in the first sector."""
    new = image.header.copy()
    new.reftable_offset = layout.start << image.cluster_bits
    new.reftable_clusters = layout.table
    new.refcount_order = bits.bit_length() - 1
    part = new.fields()[hd.REFTABLE_OFFSET : hd.V3_LENGTH]
    yield Write([MetaWrite(SLOT, hd.REFTABLE_OFFSET, part, "refblock_alloc_switch_table")])
    yield Barrier()
    yield Quiesce()
    image.use_header(new)
    image.use_reftable(reftable, layout.end)
