"""A qcow2 image that is read as far as it can be: entries that cannot be right are taken for lost,
and what is only likely is said to be guessed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

from ....contract import NeedMeta, Procedure, Range, Read, Table
from ....findings import GUESSED, LOST, Note
from ....hints import Any
from ....ondisk import big_endian_array, big_endian_bytes
from ..check.scan import Loose, Run, pieces
from ..image import Image
from ..machine.core import OFFSET, PACKED, SLOT, ZERO_FLAG
from .evidence import Geometry, entry_problem, join, plain
from .marks import Marks, Reasons

_Said = tuple[int, int, str, str]  # number of the entry, count, state, why
_MOST_NOTES = 1 << 20
_FEW = 16 << 20
_SECTOR = 512


def read_some(slot: str, offset: int, length: int) -> Procedure:
    """Read; returns the bytes, with zeroes for sectors that cannot be read, and those sectors."""
    try:
        (data,) = yield Read(slot, [(offset, length)])
        return data, []
    except OSError:
        pass
    out, lost = bytearray(length), []
    for at in range(0, length, _SECTOR):
        try:
            (data,) = yield Read(slot, [(offset + at, min(_SECTOR, length - at))])
            out[at : at + len(data)] = data
        except OSError:
            lost.append(at // _SECTOR)
    return bytes(out), lost


class Salvaged(Image):
    """Read-only.  ``l1`` is what was found; the tables are cleaned when they are loaded."""

    sparse_slots = ("file", "data-file")

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__({**options, "writable": False})
        self.geometry = Geometry(16, 0, 3)
        self.marks = Marks()
        self.remarks: list[str] = []
        """What was found out about the image, as sentences."""
        self.l1_lost = Reasons()
        self.l1_guessed = Reasons()
        self.doubtful = ""
        """Why what reads as unallocated may not be so; "" when it is."""
        self.cut_off = False
        """Something is named behind the end of the file."""
        self.metadata = Marks(_FEW)
        """Clusters of the header, the L1 table and the refcount table, where they are known."""
        self.patched: dict[int, Table] = {}
        """Tables that cannot be read as a whole."""
        self.unread: dict[int, list[int]] = {}
        """Their sectors that cannot be read."""
        self._notes: dict[int, list[_Said]] = {}
        self._noted = 0
        self.tables_at = Marks(_FEW)
        """Clusters of the L2 tables."""

    # -- tables
    def load(self, slot: str, offset: int, data: bytes) -> None:
        """Decode an L2 table, without entries that cannot be right."""
        entries = big_endian_array(64, data)
        self.scrub(offset, entries)
        self.tables.put(slot, offset, entries, self.cluster_size)

    def patch(self, offset: int, data: bytes, unread: list[int]) -> None:
        """Keep a table of which some sectors could not be read."""
        entries = big_endian_array(64, data)
        self.unread[offset] = unread
        self.scrub(offset, entries)
        self.patched[offset] = Table(0, SLOT, offset, entries, self.cluster_size)

    def l2_table(self, offset: int) -> Table | None:
        found = self.patched.get(offset)
        return super().l2_table(offset) if found is None else found

    def _misses(self, ranges: Sequence[Range]) -> NeedMeta:
        found = super()._misses(ranges)
        return found._replace(ranges=[r for r in found.ranges if r[0] not in self.patched])

    def scrub(self, offset: int, entries: array[int]) -> None:
        """Empty the entries that cannot be right, and note them."""
        notes: list[_Said] = []
        stride, total = self.stride, len(entries) // self.stride
        unread = self.unread.get(offset)
        if unread:
            each = 64 // stride
            for sector in unread:
                why = "its part of the L2 table cannot be read"
                _note(notes, sector * each, each, LOST, why)
            self._scrub_part(entries, 0, total, notes, unread)
        else:
            at = 0
            for piece in pieces(big_endian_bytes(entries), self.cluster_size, stride == 2):
                if self.doubtful and piece.at > at:
                    _note(notes, at, piece.at - at, GUESSED, self.doubtful)
                at = piece.at + (piece.length if isinstance(piece, Run) else len(piece.entries))
                if not self._clean(piece):
                    self._scrub_part(entries, piece.at, at, notes, [])
            if self.doubtful and at < total:
                _note(notes, at, total - at, GUESSED, self.doubtful)
        if self._noted + len(notes) > _MOST_NOTES:
            notes = [(0, total, GUESSED, "its L2 table has too many damages to tell them")]
        if notes:
            self._noted += len(notes) - len(self._notes.get(offset, ()))
            self._notes[offset] = notes

    def _clean(self, piece: Run | Loose) -> bool:
        """True when nothing is to be said of these entries."""
        runs, size = array("Q"), self.cluster_size
        if isinstance(piece, Run):
            host = piece.entry & OFFSET
            join(runs, range(host, host + piece.length * size, size), self.cluster_bits)
        else:
            found = plain(piece, self.geometry)
            if found is None or (self.doubtful and found.good < len(found.hosts)):
                return False
            join(runs, found.hosts, self.cluster_bits)
        if self.external:
            return True
        return not any(
            stop > self.geometry.length >> self.cluster_bits
            or self.metadata.any(first, stop)
            or self.tables_at.any(first, stop)
            or self.marks.any_shared(first, stop)
            for first, stop in zip(runs[::2], runs[1::2], strict=True)
        )

    def _scrub_part(
        self, entries: array[int], first: int, end: int, notes: list[_Said], unread: list[int]
    ) -> None:
        """The same for the entries from number ``first`` to ``end``, one by one."""
        stride, bits, length = self.stride, self.cluster_bits, self.geometry.length
        each = 64 // stride
        for index in range(first, end):
            entry = entries[index * stride]
            bitmap = entries[index * stride + 1] if stride == 2 else 0
            if not entry and not bitmap:
                if self.doubtful and index // each not in unread:
                    _note(notes, index, 1, GUESSED, self.doubtful)
                continue
            why = entry_problem(entry, self.geometry, bitmap)
            if why:
                _note(notes, index, 1, LOST, why)
                entries[index * stride : (index + 1) * stride] = array("Q", bytes(8 * stride))
                continue
            host = entry & OFFSET
            if entry & (PACKED | ZERO_FLAG) or not host or self.external:
                continue
            cluster = host >> bits
            if self.metadata.used(cluster) or self.tables_at.used(cluster):
                _note(notes, index, 1, GUESSED, "it lies over metadata")
            elif self.marks.shared(cluster):
                _note(notes, index, 1, GUESSED, "another cluster of the disk names the same place")
            elif self.cut_off and host + self.cluster_size > length:
                _note(notes, index, 1, LOST, "the file ends within it")

    def unmapped(self, offset: int) -> int:
        """Where the next table's range begins from ``offset`` on; ``offset`` itself when it is in
        one."""
        index = offset >> self.l1_shift
        if index < len(self.l1) and self.l1[index]:
            return offset
        while index < len(self.l1) and not self.l1[index]:
            index += 1
        return min(index << self.l1_shift, self.size) if index < len(self.l1) else self.size

    # -- what is known
    def notes(self, start: int, length: int) -> Iterator[Note]:
        """What of a range is lost or guessed, in order; asked once it has been mapped.  A lost part
        of a table whose place is guessed comes with both."""
        end = start + length
        for l1_index in range(start >> self.l1_shift, ((end - 1) >> self.l1_shift) + 1):
            first = l1_index << self.l1_shift
            whole = max(first, start), min(first + (1 << self.l1_shift), end)
            entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
            if not entry:
                why = self.l1_lost.get(l1_index)
                if why:
                    yield _clipped(*whole, start, end, LOST, why)
                elif self.doubtful:
                    yield _clipped(*whole, start, end, GUESSED, self.doubtful)
                continue
            guess = self.l1_guessed.get(l1_index)
            if guess:
                yield _clipped(*whole, start, end, GUESSED, guess)
            for index, count, state, why in self._notes.get(entry & OFFSET, ()):
                at = first + (index << self.cluster_bits)
                stop = at + (count << self.cluster_bits)
                if at < end and stop > start:
                    yield _clipped(at, stop, start, end, state, why)


def _clipped(at: int, stop: int, start: int, end: int, state: str, why: str) -> Note:
    at, stop = max(at, start), min(stop, end)
    return Note(at, stop - at, state, why)


def _note(notes: list[_Said], index: int, count: int, state: str, why: str) -> None:
    """Add a note; one that continues the last one becomes a part of it."""
    if notes:
        first, known, *rest = notes[-1]
        if first + known == index and rest == [state, why]:
            notes[-1] = (first, known + count, state, why)
            return
    notes.append((index, count, state, why))
