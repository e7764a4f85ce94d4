"""Checking a qcow2 image: do the reference counts say what the tables say?"""

from __future__ import annotations

from array import array

from ....contract import Compute, Procedure, Progress, Read
from ....hints import TYPE_CHECKING
from ..machine.core import COPIED, OFFSET, PACKED, SLOT
from ..machine.refblock import RefBlock, decode, narrow
from .counts import CHUNK, MOST_CHUNKS
from .meter import Meter
from .references import Walker, uncovered
from .scan import Loose, Piece, Run, pieces_of

if TYPE_CHECKING:
    from ..image import Image

# Entries between two yields where each one is looked at: a few milliseconds.
_SLICE = 8192
# Counts that are compared at once where some of them differ.
_PART = 512
_MOST_BLOCKS = 16


class Block:
    """A refcount block that is compared; ``raw`` None for one that there is not."""

    __slots__ = ("_decoded", "bits", "narrow", "raw")

    def __init__(self, bits: int, raw: bytes | None) -> None:
        self.bits = bits
        self.raw = raw
        self.narrow = narrow(bits, raw) if raw is not None else None
        """The counts as bytes, where none is larger."""
        self._decoded: RefBlock | None = None

    def get(self, index: int) -> int:
        """One count."""
        if self.raw is None:
            return 0
        if self.narrow is not None:
            return self.narrow[index]
        if self._decoded is None:
            self._decoded = decode(self.bits, self.raw)
        return self._decoded.get(index)

    def part(self, start: int, stop: int) -> bytes | None:
        """Some counts as bytes; None where one may be larger."""
        if self.raw is None:
            return bytes(stop - start)
        return None if self.narrow is None else self.narrow[start:stop]


class Checker(Walker):
    """One check of an image on disk."""

    def run(self) -> Procedure:
        """The whole check; returns the CheckResult."""
        result = self.result
        result.uncovered = uncovered(self.image)
        yield from self.walk()
        yield from self.compare()
        if self.uncopied or self.counts.shared or result.corruptions or result.leaks:
            yield from self.check_copied()
        return result

    # -- counts
    def compare(self) -> Procedure:
        """Compare every count with the references."""
        end = yield from self._compare_counted()
        while self.counts.limit is not None:
            yield from self.walk_on()
            end = max(end, (yield from self._compare_counted()))
        self.result.image_end_offset = end << self.bits

    def block_indexes(self) -> list[int]:
        """The refcount blocks that exist or ought to and count some of the clusters whose
        references were counted, ascending."""
        shift = self.image.block_shift
        start, stop = self.counts.start, self.counts.stop
        found = self.counts.blocks(shift)
        for index in self.blocks:
            if (index + 1) << shift > start and (stop is None or index << shift < stop):
                found.add(index)
        return sorted(found)

    def _compare_counted(self) -> Procedure:
        """Compare what was counted; returns one more than the last cluster that is in use."""
        indexes = self.block_indexes()
        end = 0
        for start in range(0, len(indexes), self.batch):
            part = indexes[start : start + self.batch]
            there = [index for index in part if index in self.blocks]
            ranges = [(self.blocks[index], self.size) for index in there]
            raws = yield Read(SLOT, ranges, "refblock_load")
            by_index = dict(zip(there, raws, strict=True))
            for index in part:
                block = Block(self.image.refcount_bits, by_index.pop(index, None))
                end = max(end, (yield from self._compare_block(index, block)))
                yield from self.block_done()
            yield Progress(start, len(indexes))
        return end

    def block_done(self) -> Procedure:
        """A block was compared."""
        yield from ()

    def _compare_block(self, index: int, block: Block) -> Procedure:
        """Compare the counts of one block; returns one more than the last cluster in use."""
        first = index << self.image.block_shift
        start, stop = max(first, self.counts.start), first + self.image.per_block
        stop = min(stop, self.file_clusters, self.counts.stop or stop)
        end = looked = 0
        while start < stop:
            part = min(stop, (start | CHUNK - 1) + 1)
            wanted = self.counts.part(start, part)
            actual = block.part(start - first, part - first)
            if wanted is None or actual is None or wanted != actual:
                for at in range(start, part, _PART):
                    to = min(part, at + _PART)
                    if wanted is not None and actual is not None:
                        i, j = at - start, to - start
                        if wanted[i:j] == actual[i:j]:
                            used = len(wanted[i:j].rstrip(b"\0"))
                            end = at + used if used else end
                            continue
                    end = max(end, self._compare_each(block, first, at, to))
                    looked += to - at
                    if looked >= _SLICE:
                        looked = 0
                        yield Progress(at, stop)
            else:
                used = len(wanted.rstrip(b"\0"))
                end = start + used if used else end
            start = part
        return end

    def _compare_each(self, block: Block, first: int, start: int, stop: int) -> int:
        end = 0
        for cluster in range(start, stop):
            count = block.get(cluster - first)
            wanted = self.counts.get(cluster)
            if count or wanted:
                end = cluster + 1
            if count != wanted:
                self._mismatch(cluster, count, wanted)
        return end

    def _mismatch(self, cluster: int, count: int, wanted: int) -> None:
        result = self.result
        if count < wanted:
            result.corruption(f"cluster {cluster} refcount={count} reference={wanted}")
        elif not result.uncovered:
            result.leaks += 1
            result.say(f"Leaked cluster {cluster} refcount={count} reference={wanted}")

    # -- flags
    def check_copied(self) -> Procedure:
        """COPIED must say exactly that the count is one."""
        cache: dict[int, Block] = {}
        offsets: dict[int, None] = {}
        for l1_index, entry in enumerate(self.image.l1):
            if l1_index % _SLICE == 0:
                yield Progress(l1_index, len(self.image.l1))
            offset = entry & OFFSET
            if not offset or offset & (self.size - 1):
                continue
            count = yield from self.count_of(offset >> self.bits, cache)
            if (count == 1) != bool(entry & COPIED):
                self.result.corruption(
                    f"OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} "
                    f"refcount={count}"
                )
            if offset >> self.bits < self.file_clusters:
                offsets[offset] = None
        if self.external:
            return
        tables = list(offsets)
        self.meter.expect(len(tables) << self.bits)
        for start in range(0, len(tables), self.batch):
            part = tables[start : start + self.batch]
            raws = yield Read(SLOT, [(offset, self.size) for offset in part], "l2_load")
            found: list[list[Piece]] = yield Compute(pieces_of, (raws, self.size, self.stride == 2))
            for table in found:
                for piece in table:
                    if isinstance(piece, Loose):
                        yield from self._check_entries(piece.entries, cache)
                        yield Progress(start, len(tables))
                    elif (yield from self.wrong_run(piece, cache)):
                        yield from self._check_entries(self.entries_of(piece), cache)
            yield Progress(start, len(tables))

    def entries_of(self, run: Run) -> array[int]:
        """The entries of a run one by one."""
        return array("Q", [run.entry + i * self.size for i in range(run.length)])

    def wrong_run(self, run: Run, cache: dict[int, Block]) -> Procedure:
        """Whether some flag of a run may be wrong."""
        cluster = (run.entry & OFFSET) >> self.bits
        stop = cluster + run.length
        shift = self.image.block_shift
        while cluster < stop:
            block = yield from self.block_of(cluster, cache)
            first = cluster >> shift << shift
            end = min(stop, first + self.image.per_block)
            part = block.part(cluster - first, end - first)
            if part is None:
                return True
            ones = part.count(1)
            if ones != (len(part) if run.entry & COPIED else 0):
                return True
            cluster = end
        return False

    def _check_entries(self, entries: array[int], cache: dict[int, Block]) -> Procedure:
        mask = self.size - 1
        for entry in entries:
            host = entry & OFFSET
            if not host or entry & PACKED or host & mask:
                continue
            count = yield from self.count_of(host >> self.bits, cache)
            if (count == 1) != bool(entry & COPIED):
                self.result.corruption(
                    f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
                )

    def block_of(self, cluster: int, cache: dict[int, Block]) -> Procedure:
        """The refcount block on disk that counts a cluster."""
        index = cluster >> self.image.block_shift
        block = cache.get(index)
        if block is None:
            if len(cache) >= _MOST_BLOCKS:
                cache.pop(next(iter(cache)))
            raw = None
            if index in self.blocks:
                (raw,) = yield Read(SLOT, [(self.blocks[index], self.size)], "refblock_load")
            block = cache[index] = Block(self.image.refcount_bits, raw)
        return block

    def count_of(self, cluster: int, cache: dict[int, Block]) -> Procedure:
        """The count on disk of one cluster."""
        block = yield from self.block_of(cluster, cache)
        return block.get(cluster & self.image.per_block - 1)


def check(image: Image) -> Procedure:
    """Check the image on disk (with nothing dirty); returns a CheckResult."""
    meter = Meter()
    return (yield from meter.run(Checker(image, meter, MOST_CHUNKS).run()))
