"""Reading what is left of a damaged VHDX image.

Headers, region tables and the log are there twice or have checksums, and opening makes the best of
them.  The block allocation table has neither, and a block does not tell where it belongs: what a
lost entry named cannot be put back.  But it can be told that something is missing: contents of the
file that nothing names make every block doubtful that seems to be empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ...bits import Bits
from ...contract import DataRanges, Length, Procedure, Progress, Read
from ...findings import GUESSED, Note
from ...hints import Any
from ...ondisk import little_endian_array
from .core import BITMAP_BLOCK, FULL, OFFSET, PARTIAL, STATE
from .format import Vhdx
from .opening import open_image
from .structures import MIB, SLOT

_LOOK = 1 << 30
_EMPTY = "its block seems to be empty, but the file has contents that nothing names"
_TWICE = "another block of the disk is said to be in the same place"


def open_salvaged(options: Mapping[str, Any]) -> tuple[Salvaged, Procedure]:
    """A format that reads what is left, and the procedure that fills it in."""
    image = Salvaged({**options, "writable": False, "check": True})
    return image, image.survey()


class Salvaged(Vhdx):
    """Read-only."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.remarks: list[str] = []
        """What was found out about the image, as sentences."""
        self._present = Bits(0)
        """Blocks that are in the file."""
        self._twice = Bits(0)
        """Those of them that share their place with another."""
        self._doubtful = False
        """The file has contents that nothing names."""

    def survey(self) -> Procedure:
        """Open the image, and compare what its BAT names with what is in the file."""
        yield from open_image(self)
        length = yield Length(SLOT)
        named, shared = Bits(length // MIB + 1), Bits(length // MIB + 1)
        present = self._present = Bits(self.blocks)
        twice = self._twice = Bits(self.blocks)
        for start, end in self.reserved:
            named.set(start // MIB, -(-min(end, length) // MIB))

        def note(block: int, first: int, stop: int) -> None:
            present.set(block, block + 1)
            if named.any(first, stop):
                shared.set(first, stop)
            named.set(first, stop)

        def note_shared(block: int, first: int, stop: int) -> None:
            if shared.any(first, stop):
                twice.set(block, block + 1)

        yield from self._walk(length, note, named)
        if shared:
            yield from self._walk(length, note_shared, named)
        left = yield from self._unnamed(length, named)
        if left:
            self._doubtful = True
            self.remarks.append(f"{left} MiB of the file have contents and are named by nothing")
        return self

    def _walk(
        self, length: int, visit: Callable[[int, int, int], None], named: Bits
    ) -> Procedure:
        """Call ``visit`` with each block that is there, and with the first MiB of it in the file
        and the end; sector bitmaps are ``named``."""
        chunk = (1 << self.ratio_bits) + 1
        total = 8 * self.entries_for(self.blocks)
        for start in range(0, total, MIB):
            at = self.bat.offset + start
            (raw,) = yield Read(SLOT, [(at, min(MIB, total - start))])
            if self.overlay is not None:
                raw = self.overlay.lay(at, raw)
            for index, entry in enumerate(little_endian_array(64, raw), start // 8):
                host = entry & OFFSET
                if not MIB <= host < length or entry & STATE not in (FULL, PARTIAL):
                    continue
                number, inside = divmod(index, chunk)
                first = host // MIB
                if inside == chunk - 1:
                    named.set(first, first + BITMAP_BLOCK // MIB)
                elif (block := index - number) < self.blocks:
                    visit(block, first, -(-min(host + self.block_size, length) // MIB))
            yield Progress(start, total)

    def _unnamed(self, length: int, named: Bits) -> Procedure:
        """How many MiB have contents and are not ``named``."""
        found = 0
        for offset in range(0, length, _LOOK):
            last = 0
            ranges = yield DataRanges(SLOT, offset, min(_LOOK, length - offset))
            for start, count in ranges:
                for number in range(max(start // MIB, last), -(-(start + count) // MIB)):
                    last = number + 1
                    if named.get(number):
                        continue
                    at = number * MIB
                    try:
                        (data,) = yield Read(SLOT, [(at, min(MIB, length - at))])
                    except OSError:
                        data = b"?"  # whatever it holds, nothing names it
                    found += data.count(0) < len(data)
                    yield Progress(at, length)
        return found

    def notes(self, start: int, length: int) -> Iterator[Note]:
        """What of a range is guessed, in order."""
        bits, end = self.block_bits, start + length
        first, stop = start >> bits, -(-end >> bits)
        said = [(one, other, _TWICE) for one, other in self._twice.runs(first, stop)]
        if self._doubtful:
            at = first
            for one, other in self._present.runs(first, stop):
                said.append((at, one, _EMPTY))
                at = other
            said.append((at, stop, _EMPTY))
        for one, other, why in sorted(said):
            at, to = max(one << bits, start), min(other << bits, end)
            if at < to:
                yield Note(at, to - at, GUESSED, why)
