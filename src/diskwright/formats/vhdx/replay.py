"""Finding what a log holds, and replaying it: into the file, or into memory (MS-VHDX 2.3.2)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence

from ...codecs.crc32c import crc32c
from ...contract import (
    Barrier,
    HostRange,
    MetaWrite,
    Procedure,
    Punch,
    Read,
    Truncate,
    Write,
)
from ...errors import CorruptImage, UnsupportedFeature
from ...records import NamedTuple
from . import log
from .log import SECTOR, Descriptor, EntryHeader
from .structures import MAX_FILE, MIB, REGION_TABLES, SLOT, Header

_CHUNK = MIB
_MOST_IN_MEMORY = 128 << 20
_MOST_DESCRIPTORS = 1 << 18
# How often the whole log may be summed up to find its entries, and its entries be walked through:
# honest ones are once or twice.
_MOST_TURNS = 8
_MOST_ZEROED = 1 << 30

Change = tuple[int, int, bytes | None]  # (offset, length, data or None for zeroes)


class Overlay:
    """Sectors that a log holds, over a file that must not be touched."""

    def __init__(self) -> None:
        self._sectors: dict[int, bytes] = {}
        self._order: list[int] = []
        self._zero_starts: list[int] = []
        self._zero_ends: list[int] = []
        self.last = 0
        """Length that the file would have at least."""

    @property
    def weight(self) -> int:
        """Bytes in memory."""
        return len(self._sectors) * SECTOR

    def put(self, offset: int, data: bytes) -> None:
        """A sector, over all that came before."""
        if offset not in self._sectors:
            insort(self._order, offset)
        self._sectors[offset] = data

    def zero(self, offset: int, length: int) -> None:
        """A range of zeroes, over all that came before."""
        end = offset + length
        first, last = bisect_left(self._order, offset), bisect_left(self._order, end)
        for sector in self._order[first:last]:
            del self._sectors[sector]
        del self._order[first:last]
        first = bisect_left(self._zero_ends, offset)
        last = bisect_right(self._zero_starts, end)
        if first < last:
            offset = min(offset, self._zero_starts[first])
            end = max(end, self._zero_ends[last - 1])
        self._zero_starts[first:last] = [offset]
        self._zero_ends[first:last] = [end]

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, bytes | None]]:
        """(offset, length, bytes or None for zeroes) of what lies in [start, end), ascending."""
        i = bisect_right(self._zero_ends, start)
        at = start
        for sector in self._order[
            bisect_left(self._order, start - SECTOR + 1) : bisect_left(self._order, end)
        ]:
            a, b = max(sector, start), min(sector + SECTOR, end)
            yield from self._zeroes(at, a)
            yield a, b - a, self._sectors[sector][a - sector : b - sector]
            at = b
        if i < len(self._zero_starts):
            yield from self._zeroes(at, end)

    def _zeroes(self, start: int, end: int) -> Iterator[tuple[int, int, bytes | None]]:
        i = bisect_right(self._zero_ends, start)
        while i < len(self._zero_starts) and self._zero_starts[i] < end:
            a, b = max(self._zero_starts[i], start), min(self._zero_ends[i], end)
            if a < b:
                yield a, b - a, None
            i += 1

    def lay(self, offset: int, data: bytes) -> bytes:
        """``data``, read at ``offset``, as it would be after a replay."""
        out: bytearray | None = None
        for at, length, piece in self.pieces(offset, offset + len(data)):
            if out is None:
                out = bytearray(data)
            out[at - offset : at - offset + length] = bytes(length) if piece is None else piece
        return data if out is None else bytes(out)

    def outside(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """True when something lies outside of all of ``ranges`` ((start, end), ascending)."""
        at = 0
        for start, end in [*ranges, (MAX_FILE, MAX_FILE)]:
            if at < start and next(self.pieces(at, start), None) is not None:
                return True
            at = max(at, end)
        return False


class Entry(NamedTuple):
    """A valid entry at ``at`` (offset in the log)."""

    at: int
    header: EntryHeader


class Log:
    """The log of an image as it is read."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.length = header.log_length
        self._known: dict[int, Entry] = {}
        self._summed = 0
        self._walked = 0

    def corrupt(self, what: str) -> CorruptImage:
        """An error about the whole log."""
        return CorruptImage(what, field="log", offset=self.header.log_offset)

    # -- reading
    def _read(self, at: int, length: int) -> Procedure:
        """Bytes of the ring."""
        at %= self.length
        ranges = [(self.header.log_offset + at, min(length, self.length - at))]
        if ranges[0][1] < length:
            ranges.append((self.header.log_offset, length - ranges[0][1]))
        parts = yield Read(SLOT, ranges)
        return b"".join(parts)

    def _entry(self, at: int, first: bytes) -> Procedure:
        """The valid entry at ``at``, which begins with the sector ``first``; None without one."""
        header = log.parse_entry_header(first, self.header.log_guid, self.length)
        if header is None:
            return None
        self._summed += header.length
        if self._summed > _MOST_TURNS * self.length:
            raise self.corrupt("The entries of the log overlap each other")
        if header.descriptors > _MOST_DESCRIPTORS:
            raise UnsupportedFeature(f"a log entry with {header.descriptors} descriptors")
        head = b""
        total = done = stored = 0
        while done < header.length:
            piece = yield from self._read(at + done, min(_CHUNK, header.length - done))
            head += piece[: max(0, header.descriptor_bytes - done)]
            if not done:
                stored = int.from_bytes(piece[4:8], "little")
                piece = piece[:4] + bytes(4) + piece[8:]
            for inside in range(max(0, header.descriptor_bytes - done), len(piece), SECTOR):
                if not log.sector_of(piece[inside : inside + SECTOR], header.sequence):
                    return None
            total = crc32c(piece, total)
            done += len(piece)
        if total != stored or log.parse_descriptors(head, header) is None:
            return None
        return Entry(at, header)

    # -- the active sequence
    def active(self) -> Procedure:
        """The entries to replay, oldest first: of all sequences that reach their own tail the one
        that ends with the highest number (2.3.2).  Raises CorruptImage without one."""
        for base in range(0, self.length, _CHUNK):
            window = yield from self._read(base, min(_CHUNK, self.length - base))
            for inside in log.entry_starts(window):
                first = window[inside : inside + SECTOR]
                found = yield from self._entry(base + inside, first)
                if found is not None:
                    self._known[base + inside] = found
        newest_first = sorted(self._known.values(), key=lambda e: e.header.sequence, reverse=True)
        for newest in newest_first:
            sequence = self._sequence(newest)
            if sequence:
                return sequence
        raise self.corrupt("The log is in use and holds no valid sequence of entries")

    def _sequence(self, newest: Entry) -> list[Entry]:
        """The entries from the tail that ``newest`` names up to itself; [] when they are not
        there one behind the other."""
        found: list[Entry] = []
        at = newest.header.tail
        left = (newest.at - at) % self.length
        if left + newest.header.length > self.length:
            return []
        while left > 0:
            entry = self._known.get(at)
            self._walked += 1
            if self._walked > _MOST_TURNS * (self.length // SECTOR):
                raise self.corrupt("The entries of the log name each other as their tails")
            if entry is None:
                return []
            found.append(entry)
            left -= entry.header.length
            at = (at + entry.header.length) % self.length
        found.append(newest)
        first = newest.header.sequence - len(found) + 1
        if left < 0 or any(e.header.sequence != first + i for i, e in enumerate(found)):
            return []
        return found

    # -- replaying
    def replay(self, entry: Entry, sink: Callable[[list[Change]], Procedure]) -> Procedure:
        """Hand all that an entry changes to ``sink``, in its order and at most 1 MiB at a time."""
        header = entry.header
        head = yield from self._read(entry.at, header.descriptor_bytes)
        at = entry.at + header.descriptor_bytes
        end = entry.at + header.length
        piece = b""
        batch: list[Change] = []
        for number, found in enumerate(log.parse_descriptors(head, header) or ()):
            self._check_place(entry, number, found)
            if found.lent is None:
                batch.append((found.offset, found.length, None))
                continue
            if not piece:
                if batch:
                    yield from sink(batch)
                    batch = []
                piece = yield from self._read(at, min(_CHUNK, end - at))
                at += len(piece)
            batch.append((found.offset, SECTOR, log.restore(piece[:SECTOR], found)))
            piece = piece[SECTOR:]
        if batch:
            yield from sink(batch)

    def _check_place(self, entry: Entry, number: int, found: Descriptor) -> None:
        """Raise CorruptImage for a change of what is never logged: identifier, headers, log."""
        start, end = found.offset, found.offset + found.length
        ring = self.header.log_offset
        bad = start < REGION_TABLES[0] or end > MAX_FILE
        if bad or (start < ring + self.length and ring < end):
            raise CorruptImage(
                f"descriptor {number} of log entry {entry.header.sequence} writes to {start:#x}",
                field="FileOffset",
                offset=ring + entry.at,
            )


def check_length(entries: Sequence[Entry], length: int, header: Header) -> int:
    """The length that the file must have after the replay.

    Raises CorruptImage when it has lost bytes that were durable when the log was written.
    """
    for entry in entries:
        flushed, last = entry.header.flushed, entry.header.last
        if length < flushed or last > MAX_FILE:
            raise CorruptImage(
                f"The file has {length} bytes, its log asks for {flushed} at least, and {last} "
                "in the end",
                field="FlushedFileOffset",
                offset=header.log_offset + entry.at + 48,
            )
    return max(length, *[entry.header.last for entry in entries])


def replay_in_memory(header: Header, length: int) -> Procedure:
    """An Overlay of what the log of ``header`` holds; nothing is written."""
    ring = Log(header)
    entries = yield from ring.active()
    overlay = Overlay()
    overlay.last = check_length(entries, length, header)

    def sink(batch: list[Change]) -> Procedure:
        for offset, size, data in batch:
            if data is None:
                overlay.zero(offset, size)
            else:
                overlay.put(offset, data)
        if overlay.weight > _MOST_IN_MEMORY:
            raise UnsupportedFeature("a log that holds more than 128 MiB")
        yield from ()

    for entry in entries:
        yield from ring.replay(entry, sink)
    return overlay


def replay_into_file(header: Header, length: int) -> Procedure:
    """Write what the log of ``header`` holds to where it belongs; durable at the end."""
    ring = Log(header)
    entries = yield from ring.active()
    wanted = check_length(entries, length, header)
    if wanted > length:
        yield Truncate(SLOT, wanted)
    held = length  # behind it are zeroes
    zeroed = 0

    def sink(batch: list[Change]) -> Procedure:
        nonlocal held, zeroed
        for offset, size, data in batch:
            if data is not None:
                yield Write([MetaWrite(SLOT, offset, data)])
                held = max(held, offset + size)
                continue
            end = min(offset + size, held)
            zeroed += max(0, end - offset)
            if zeroed > _MOST_TURNS * (length + _MOST_ZEROED):
                raise ring.corrupt("The log zeroes the file again and again")
            if end - offset > _CHUNK and (yield Punch([HostRange(SLOT, offset, end - offset)])):
                continue
            for at in range(offset, end, _CHUNK):
                yield Write([MetaWrite(SLOT, at, bytes(min(_CHUNK, end - at)))])

    for entry in entries:
        yield from ring.replay(entry, sink)
    yield Barrier()
