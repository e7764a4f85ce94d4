"""Repairing a VHDX image in the way that loses least.

Blocks that lie over something get a copy of their own: every disk reads as before, and no write
goes to two places any more.  What cannot be kept is said.  The BAT is changed through the log, and
what an entry is to refer to is durable before, so a loss of power leaves the image as damaged as it
was or less.
"""

from __future__ import annotations

from array import array

from ...contract import (
    Barrier,
    HostRange,
    MetaWrite,
    Procedure,
    Progress,
    Punch,
    Read,
    Truncate,
    Write,
)
from ...hints import TYPE_CHECKING
from ...ondisk import little_endian_array, little_endian_bytes
from ...units import align_up
from .checking import Checker
from .claims import LIMIT
from .core import FULL, OFFSET, PARTIAL, SB_PRESENT, STATE
from .edit import shorten
from .log import SECTOR, Change
from .structures import MIB, REGION_TABLES, SLOT

if TYPE_CHECKING:
    from .format import Vhdx

_PUNCHES = 512


class Repairer(Checker):
    """A check that mends what it finds; ``everything``: not only leaks."""

    def __init__(self, image: Vhdx, everything: bool) -> None:
        super().__init__(image)
        self.everything = everything
        self.mended = 0
        self.end = 0
        """Where the file ends now, in bytes; what was found in it ended at ``length``."""

    def run(self) -> Procedure:
        """Look first, then look again and mend; returns the CheckResult."""
        first = Checker(self.image)
        result = yield from first.run()
        damaged = bool(result.corruptions)
        if not damaged and first.claims.dense and not result.leaks and not first.stale:
            return result
        yield from self.image.announce()
        if self.everything:
            yield from self._lengthen(first)
            yield from super().run()
            result = self.result
            result.corruptions += first.cut_off - self.mended
            result.corruptions_fixed = self.mended
        else:
            self.claims, self.length = first.claims, first.length
            self.result = result
        if not result.corruptions:
            yield from self._give_back()
        return result

    def _lengthen(self, first: Checker) -> Procedure:
        """Blocks that begin in the file and end behind it get the rest: it read as zeroes."""
        self.end = first.length
        if first.wanted_end > first.length:
            yield from self._grow(first.wanted_end)
            self.mended += first.cut_off
            self.result.say(f"The file is lengthened to {self.end:#x} bytes, with zeroes")

    def _grow(self, end: int) -> Procedure:
        self.end = align_up(end, MIB)
        yield Truncate(SLOT, self.end)
        self.image.set_length(self.end)

    # -- structures
    def mend_region_table(self, number: int, good: bytes | None) -> Procedure:
        """The other copy is put over a bad one."""
        if good is not None:
            yield from self.renew_region_table(number, good)
            self.mended += 1

    def renew_region_table(self, number: int, good: bytes) -> Procedure:
        """The same for one that is not up to date."""
        yield Write([MetaWrite(SLOT, REGION_TABLES[number], good)])
        yield Barrier()
        self.result.say(f"Region table {number + 1} is a copy of the other one now")

    # -- entries
    def mend(self, index: int, entry: int) -> Procedure:
        """See the module."""
        self.mended += 1
        if self._block_of(index) >= self.blocks:
            return 0
        state, host = entry & STATE, entry & OFFSET
        name = self._name(index)
        if state not in (FULL, PARTIAL):
            if not host:
                self.result.say(f"{name} is reset: it names no place")
                return 0
            state = FULL
        if state == PARTIAL and not self.has_parent:
            state = FULL
        place = yield from self._place(name, host, self.block, self._needed(index))
        if place is None:
            self.result.say(f"{name} is reset: what it named is lost")
            return 0
        return place | state

    def _place(self, name: str, host: int, size: int, needed: int) -> Procedure:
        """Where the contents at ``host`` are to be from now on; None when they are lost."""
        cut_off = self.cut_off
        if not self._place_problem(host, size, needed):
            return host
        if self.cut_off > cut_off:  # what else is wrong with the entry has hidden it
            yield from self._grow(max(self.end, host + size))
            return host
        if host >= self.length or host + size > LIMIT * MIB:
            return None
        new = yield from self._new_space(size)
        yield from self._copy(host, new, size)
        self.result.say(f"{name} has a copy of its own at {new:#x}")
        return new

    def _new_space(self, size: int) -> Procedure:
        """Space at the end of the file that reads as zeroes."""
        new = align_up(self.end, MIB)
        if not self.claims.add(new // MIB, size // MIB):
            raise AssertionError("the end of the file is in use")
        yield from self._grow(new + size)
        if not self.image.options.get("zero_beyond_end", True):
            for at in range(new, new + size, MIB):
                yield Write([MetaWrite(SLOT, at, bytes(MIB))])
        return new

    def _copy(self, host: int, new: int, size: int) -> Procedure:
        """Copy a block; what lies on a structure was never the guest's."""
        for at in range(0, size, MIB):
            if self.image.overlaps(host + at, MIB):
                continue
            (raw,) = yield Read(SLOT, [(host + at, MIB)])
            if raw.count(0) != len(raw):
                yield Write([MetaWrite(SLOT, new + at, raw)])
            yield Progress(at, size)

    def mend_bitmap(self, index: int, entry: int) -> Procedure:
        """A bitmap that is needed is kept, or made of what the blocks hold."""
        self.mended += 1
        if not self.partial:
            self.result.say(f"{self._name(index)} is reset: no block needs it")
            return 0
        if entry & STATE == SB_PRESENT:
            place = yield from self._place(self._name(index), entry & OFFSET, MIB, MIB)
            if place is not None:
                return place | SB_PRESENT
        return (yield from self._new_bitmap(index)) | SB_PRESENT

    def _new_bitmap(self, index: int) -> Procedure:
        """A bitmap in which the sectors that hold something are present.

        A new block reads as zeroes until it is written to, so this is wrong only for sectors that
        were overwritten with zeroes.
        """
        sector = self.image.sector_size
        nothing = bytes(sector)
        bits = bytearray(MIB)
        per_block = self.block // sector
        for number, (payload, host) in enumerate(self.partial):
            base = payload % (self.ratio + 1) * per_block
            for at in range(0, self.block, MIB):
                (raw,) = yield Read(SLOT, [(host + at, MIB)])
                if raw.count(0) == len(raw):
                    continue
                for inside in range(0, MIB, sector):
                    if raw[inside : inside + sector] != nothing:
                        bit = base + (at + inside) // sector
                        bits[bit >> 3] |= 1 << (bit & 7)
            yield Progress(number, len(self.partial))
        new: int = yield from self._new_space(MIB)
        yield Write([MetaWrite(SLOT, new, bytes(bits))])
        self.result.say(
            f"{self._name(index)} is made anew at {new:#x}: in {len(self.partial)} blocks the "
            "sectors that are not zero are present, the others are the parent's"
        )
        return new

    def store(self, first: int, entries: array[int]) -> Procedure:
        """Log a sector of the BAT, once what it refers to is durable."""
        at = self.image.bat.offset + first * 8
        base = at - at % SECTOR
        (raw,) = yield Read(SLOT, [(base, SECTOR)])
        sector = little_endian_array(64, raw)
        sector[(at - base) // 8 : (at - base) // 8 + len(entries)] = entries
        yield Barrier()
        change = Change(base, SECTOR, little_endian_bytes(sector))
        yield from self.image.logged([change], self.end)

    # -- leaks
    def _give_back(self) -> Procedure:
        """Cut off what is leaked; punch what is free between blocks."""
        result = self.result
        end = self.claims.end * MIB
        if result.leaks:
            yield from shorten(self.image, end)
            result.leaks_fixed, result.leaks = result.leaks, 0
        holes: list[HostRange] = []
        for start, length in self.claims.gaps(self.claims.end):
            holes.append(HostRange(SLOT, start * MIB, length * MIB))
            if len(holes) >= _PUNCHES:
                yield Punch(holes)
                holes = []
        if holes:
            yield Punch(holes)


def repair(image: Vhdx, fix: str) -> Procedure:
    """Check the image and mend it; ``fix`` is ``leaks`` or ``all``.  Returns a CheckResult."""
    return (yield from Repairer(image, fix == "all").run())
