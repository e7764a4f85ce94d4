"""Setting the reference counts and COPIED flags of a qcow2 image right, in place."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from ....contract import Barrier, Compute, MetaWrite, Procedure, Progress, Read, Write
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_array, big_endian_bytes
from ..check.checking import Block, Checker
from ..check.meter import Meter
from ..check.scan import Loose, Piece, Run, pieces_of
from ..machine.core import COPIED, OFFSET, PACKED, SLOT
from ..machine.refblock import decode

if TYPE_CHECKING:
    from ..format import Qcow2

_SLICE = 8192
_SECTOR = 512


class Mender(Checker):
    """A check that mends counts and flags as it goes.

    ``begin`` is a procedure that is run before the first write.
    """

    def __init__(self, image: Qcow2, meter: Meter, begin: Callable[[], Procedure]) -> None:
        super().__init__(image, meter)
        self.begin = begin
        self.lower = self.lift = False
        """Which counts to mend: those that are too high, those that are too low."""
        self.all_flags = False
        """Mend all flags; otherwise COPIED is set where the only reference is this one, and cleared
        where there are several counts."""
        self.crossed = False
        """A cluster has several references and fewer counts."""
        self.flags_fixed = 0
        self._changes: list[tuple[int, int]] = []
        self._alone = True
        """Nothing else lies over the table whose flags are looked at."""
        self._second = CheckResult()
        """What is said once all counts were compared, for that is when others mend them."""

    def countless(self) -> bool:
        """A cluster that is in use has no refcount block to count it."""
        return any(index not in self.blocks for index in self.block_indexes())

    # -- counts
    def compare(self) -> Procedure:
        """As the check does it; block after block is mended."""
        yield from super().compare()
        if self.result.corruptions_fixed or self.result.leaks_fixed:
            yield Barrier()
            for text in self._second.findings:
                self.result.say(text)

    def block_done(self) -> Procedure:
        """Write what was noted of the block."""
        yield from self._store()

    def _mismatch(self, cluster: int, count: int, wanted: int) -> None:
        super()._mismatch(cluster, count, wanted)
        result = self.result
        self.crossed |= count < wanted > 1
        most = (1 << self.image.refcount_bits) - 1
        text = f"cluster {cluster} refcount={count} reference={wanted}"
        if not self._may_mend(cluster, count, wanted):
            if count < wanted:
                self._second.say(f"ERROR {text}")
            return
        if count > wanted:
            result.leaks -= 1
            result.leaks_fixed += 1
        elif wanted <= most:
            result.corruptions -= 1
            result.corruptions_fixed += 1
        self._second.say(f"Repairing {text}")
        self._changes.append((cluster, min(wanted, most)))

    def _may_mend(self, cluster: int, count: int, wanted: int) -> bool:
        index = cluster >> self.image.block_shift
        offset = self.blocks.get(index)
        if offset is None or offset != self.image.reftable[index]:
            return False  # with reserved bits in its entry a block is not counted itself
        if self.counts.get(offset >> self.bits) > 1:
            return False  # what is written there would be seen elsewhere
        if count > wanted:
            return self.lower and not self.result.uncovered
        return self.lift and count < (1 << self.image.refcount_bits) - 1

    def _store(self) -> Procedure:
        """Write the changes that were noted: all are in one block."""
        if not self._changes:
            return
        changes, self._changes = self._changes, []
        yield from self.begin()
        index = changes[0][0] >> self.image.block_shift
        first = index << self.image.block_shift
        (raw,) = yield Read(SLOT, [(self.blocks[index], self.size)], "refblock_load")
        block = decode(self.image.refcount_bits, raw)
        for cluster, count in changes:
            block.set(cluster - first, count)
        bits = self.image.refcount_bits
        start = ((changes[0][0] - first) * bits >> 3) & -_SECTOR
        stop = ((changes[-1][0] - first) * bits >> 3 | _SECTOR - 1) + 1
        data = block.encode(start, stop)
        yield Write([MetaWrite(SLOT, self.blocks[index] + start, data, "refblock_update_part")])
        yield Progress(0, 1)

    # -- flags
    def check_copied(self) -> Procedure:
        """Mend the flags; those that stay wrong are corruptions."""
        cache: dict[int, Block] = {}
        offsets: dict[int, None] = {}
        l1 = self.image.l1
        changed = []
        first, last = self.header.l1_offset, self.header.l1_offset + 8 * len(l1)
        self._alone = all(
            self.counts.get(cluster) == 1
            for cluster in range(first >> self.bits, -(-last >> self.bits))
        )
        for start in range(0, len(l1), _SLICE):
            part = l1[start : start + _SLICE]
            for index, entry in enumerate(part, start):
                offset = entry & OFFSET
                if not offset or offset & (self.size - 1):
                    continue
                if offset >> self.bits < self.file_clusters:
                    offsets[offset] = None
                count = yield from self.count_of(offset >> self.bits, cache)
                text = f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x}"
                if self._wrong(entry, count, text):
                    l1[index] ^= COPIED
                    changed.append(index)
            yield Progress(start, len(l1))
        yield from self._write_entries(self.header.l1_offset, l1, changed, "l1_update")
        if self.external:
            return
        tables = list(offsets)
        self.meter.expect(len(tables) << self.bits)
        for start in range(0, len(tables), self.batch):
            some = tables[start : start + self.batch]
            raws = yield Read(SLOT, [(offset, self.size) for offset in some], "l2_load")
            found: list[list[Piece]] = yield Compute(pieces_of, (raws, self.size, self.stride == 2))
            for offset, raw, table in zip(some, raws, found, strict=True):
                yield from self._mend_flags(offset, raw, table, cache)
            yield Progress(start, len(tables))

    def _mend_flags(
        self, offset: int, raw: bytes, pieces: list[Piece], cache: dict[int, Block]
    ) -> Procedure:
        """Mend the flags of one L2 table; runs of entries that are right are not looked into."""
        self._alone = self.counts.get(offset >> self.bits) == 1
        wrong: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Loose) or (yield from self.wrong_run(piece, cache)):
                wrong.append(piece)
        if not wrong:
            return
        table = big_endian_array(64, raw)
        indexes: list[int] = []
        for piece in wrong:
            stop = piece.at + (piece.length if isinstance(piece, Run) else len(piece.entries))
            for start in range(piece.at, stop, _SLICE):
                span = range(start * self.stride, min(start + _SLICE, stop) * self.stride)
                yield from self._table_flags(table, span[:: self.stride], cache, indexes)
                yield Progress(start, stop)
        yield from self._write_entries(offset, table, indexes, "l2_update")

    def _table_flags(
        self, table: array[int], span: range, cache: dict[int, Block], changed: list[int]
    ) -> Procedure:
        mask = self.size - 1
        for index in span:
            entry = table[index]
            host = entry & OFFSET
            if not host or entry & PACKED or host & mask:
                continue
            count = yield from self.count_of(host >> self.bits, cache)
            if self._wrong(entry, count, f"OFLAG_COPIED data cluster: l2_entry={entry:x}"):
                table[index] ^= COPIED
                changed.append(index)

    def _wrong(self, entry: int, count: int, what: str) -> bool:
        """Say that a flag is wrong; True when it is to be mended."""
        if (count == 1) == bool(entry & COPIED):
            return False
        alone = count > 1 or self.counts.get((entry & OFFSET) >> self.bits) == 1
        safe = self._alone and count > 0 and alone
        if self.result.uncovered or not (self.all_flags or safe):
            self.result.corruption(f"{what} refcount={count}")
            return False
        self.result.say(f"Repairing {what} refcount={count}")
        self.result.corruptions_fixed += 1
        self.flags_fixed += 1
        return True

    def _write_entries(
        self, place: int, table: array[int], changed: list[int], tag: str
    ) -> Procedure:
        if changed:
            yield from self.begin()
            yield from write_entries(place, table, changed, tag)


def write_entries(place: int, table: array[int], changed: list[int], tag: str) -> Procedure:
    """Write the entries ``changed`` of the L1 or L2 table at ``place``, in whole sectors as far as
    the table has them; entries are never torn."""
    per_sector = _SECTOR // 8
    writes = []
    for sector in sorted({index // per_sector for index in changed}):
        first = sector * per_sector
        data = big_endian_bytes(table, first, min(first + per_sector, len(table)))
        writes.append(MetaWrite(SLOT, place + 8 * first, data, tag))
    if writes:
        yield Write(writes)
        yield Barrier()
