"""Checking a VHDX image: does everything lie in the file, and nothing over anything else?

A log that can be replayed is no finding: what is checked is the image with the log in it.  What
the sector bitmap says of a block that is present as a whole counts for nothing and is not looked
at.  Space between blocks to which nothing refers is no leak: nothing in a VHDX file says what is
free, so writers find that out from the table, and some leave gaps on purpose.  What is leaked is
what lies behind everything that is in use, once it has room for a block.
"""

from __future__ import annotations

from array import array

from ...contract import Length, Procedure, Progress, Read
from ...errors import MalformedImage
from ...findings import CheckResult
from ...hints import TYPE_CHECKING
from ...ondisk import little_endian_array
from .claims import LIMIT, Claims
from .core import OFFSET, PARTIAL, SB_PRESENT, STATE, UNMAPPED_095
from .structures import (
    BAT_REGION,
    HEADER_BYTES,
    HEADERS,
    METADATA_REGION,
    MIB,
    REGION_TABLE_BYTES,
    REGION_TABLES,
    SLOT,
    guid_text,
    parse_header,
    parse_regions,
)

if TYPE_CHECKING:
    from .format import Vhdx

_SLICE = 1 << 20  # bytes of the BAT that are read at once
_SECTOR = 4096
_RESERVED = MIB - 1 - STATE
_NO_STATE = 4
_EMPTY = bytes(_SECTOR)
_NAMES = {BAT_REGION: "BAT region", METADATA_REGION: "metadata region"}


class Checker:
    """One check of an image on disk, with nothing dirty.  A repair overrides `mend`."""

    def __init__(self, image: Vhdx) -> None:
        self.image = image
        self.result = CheckResult()
        self.claims = Claims()
        self.length = 0
        self.block = image.block_size
        self.ratio = 1 << image.ratio_bits
        self.blocks = image.blocks
        self.has_parent = image.differencing
        self.total = image.entries_for(image.blocks)
        """Entries of the BAT."""
        self.partial: list[tuple[int, int]] = []
        """(BAT index, place) of the partially present blocks of the chunk that is being walked."""
        self.stale = 0
        """Headers and region tables that a loss of power left behind: no damage."""
        self.cut_off = 0
        """Findings that would be none if the file were ``wanted_end`` bytes long."""
        self.wanted_end = 0
        """How long the file would be if no block that begins in it were cut off."""
        self.kept = False
        """A block without content keeps space."""
        self._follows = -1

    def run(self) -> Procedure:
        """The whole check; returns the CheckResult."""
        self.length = yield Length(SLOT)
        if self.image.overlay is not None:
            self.length = max(self.length, self.image.overlay.last)
        yield from self.check_headers()
        yield from self.check_regions()
        yield from self.check_table()
        self.count_leaks()
        self.result.total_clusters = self.blocks
        self.result.image_end_offset = self.claims.end * MIB
        return self.result

    def read(self, offset: int, length: int) -> Procedure:
        """Bytes of the file, with what a log holds that was not replayed."""
        (raw,) = yield Read(SLOT, [(offset, length)])
        overlay = self.image.overlay
        return raw if overlay is None else overlay.lay(offset, raw)

    # -- what is before the first mebibyte, and the regions
    def check_headers(self) -> Procedure:
        """A header that is not valid is what a loss of power leaves, and no damage."""
        raws = yield Read(SLOT, [(offset, HEADER_BYTES) for offset in HEADERS])
        for slot, raw in enumerate(raws):
            if parse_header(raw, slot) is None:
                self.stale += 1
                self.result.say(f"Header {slot + 1} is not valid; the other one is in force")

    def check_regions(self) -> Procedure:
        """Both copies of the region table, then what they name."""
        tables: list[bytes | None] = []
        for offset in REGION_TABLES:
            raw = yield from self.read(offset, REGION_TABLE_BYTES)
            try:
                parse_regions(raw, offset)
            except MalformedImage:
                tables.append(None)
            else:
                tables.append(raw)
        for number, table in enumerate(tables):
            if table is None:
                self.result.corruption(f"Region table {number + 1} is not valid")
                yield from self.mend_region_table(number, tables[1 - number])
        first, second = tables
        if first is not None and second is not None and first != second:
            self.stale += 1
            self.result.say("The two region tables differ; the first one is in force")
            yield from self.renew_region_table(1, first)
        self.claims.add(0, 1)
        header = self.image.header
        parts = [
            (r.offset, r.length, _NAMES.get(r.kind) or f"region {guid_text(r.kind)}")
            for r in self.image.regions
        ]
        parts.append((header.log_offset, header.log_length, "log"))
        for offset, length, name in parts:
            if offset + length > LIMIT * MIB:
                self.result.corruption(f"The {name} lies behind any sane end, at {offset:#x}")
            elif length and not self.claims.add(offset // MIB, length // MIB):
                self.result.corruption(f"The {name} at {offset:#x} overlaps something else")
            elif offset + length > self.length:
                self.result.corruption(f"The {name} at {offset:#x} ends behind the file")
                self._cut_off(offset + length)

    def mend_region_table(self, number: int, good: bytes | None) -> Procedure:
        """Called for one that is not valid; a check changes nothing."""
        yield from ()

    def renew_region_table(self, number: int, good: bytes) -> Procedure:
        """Called for one that is not up to date; a check changes nothing."""
        yield from ()

    # -- the block allocation table
    def check_table(self) -> Procedure:
        """Every entry, in the order of the table."""
        total = self.total * 8
        for start in range(0, total, _SLICE):
            size = min(_SLICE, total - start)
            raw = yield from self.read(self.image.bat.offset + start, size)
            if raw.count(0) != len(raw):
                yield from self._check_slice(start, raw)
            elif self.partial:
                yield from self._skip_zeroes(start // 8, size // 8)
            yield Progress(start + size, total)
        if self.kept:
            yield from self._claim_kept(total)

    def _claim_kept(self, total: int) -> Procedure:
        """Space that blocks without content keep is theirs, where nothing else claims it."""
        units, most = self.block // MIB, min(self.length, LIMIT * MIB) - self.block
        for start in range(0, total, _SLICE):
            raw = yield from self.read(self.image.bat.offset + start, min(_SLICE, total - start))
            if raw.count(0) == len(raw):
                continue
            for at in range(0, len(raw), _SECTOR):
                entries = little_endian_array(64, raw[at : at + _SECTOR])
                for entry in entries:
                    state, host = entry & STATE, entry & OFFSET
                    if not host or state == 0 or entry & _RESERVED:
                        continue
                    kept = state < _NO_STATE or state == UNMAPPED_095
                    if kept and host <= most and not self.claims.taken(host // MIB, units):
                        self.claims.add(host // MIB, units)
                yield Progress(start + at, total)

    def _check_slice(self, start: int, raw: bytes) -> Procedure:
        for at in range(0, len(raw), _SECTOR):
            part = raw[at : at + _SECTOR]
            first = (start + at) >> 3
            if part == _EMPTY[: len(part)]:
                if self.partial:
                    yield from self._skip_zeroes(first, len(part) // 8)
                continue
            entries = little_endian_array(64, part)
            old = entries[:]
            yield from self._check_entries(first, entries)
            if entries != old:
                yield from self.store(first, entries)
            yield Progress(start + at, self.total * 8)

    def _skip_zeroes(self, first: int, count: int) -> Procedure:
        """Zero entries; the bitmap's among them may be missed by the blocks before it."""
        at = self._next_bitmap(first)
        if at < first + count:
            entries = array("Q", bytes(8))
            yield from self._check_bitmap(at, entries, 0)
            if entries[0]:
                yield from self.store(at, entries)

    def _next_bitmap(self, index: int) -> int:
        """The first entry of a sector bitmap at or behind ``index``."""
        return index - index % (self.ratio + 1) + self.ratio

    def _check_entries(self, first: int, entries: array[int]) -> Procedure:
        bitmap = self._next_bitmap(first)
        at, count = 0, len(entries)
        while at < count:
            if first + at == bitmap:
                yield from self._check_bitmap(bitmap, entries, at)
                bitmap += self.ratio + 1
                at += 1
                continue
            entry = entries[at]
            if not entry:
                at += 1
                continue
            stop = min(count, bitmap - first)
            run = self._claim_run(entries, at, stop, first)
            if run:
                at += run
                continue
            problem = self._problem(first + at, entry)
            if problem:
                self.result.corruption(f"{self._name(first + at)}: {problem}")
                new = yield from self.mend(first + at, entry)
                entries[at] = entry = new
            if entry & STATE == PARTIAL:
                self.partial.append((first + at, entry & OFFSET))
            at += 1

    def _claim_run(self, entries: array[int], at: int, stop: int, first: int) -> int:
        """Claim blocks that are in order, as many as follow each other in the file; their
        number."""
        entry = entries[at]
        state = entry & STATE
        if entry & _RESERVED or self._block_of(first + at) >= self.blocks:
            return 0
        if state < _NO_STATE or state == UNMAPPED_095:
            self.kept |= bool(state and entry & OFFSET)
            return 1
        if state == _NO_STATE or (state == PARTIAL and not self.has_parent):
            return 0
        block = self.block
        last = min(at + self.blocks - self._block_of(first + at), stop)
        run = at + 1
        while run < last and entries[run] == entry + (run - at) * block:
            run += 1
        run -= at
        host = entry - state
        room = (self.length - host) // block
        if room < run:
            run = max(room, 0)
        if not run or host + run * block > LIMIT * MIB:
            return 0
        unit, units = host // MIB, block // MIB
        if run > 1 and self.claims.taken(unit, run * units):
            run = 1
        if self.claims.taken(unit, run * units):
            return 0
        self.claims.add(unit, run * units)
        result = self.result
        result.allocated_clusters += run
        result.fragmented_clusters += self._follows not in (-1, host)
        self._follows = host + run * block
        if state == PARTIAL:
            self.partial += [(first + at + n, host + n * block) for n in range(run)]
        return run

    def _block_of(self, index: int) -> int:
        """The block whose entry it is."""
        return index - index // (self.ratio + 1)

    def _name(self, index: int) -> str:
        if index % (self.ratio + 1) == self.ratio:
            return f"BAT entry {index} (sector bitmap {index // (self.ratio + 1)})"
        return f"BAT entry {index} (block {self._block_of(index)})"

    def _problem(self, index: int, entry: int) -> str:
        """What is wrong with the entry of a block, and claims its space if nothing is."""
        state, host = entry & STATE, entry & OFFSET
        if entry & _RESERVED:
            return f"reserved bits are set ({entry:#x})"
        if self._block_of(index) >= self.blocks:
            return "is behind the end of the disk" if state > _NO_STATE else ""
        if state == _NO_STATE or (state == PARTIAL and not self.has_parent):
            return f"state {state} is not valid here"
        problem = self._place_problem(host, self.block, self._needed(index))
        self.result.allocated_clusters += not problem
        return problem

    def _needed(self, index: int) -> int:
        """Bytes of a block that must be in the file: of the last one of a disk, some writers leave
        out what is behind the disk's end."""
        return min(self.block, self.image.size - self._block_of(index) * self.block)

    def _place_problem(self, host: int, size: int, needed: int) -> str:
        if host + size > LIMIT * MIB or host >= self.length:
            return f"offset {host:#x} is behind the end of the file"
        if self.claims.taken(host // MIB, size // MIB):
            return f"{size:#x} bytes at {host:#x} overlap something else"
        if host + needed > self.length:
            self._cut_off(host + size)
            self.claims.add(host // MIB, size // MIB)
            return f"{size:#x} bytes at {host:#x} end behind the file"
        self.claims.add(host // MIB, size // MIB)
        return ""

    def _cut_off(self, end: int) -> None:
        self.cut_off += 1
        self.wanted_end = max(self.wanted_end, end)

    def _check_bitmap(self, index: int, entries: array[int], at: int) -> Procedure:
        """The entry of a sector bitmap, behind those of its chunk."""
        entry = entries[at]
        problem = self._bitmap_problem(entry)
        if problem:
            self.result.corruption(f"{self._name(index)}: {problem}")
            entries[at] = yield from self.mend_bitmap(index, entry)
        self.partial = []

    def _bitmap_problem(self, entry: int) -> str:
        state, host = entry & STATE, entry & OFFSET
        if not self.has_parent:
            return "a bitmap in an image without parent" if state else ""
        if not entry & (STATE | _RESERVED):
            if self.partial:
                return f"missing, and {len(self.partial)} blocks are partially present"
            return ""
        if entry & _RESERVED:
            return f"reserved bits are set ({entry:#x})"
        if state != SB_PRESENT:
            return f"state {state} is not valid here"
        return self._place_problem(host, MIB, MIB)

    def mend(self, index: int, entry: int) -> Procedure:
        """What to put in the place of a block's entry with which something is wrong."""
        yield from ()
        return entry

    def mend_bitmap(self, index: int, entry: int) -> Procedure:
        """The same of a sector bitmap's."""
        yield from ()
        return entry

    def store(self, first: int, entries: array[int]) -> Procedure:
        """Entries that were mended go to the disk."""
        yield from ()

    # -- leaks
    def count_leaks(self) -> None:
        """Count the mebibytes behind everything that is in use, where they are a block or more."""
        start, end = self.claims.end, -(-self.length // MIB)
        if (end - start) * MIB >= self.block:
            self.result.leaks += end - start
            self.result.say(f"Leaked {end - start} MiB at {start * MIB:#x}")


def check(image: Vhdx) -> Procedure:
    """Check the image on disk (with nothing dirty); returns a CheckResult."""
    return (yield from Checker(image).run())
