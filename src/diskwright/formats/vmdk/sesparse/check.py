"""Checking a seSparse extent: do free bitmap and reverse map say what the tables say?"""

from __future__ import annotations

from array import array

from ....contract import Barrier, MetaWrite, Procedure, Progress, Read, Write
from ....errors import CorruptImage
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array
from .header import (
    ENTRIES,
    FREE_TABLE_AT,
    GRAIN,
    GRAIN_SECTORS,
    TABLE_BYTES,
    why_not_written,
)
from .map import TABLE_LOAD, UNMAPPED, grain_of
from .space import BITS, LOAD, PLACES, SLICE, UPDATE

if TYPE_CHECKING:
    from .part import SesparsePart

_MOST_WRITES = 4096
_AT_ONCE = 64  # slices of the bitmap
_NONE = bytes(SLICE)


class SesparseCheck:
    """One check; ``used`` has the grains that tables refer to, as slices of a bitmap (a bit for
    each 4 KiB of data: 32 MiB per TiB)."""

    def __init__(self, part: SesparsePart, result: CheckResult, fix: str) -> None:
        self.part = part
        self.result = result
        # Regions that overlap are not repaired: one would be written over the other.
        self.fix = "" if why_not_written(part.header) else fix
        self.used: dict[int, bytearray] = {}
        self.places: dict[int, int] = {}
        self.writes: list[MetaWrite] = []
        self.changed = False
        self.grains = self.wrong = 0
        """Grains in use, and how many of them the reverse map or the bitmap does not confirm."""
        self.limit = part.header.grain_count

    @property
    def understood(self) -> bool:
        """Most grains are in both maps what we take these to say; without any in use, most are free
        in the bitmap."""
        if not self.grains:
            return 4 * self.result.leaks < self.limit
        return 4 * self.wrong < self.grains

    def run(self) -> Procedure:
        """The whole check."""
        part, result = self.part, self.result
        if part.refuse_write is not None:
            result.say(f"The extent is not written: {part.refuse_write}")
        result.total_clusters += -(-part.header.capacity // GRAIN_SECTORS)
        yield from self._walk()
        yield from self._check_free_table()
        yield from self._compare()
        yield from self._write()
        if self.changed:
            part.image.tables.clear()
            part.space.cursor = 0
            if part.image.writable:
                yield from part.compare()

    # -- the tables
    def _walk(self) -> Procedure:
        part, result = self.part, self.result
        count = len(part.directory)
        end = part.header.grains.start
        for number in range(count):
            if number % 1024 == 0:
                yield Progress(number, count)
            try:
                place = part.table_at(number)
            except CorruptImage as error:
                result.corruption(str(error))
                continue
            if not place:
                continue
            if place in self.places:
                result.corruption(
                    f"grain directory entries {self.places[place]} and {number} name the same table"
                )
                continue
            self.places[place] = number
            (raw,) = yield Read(part.slot, [(place, TABLE_BYTES)], TABLE_LOAD)
            found = self._walk_table(number, little_endian_array(64, raw), place)
            if found:
                end = max(end, part.header.grains.start + (max(found) + 1) * GRAIN)
                yield from self._check_owners(found)
            yield Progress(number, count)
        result.image_end_offset = max(result.image_end_offset, min(end, part.file_end))

    def _walk_table(self, number: int, entries: array[int], place: int) -> dict[int, int]:
        """Note the grains of a table; returns the guest grains of those in use."""
        part, result = self.part, self.result
        last = -(-part.header.capacity // GRAIN_SECTORS) - number * ENTRIES
        before = -2
        out: dict[int, int] = {}
        for index, entry in enumerate(entries[:last]):
            if not entry:
                continue
            try:
                host = part.host_of(entry, place, index)
            except CorruptImage as error:
                result.corruption(str(error))
                continue
            guest = number * ENTRIES + index
            if host < 0:
                # Such an entry may still hold the grain that it had.
                held = grain_of(entry & (1 << 60) - 1)
                if entry >> 60 == UNMAPPED and 0 < held < self.limit:
                    self._note(held)
                continue
            grain = grain_of(entry)
            result.allocated_clusters += 1
            result.fragmented_clusters += grain != before + 1 and before >= 0
            before = grain
            if grain >= self.limit:
                result.corruption(f"grain {grain} is beyond what the free bitmap describes")
            elif self._note(grain):
                out[grain] = guest
            else:
                result.corruption(f"grain {grain} of the file is used twice, also by {guest}")
        return out

    def _note(self, grain: int) -> bool:
        """Mark a grain as used; False when it is already."""
        number, bit = divmod(grain, BITS)
        used = self.used.get(number)
        if used is None:
            used = self.used[number] = bytearray(SLICE)
        mask = 1 << (bit & 7)
        if used[bit >> 3] & mask:
            return False
        used[bit >> 3] |= mask
        return True

    def _check_owners(self, found: dict[int, int]) -> Procedure:
        """The reverse map leads back to the guest grains (``found``: by grain of the file)."""
        part = self.part
        start = part.header.backmap.start
        groups = sorted({grain // PLACES for grain in found})
        raws = yield Read(part.slot, [(start + g * SLICE, SLICE) for g in groups], LOAD)
        maps = {g: little_endian_array(64, r) for g, r in zip(groups, raws, strict=True)}
        wrong = [g for g, guest in found.items() if maps[g // PLACES][g % PLACES] != guest]
        self.grains += len(found)
        self.wrong += len(wrong)
        if not wrong:
            return
        self.result.corruptions += len(wrong)
        self.result.say(
            f"ERROR the reverse map is wrong for {len(wrong)} grains from {min(wrong)} on"
        )
        if self.fix == "all":
            self.result.corruptions_fixed += len(wrong)
            for grain in wrong:
                raw = found[grain].to_bytes(8, "little")
                self.writes.append(MetaWrite(part.slot, start + grain * 8, raw, UPDATE))
            if len(self.writes) > _MOST_WRITES:
                yield from self._write()

    def _check_free_table(self) -> Procedure:
        """The header's next free table is behind all that are in use."""
        part = self.part
        start = part.header.tables.start
        needed = max(((p - start) // TABLE_BYTES + 1 for p in self.places), default=0)
        if part.free_table < needed:
            self.result.corruption(
                f"the next free grain table is said to be number {part.free_table}, {needed} are "
                "in use"
            )
            if self.fix == "all":
                at = part.header.volatile.start + FREE_TABLE_AT
                raw = needed.to_bytes(8, "little")
                self.writes.append(MetaWrite(part.slot, at, raw, "header_update"))
                self.result.corruptions_fixed += 1
                part.free_table = needed
        yield Progress(0, 1)

    # -- the free bitmap
    def _compare(self) -> Procedure:
        """Compare every slice of the bitmap with the grains that are in use."""
        part, header = self.part, self.part.header
        slices = -(-self.limit // BITS)
        for first in range(0, slices, _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, slices))
            at = header.bitmap.start + first * SLICE
            (piece,) = yield Read(part.slot, [(at, len(numbers) * SLICE)], LOAD)
            yield Progress(first, slices)
            if not piece.strip(b"\0") and self.used.keys().isdisjoint(numbers):
                continue
            for number in numbers:
                raw = piece[(number - first) * SLICE : (number - first + 1) * SLICE]
                used = self.used.get(number, _NONE)
                if raw != used:
                    self._compare_bits(number, raw, used)
            if len(self.writes) > _MOST_WRITES:
                yield from self._write()

    def _compare_bits(self, number: int, bits: bytes, used: bytes | bytearray) -> None:
        result = self.result
        first = number * BITS
        last = min(self.limit - first, BITS)
        had, wanted = int.from_bytes(bits, "little"), int.from_bytes(used, "little")
        mask = (1 << last) - 1
        lacking, leaked = wanted & ~had & mask, had & ~wanted & mask
        self.wrong += lacking.bit_count()
        if lacking:
            result.corruptions += lacking.bit_count()
            result.say(
                f"ERROR {lacking.bit_count()} grains from {_first(lacking) + first} on are in use "
                "and marked as free"
            )
        if leaked:
            result.leaks += leaked.bit_count()
            result.say(f"Leaked {leaked.bit_count()} grains from {_first(leaked) + first} on")
        new = had
        if lacking and self.fix == "all":
            new |= lacking
            result.corruptions_fixed += lacking.bit_count()
        if leaked and self.fix:
            new &= ~leaked
            result.leaks_fixed += leaked.bit_count()
        if new != had:
            at = self.part.header.bitmap.start + number * SLICE
            raw = new.to_bytes(SLICE, "little")
            self.writes.append(MetaWrite(self.part.slot, at, raw, UPDATE))

    def _write(self) -> Procedure:
        """Carry repairs out."""
        if self.writes:
            yield Write(self.writes)
            yield Barrier()
            self.writes = []
            self.changed = True


def _first(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def check_sesparse(part: SesparsePart, result: CheckResult, fix: str) -> Procedure:
    """Check (and repair) one extent on disk, with nothing dirty; see `Part.check`.

    Repaired are bits, the reverse map and the number of the next free table; entries that name
    nothing, and grains that two entries name, stay findings.  Free bitmap and reverse map are left
    alone unless most of the grains in use are in both what we take them to be: whoever wrote the
    extent may have meant something else by them.
    """
    if fix:
        found = SesparseCheck(part, CheckResult(), "")
        yield from found.run()
        if not found.understood:
            result.say(
                "Nothing is repaired: free bitmap and reverse map do not follow the grain tables, "
                "and may have another meaning here"
            )
            fix = ""
    yield from SesparseCheck(part, result, fix).run()
