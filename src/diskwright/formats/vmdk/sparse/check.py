"""Checking a sparse extent, and mending it on the way.

Tables are read from the disk in both copies; a byte for every grain of the file tells which are
referred to.  A file with more grains than `_WINDOW` is gone through several times, so that memory
stays bounded.  What is wrong is mended table by table (see :mod:`.repair`), each change of it safe
by itself, so a repair that is interrupted can be run again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from ....contract import Compute, HostRange, Procedure, Progress, Punch, Read, Truncate
from ....errors import DiskError
from ....findings import CheckResult
from ....hints import TYPE_CHECKING
from ....ondisk import little_endian_array
from ....units import align_up
from .header import SECTOR
from .map import places
from .repair import Mender, read_tables
from .space import Run, Runs

if TYPE_CHECKING:
    from .part import SparsePart

# Grains that one pass keeps count of.
_WINDOW = 64 << 20
# Bytes of tables, and of unreferenced space, read at once.
_BATCH = 256 << 10
_CHUNK = 1 << 20
# Bytes of unreferenced space that are looked at: a file may have terabytes of holes.
_MOST_LOOKED = 4 << 30
# Grains beside the grid of the others that are remembered; more are counted, but not compared.
_MOST_ODD = 1 << 16
_FREE, _USED, _METADATA = 0, 1, 2
_COPIES = ("", "redundant ")
_SHARED = "overlaps another grain"


class Cells:
    """Which grains of [first, first + count) of the file are referred to.

    Cell ``k`` is the ``grain`` sectors from ``phase + k * grain`` on.  A grain beside that grid is
    kept apart: it cannot be where a grain of the grid is.
    """

    def __init__(self, phase: int, grain: int, first: int, count: int, metadata: Runs) -> None:
        self.phase, self.grain = phase, grain
        self.first = first
        self.used = bytearray(count)
        self.odd = Runs()
        for start, end in metadata:
            low, high = self._cells(start, end)
            if low < high:
                self.used[low:high] = bytes([_METADATA]) * (high - low)

    def place(self, cell: int) -> int:
        """The first sector of a cell."""
        return self.phase + (self.first + cell) * self.grain

    def _cells(self, start: int, end: int) -> Run:
        first = (start - self.phase) // self.grain - self.first
        last = -((self.phase - end) // self.grain) - self.first
        return max(first, 0), min(last, len(self.used))

    def take(self, start: int, count: int) -> bool:
        """``count`` grains from sector ``start`` on are referred to; False, and nothing is taken,
        where one of them is already."""
        grain = self.grain
        end = start + count * grain
        first, last = self._cells(start, end)
        if first >= last:
            return True  # another window's
        if (start - self.phase) % grain:
            if any(self.used[first:last]) or self.odd.touches(start, end):
                return False
            if len(self.odd) < _MOST_ODD:
                self.odd.add(start, end)
            return True
        if any(self.used[first:last]) or (len(self.odd) and self.odd.touches(start, end)):
            return False
        self.used[first:last] = bytes([_USED]) * (last - first)
        return True

    def free(self) -> Iterator[Run]:
        """Runs of cells to which nothing refers."""
        at = self.used.find(_FREE)
        while at >= 0:
            end = at + 1
            while end < len(self.used) and not self.used[end]:
                step = self.used[end : end + 4096]
                end += len(step) - len(step.lstrip(b"\0"))
            start = at
            for cell in range(at, end) if len(self.odd) else ():
                if self.odd.touches(self.place(cell), self.place(cell + 1)):
                    if start < cell:
                        yield start, cell
                    start = cell + 1
            if start < end:
                yield start, end
            at = self.used.find(_FREE, end)


class Checker:
    """One check of one extent."""

    metadata: Runs
    cells: Cells | None

    def __init__(self, part: SparsePart, result: CheckResult, fix: str) -> None:
        self.part, self.result = part, result
        writable = part.layout.refuse_write is None
        self.mender = Mender(part) if fix == "all" and writable else None
        self.fix_leaks = fix != "" and writable
        self.before = result.corruptions - result.corruptions_fixed
        self.grains = -(-part.layout.capacity // part.layout.grain)
        self.sectors = part.space.end
        self.allocated = 0
        self.end = 0
        self.window = 0
        self.phase = 0
        self.looked = 0
        self.lost: dict[int, int] = {}
        """Tables (see `places`) that are not where they could be, with their sector."""
        self.name = "" if part.slot == "file" else f" of {part.slot}"

    def run(self) -> Procedure:
        """The whole check."""
        part, result, layout = self.part, self.result, self.part.layout
        if self.fix_leaks:
            part.space.forget()
        if part.unclean and not part.image.ready:
            result.say(f"The extent{self.name} was not closed in order")
        if part.damage is not None:
            result.corruption(part.damage + self.name)
            if self.mender is not None:
                self.mender.replace_directory()
                result.corruptions_fixed += 1
        found = yield Compute(list, (places(part.layout, part.directory, part.copy),))
        self._metadata(found)
        count = self.sectors // layout.grain + 1
        for self.window in range(0, count, _WINDOW):
            self.cells = None
            yield from self._tables()
            if layout.refuse_write is None:
                yield from self._leaks(self.cells or self._new_cells(self.phase))
        free = part.free_written
        if free and free < self.end:
            result.corruption(
                f"The free sector{self.name} {free:#x} is below the end of the grains"
            )
            result.corruptions_fixed += self.mender is not None
        if self.mender is not None:
            yield from self.mender.finish()
        result.total_clusters += self.grains
        result.allocated_clusters += self.allocated
        if self._may_free():
            yield from self._cut()
        result.image_end_offset = max(result.image_end_offset, self.end * SECTOR)
        part.forget()

    def _new_cells(self, phase: int) -> Cells:
        self.phase = phase
        grain = self.part.layout.grain
        count = min(self.sectors // grain + 1 - self.window, _WINDOW)
        self.cells = Cells(phase, grain, self.window, count, self.metadata)
        return self.cells

    def _metadata(self, found: list[tuple[int, int, int]]) -> None:
        """Take all structures that are in their place; the other tables are lost."""
        end = 0
        good: list[Run] = []
        for start, stop, number in found:
            if number < 0 and start >= self.sectors:
                continue
            if number >= 0 and (start < end or stop > self.sectors):
                self.lost[number] = start
                what = "beyond the end of the file" if stop > self.sectors else "inside others"
                self.result.corruption(
                    f"{_COPIES[number & 1]}grain table {number >> 1}{self.name} at sector "
                    f"{start:#x} is {what}"
                )
                continue
            good.append((start, stop))
            end = max(end, stop)
        self.metadata = Runs(good)
        self.end = end

    # -- tables
    def _tables(self) -> Procedure:
        part = self.part
        count = len(part.directory)
        step = max(_BATCH // part.table_bytes, 1)
        blank = bytes(part.table_bytes)
        for start in range(0, count, step):
            batch = range(start, min(start + step, count))
            found = []
            for which in (0, 1):
                sectors = [self._place(index, which) for index in batch]
                raws = iter((yield from read_tables(part, [at for at in sectors if at])))
                found.append([next(raws) if at else None for at in sectors])
            for index, primary, copy in zip(batch, *found, strict=True):
                if primary != blank or primary != copy:
                    yield from self._table(index, primary, copy)
            yield Progress(start, count)

    def _place(self, index: int, which: int) -> int:
        entries = self.part.copy if which else self.part.directory
        if not entries or 2 * index + which in self.lost:
            return 0
        return entries[index]

    def _table(self, index: int, primary: bytes | None, copy: bytes | None) -> Procedure:
        """Check one grain table in both copies."""
        part, mender = self.part, self.mender
        first_pass = not self.window
        lost = [which for which in (0, 1) if 2 * index + which in self.lost]
        problems = len(lost)
        unequal = bool(part.copy) and primary != copy
        if unequal and first_pass and not lost:
            if primary is not None and copy is not None:
                text = f"The copies of grain table {index}{self.name} differ"
            else:
                which = _COPIES[primary is not None]
                text = f"{which}grain table {index}{self.name} is missing"
            if mender is not None and mender.replaced:
                pass  # it has just lost its place
            elif part.unclean:
                self.result.say(text)
            else:
                problems += 1
                self.result.corruption(text)
        raw = primary if primary is not None else copy
        data = None
        bad: list[tuple[int, bool]] = []
        if raw is not None:
            data = little_endian_array(32, raw)
            other = little_endian_array(32, copy) if copy is not None and copy != raw else None
            bad = self._entries(index, data)
            for nth, shared in bad:
                entry = data[nth]
                data[nth] = self._of_copy(other, nth)
                if mender is not None:
                    self.result.corruptions_fixed += 1
                    if shared and not data[nth]:
                        data[nth] = yield from mender.duplicate(entry)
        if mender is None or not (bad or (first_pass and (lost or unequal))):
            return
        for copies in lost:
            (part.copy if copies else part.directory)[index] = 0
        self.result.corruptions_fixed += problems
        yield from mender.table(index, data)

    def _of_copy(self, other: array[int] | None, nth: int) -> int:
        """An entry of the other copy, where it is good; 0 otherwise."""
        if other is None or not self.part.holds_data(other[nth]):
            return 0
        if self._take(other[nth], 1) is not None:
            return 0
        self._took(other[nth], 1)
        return other[nth]

    def _entries(self, index: int, data: array[int]) -> list[tuple[int, bool]]:
        """Count the grains of one table; returns the entries that are wrong, each with whether
        its grain is somebody else's."""
        part = self.part
        grain, per_table = part.layout.grain, part.layout.entries
        limit = min(per_table, self.grains - index * per_table)
        bad: list[tuple[int, bool]] = []
        nth = 0
        while nth < limit:
            entry = data[nth]
            run = 1
            if part.holds_data(entry):
                while nth + run < limit and data[nth + run] == entry + run * grain:
                    run += 1
                if self._take(entry, run) is None:
                    self._took(entry, run)
                else:
                    for i in range(nth, nth + run):
                        problem = self._take(data[i], 1)
                        if problem is None:
                            self._took(data[i], 1)
                        elif not self.window or problem == _SHARED:
                            self.result.corruption(
                                f"grain {index * per_table + i}{self.name} at sector "
                                f"{data[i]:#x} {problem}"
                            )
                            bad.append((i, problem == _SHARED))
            nth += run
        return bad

    def _take(self, entry: int, run: int) -> str | None:
        """``run`` grains from sector ``entry`` on are referred to: what is wrong with that, in
        which case none of them is taken."""
        grain = self.part.layout.grain
        end = entry + run * grain
        if end - grain >= self.sectors:
            return "is beyond the end of the file"
        if self.metadata.touches(entry, end):
            return "is inside metadata"
        cells = self.cells or self._new_cells(self.phase if self.window else entry % grain)
        return None if cells.take(entry, run) else _SHARED

    def _took(self, entry: int, run: int) -> None:
        if not self.window:
            self.allocated += run
            self.end = max(self.end, min(entry + run * self.part.layout.grain, self.sectors))

    # -- space that nothing refers to
    def _leaks(self, cells: Cells) -> Procedure:
        """Grains that nothing refers to and that hold data; what reads as zeroes is no loss."""
        unit = self.part.unit
        step = max(_CHUNK // unit, 1)
        left = 0
        for first, last in cells.free():
            for at in range(first, last, step):
                if self.looked >= _MOST_LOOKED:
                    left += last - at
                    break
                self.looked += min(step, last - at) * unit
                yield from self._leaked(cells, at, min(at + step, last))
                yield Progress(at, len(cells.used))
        if left:
            self.result.uncovered.append(f"{left * unit} bytes{self.name} without references")

    def _leaked(self, cells: Cells, first: int, last: int) -> Procedure:
        unit = self.part.unit
        place = cells.place(first) * SECTOR
        length = min((last - first) * unit, self.sectors * SECTOR - place)
        held: set[int] = set()
        for at in range(0, length, _CHUNK):
            (raw,) = yield Read(self.part.slot, [(place + at, min(_CHUNK, length - at))])
            if raw.strip(b"\0"):
                piece = min(unit, _CHUNK)
                for i in range(0, len(raw), piece):
                    if raw[i : i + piece].strip(b"\0"):
                        held.add((at + i) // unit)
        if not held:
            return
        self.result.leaks += len(held)
        self.result.say(f"{len(held)} leaked grains{self.name} from sector {place // SECTOR:#x} on")
        if self._may_free() and (yield Punch([HostRange(self.part.slot, place, length)])):
            self.result.leaks_fixed += len(held)

    def _may_free(self) -> bool:
        """What nothing refers to may be given back: not while tables are broken, which may be
        what refers to it."""
        result = self.result
        return self.fix_leaks and result.corruptions - result.corruptions_fixed == self.before

    def _cut(self) -> Procedure:
        """Cut off what is behind the last grain, where the file can be cut."""
        space = self.part.space
        end = align_up(space.end if space.end > self.sectors else self.end, space.grain)
        if end >= space.end:
            return
        try:
            yield Truncate(self.part.slot, end * SECTOR)
        except (DiskError, OSError):
            return
        space.end = end


def check(part: SparsePart, result: CheckResult, fix: str) -> Procedure:
    """Check the extent on disk (with nothing dirty); see `Part.check`."""
    yield from Checker(part, result, fix).run()
