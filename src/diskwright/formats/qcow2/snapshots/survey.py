"""Before references are counted once more or once less: whether all of them can be."""

from __future__ import annotations

from collections.abc import Sequence

from ....contract import Length, Procedure, Progress, Read
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array
from ..check.counts import MOST_CHUNKS, Counts
from ..machine.core import SLOT
from ..machine.refblock import RefBlock, decode, narrow
from ..machine.runs import Run
from .named import Claim, Found, claims, each_batch, tables_of

if TYPE_CHECKING:
    from ..format import Qcow2

# Bytes of refcount blocks that are read at once.
_BATCH = 1 << 20


def check_counted(image: Qcow2, claims: Sequence[Claim]) -> None:
    """Raise CorruptImage where a cluster has no refcount block to count it."""
    shift = image.block_shift
    for start, end, _ in claims:
        for index in range(start >> shift, ((end - 1) >> shift) + 1):
            if not image.block_offset(index):
                raise CorruptImage(
                    f"Clusters are in use that have no refcount block (index {index:#x})",
                    field="refcount table entry",
                    offset=image.header.reftable_offset + 8 * index,
                )


def survey(image: Qcow2, l1: Sequence[int], raises: bool) -> Procedure:
    """Look at all that ``l1`` refers to.  Raises CorruptImage where an entry means nothing, or
    names what is not in the file or not counted.

    ``raises``: every reference is about to be counted once more.  Returns whether all counts have
    room for that.  Where many counts are nearly full, the tables are gone through once for each 64
    Mi clusters of the file.
    """
    offsets = tables_of(image, l1)
    most = (1 << image.refcount_bits) - 1
    if raises and most == 1 and offsets:
        return False
    full = set((yield from _nearly_full(image, most))) if raises else set()
    need: Counts | None = Counts(MOST_CHUNKS)
    while need is not None:
        length = yield Length(SLOT)
        yield from each_batch(image, offsets, _Look(image, full, need, length))
        if not (yield from _has_room(image, need, most)):
            return False
        need = None if need.limit is None else Counts(MOST_CHUNKS, need.limit)
    return True


class _Look:
    """Looks at tables, and notes in ``need`` what refers to clusters that blocks of ``full``
    count."""

    def __init__(self, image: Qcow2, full: set[int], need: Counts, length: int) -> None:
        self.image, self.full, self.need = image, full, need
        self.end = -(-length >> image.cluster_bits)

    def __call__(self, found: list[Found]) -> Procedure:
        for done, table in enumerate(found):
            for part in claims(self.image, table):
                if part and part[-1][1] > self.end:
                    raise CorruptImage(
                        "A table names a cluster outside of the file",
                        field="L2 table",
                        offset=table.offset,
                    )
                check_counted(self.image, part)
                if self.full:
                    self._note(part)
            yield Progress(done, len(found))

    def _note(self, claims: Sequence[Claim]) -> None:
        shift = self.image.block_shift
        for start, end, times in claims:
            while start < end:
                stop = min(end, ((start >> shift) + 1) << shift)
                if start >> shift in self.full:
                    self.need.add_run(start, stop, times)
                start = stop


def _nearly_full(image: Qcow2, most: int) -> Procedure:
    """The refcount blocks with a count that is more than half of what the width can say: below,
    adding as many references as a cluster has cannot be too much."""
    out = []
    indexes = [i for i, entry in enumerate(image.reftable) if entry]
    batch = max(1, _BATCH >> image.cluster_bits)
    for at in range(0, len(indexes), batch):
        part = indexes[at : at + batch]
        ranges = [(image.block_offset(index), image.cluster_size) for index in part]
        raws = yield Read(SLOT, ranges, "refblock_load")
        for index, raw in zip(part, raws, strict=True):
            if highest(image.refcount_bits, raw) > most // 2:
                out.append(index)
        yield Progress(at, len(indexes))
    return out


def highest(bits: int, raw: bytes) -> int:
    """The largest count in a refcount block."""
    counts = narrow(bits, raw)
    return max(set(counts) if counts is not None else big_endian_array(bits, raw))


def _has_room(image: Qcow2, need: Counts, most: int) -> Procedure:
    shift = image.block_shift
    known, block = -1, None
    for start, end in need.used(0, need.end):
        while start < end:
            index = start >> shift
            stop = min(end, (index + 1) << shift)
            if index != known:
                (raw,) = yield Read(SLOT, [(image.block_offset(index), image.cluster_size)])
                known, block = index, decode(image.refcount_bits, raw)
                yield Progress(start, end)
            assert block is not None
            if not _fits(block, need, (start, stop), index << shift, most):
                return False
            start = stop
    return True


def _fits(block: RefBlock, need: Counts, run: Run, first: int, most: int) -> bool:
    """Whether the counts of a run of clusters have room for what is needed; ``first`` is the
    cluster that the block begins with."""
    start, stop = run
    counts, wanted = block.small(start - first, stop - first), need.part(start, stop)
    if counts is not None and wanted is not None and max(set(counts)) + max(set(wanted)) <= most:
        return True
    return all(block.get(c - first) + need.get(c) <= most for c in range(start, stop))
