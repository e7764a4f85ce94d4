"""The undo file of a repair, as docs/undo-file.md has it: bytes in, records out.

All numbers are little-endian.  Nothing in it is believed before its digest was compared, and even
then every number is bounded.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from ..errors import ImageError, UnsupportedFeature
from ..ondisk import Fields
from ..records import NamedTuple

MAGIC = b"DWUNDO\r\n"
VERSION = 1
SECTOR = 512
WINDOW = 1 << 20
"""A record lies within one window of so many bytes."""
DIGEST = 16
"""Bytes of a sector's digest."""

HEAD = Fields("<", "magic:8s version:I files:I table_bytes:Q")
FILE = Fields("<", "before:Q shortest:Q longest:Q name_bytes:I")
RECORD = Fields("<", "mark:4s file:I sector:Q sectors:I flags:I versions:I old_bytes:I")
STATE = Fields("<", f"sector:I digest:{DIGEST}s")
END = Fields("<", "mark:4s files:I records:Q")
_MARK, _END_MARK = b"SECT", b"DONE"
_MAY_BE_ZERO = 1

_MOST_FILES = 1 << 16
_MOST_TABLE = 64 << 20
_MOST_NAME = 65535
MOST_VERSIONS = 1 << 20
"""Digests in one record."""
_MOST_SECTORS = WINDOW // SECTOR
_MOST_BYTES = 1 << 63


class FileState(NamedTuple):
    """One file of the image: its length before the repair, and the shortest and longest that it
    had at any moment of it (bytes).  The first one is the image's own; the others are named
    relative to it."""

    name: str
    before: int
    shortest: int
    longest: int


class Record(NamedTuple):
    """Sectors that the repair wrote to: [sector, sector + sectors) of the file with this number.

    ``old`` holds their bytes before (none: zeroes; it ends where the file did), ``versions`` the
    digest of each state that a sector was given, as (sector, digest).  With ``may_be_zero`` any
    of them may also read as zeroes.
    """

    file: int
    sector: int
    sectors: int
    may_be_zero: bool
    old: bytes
    versions: list[tuple[int, bytes]]


def sector_digest(data: bytes | bytearray | memoryview) -> bytes:
    """The digest of one state of a sector."""
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


class Rest:
    """The digest of all that a repair leaves alone: the windows that are not zeroes, each with its
    offset and with zeroes in place of the sectors that are in a record."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, offset: int, window: bytes | bytearray) -> None:
        """The window at ``offset``."""
        if window.count(0) != len(window):
            self._hash.update(struct.pack("<Q", offset))
            self._hash.update(window)

    def digest(self) -> bytes:
        """Of all windows that were added and are not all zeroes."""
        return self._hash.digest()


class Writer:
    """Writes an undo file into ``out``; ``size`` is how long it is."""

    def __init__(self, out: BinaryIO, files: list[FileState]) -> None:
        self._out = out
        self._hash = hashlib.sha256()
        self._records = 0
        self.size = 0
        table = b"".join(
            FILE.pack(f.before, f.shortest, f.longest, len(name)) + name
            for f in files
            for name in (os.fsencode(f.name),)
        )
        self._put(HEAD.pack(MAGIC, VERSION, len(files), len(table)) + table)

    def _put(self, data: bytes) -> None:
        self._hash.update(data)
        self._out.write(data)
        self.size += len(data)

    def add(self, record: Record) -> None:
        """Records are added in the order of files and sectors."""
        old = b"" if record.old.count(0) == len(record.old) else record.old
        self._put(
            RECORD.pack(
                _MARK,
                record.file,
                record.sector,
                record.sectors,
                _MAY_BE_ZERO if record.may_be_zero else 0,
                len(record.versions),
                len(old),
            )
        )
        self._put(old)
        self._put(b"".join(STATE.pack(at - record.sector, d) for at, d in record.versions))
        self._records += 1

    def end(self, rests: list[bytes]) -> None:
        """The digests of the rest of each file."""
        self._put(END.pack(_END_MARK, len(rests), self._records) + b"".join(rests))
        self._out.write(self._hash.digest())
        self.size += 32


class Reader:
    """An undo file that was read; ``name`` is what messages call it.

    Raises ImageError for one that is not whole, UnsupportedFeature for another version.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name = file, name
        length = file.seek(0, os.SEEK_END)
        least = HEAD.size + END.size + 32
        head = self._at(0, HEAD.size) if length >= least else b""
        if head[:8] != MAGIC:
            raise self._bad("is no undo file", "magic", 0)
        _, version, count, table = HEAD.unpack(head)
        if version != VERSION:
            raise UnsupportedFeature(f"undo files of version {version}", file=name, offset=8)
        if not 0 < count <= _MOST_FILES:
            raise self._bad(f"has {count} files", "files", 12)
        if table > min(_MOST_TABLE, length - least):
            raise self._bad("is cut off, or its table of files is too large", "table", 16)
        self._end = length - 32
        self._digest()
        self.files = self._table(count, self._at(HEAD.size, table))
        self._start = HEAD.size + table
        end = self._end - END.size - 32 * count
        if end < self._start:
            raise self._bad("has no end", "end", self._start)
        mark, files, self._records = END.unpack(self._at(end, END.size))
        if mark != _END_MARK or files != count:
            raise self._bad("has no end", "end", end)
        self.rests = [self._at(end + END.size + 32 * i, 32) for i in range(count)]
        self._stop = end

    def _bad(self, text: str, field: str, offset: int) -> ImageError:
        return ImageError(text, file=self.name, field=field, offset=offset)

    def _at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(length)
        if len(data) != length:
            raise self._bad("is cut off", "length", offset)
        return data

    def _digest(self) -> None:
        found = hashlib.sha256()
        for at in range(0, self._end, WINDOW):
            found.update(self._at(at, min(WINDOW, self._end - at)))
        if found.digest() != self._at(self._end, 32):
            raise self._bad("is damaged: its digest is another one", "digest", self._end)

    def _table(self, count: int, raw: bytes) -> list[FileState]:
        files: list[FileState] = []
        at = 0
        for _ in range(count):
            if len(raw) - at < FILE.size:
                raise self._bad("has a table of files that is too short", "table", at)
            before, shortest, longest, length = FILE.unpack_from(raw, at)
            at += FILE.size
            if length > min(_MOST_NAME, len(raw) - at):
                raise self._bad("has a name that is too long", "name", HEAD.size + at)
            if not shortest <= before <= longest < _MOST_BYTES:
                raise self._bad("has lengths that contradict", "length", HEAD.size + at)
            name = os.fsdecode(raw[at : at + length])
            if "\0" in name:
                raise self._bad("has a name with a null byte", "name", HEAD.size + at)
            files.append(FileState(name, before, shortest, longest))
            at += length
        return files

    def records(self) -> Iterator[Record]:
        """All records in their order; ImageError for what contradicts."""
        at, found, last = self._start, 0, (-1, 0)
        while at < self._stop:
            if self._stop - at < RECORD.size:
                raise self._bad("has a record that is cut off", "record", at)
            mark, file, sector, count, flags, versions, size = RECORD.unpack(
                self._at(at, RECORD.size)
            )
            if mark != _MARK or file >= len(self.files):
                raise self._bad("has a record of nothing", "record", at)
            state = self.files[file]
            start, length = sector * SECTOR, count * SECTOR
            inside = max(min(state.before - start, length), 0)
            if (
                not 0 < count <= _MOST_SECTORS
                or start % WINDOW + length > WINDOW
                or start >= state.longest
                or (file, sector) < last
                or size not in (0, inside)
                or versions > MOST_VERSIONS
                or at + RECORD.size + size + versions * STATE.size > self._stop
            ):
                raise self._bad("has a record that cannot be", "record", at)
            old = self._at(at + RECORD.size, size)
            raw = self._at(at + RECORD.size + size, versions * STATE.size)
            pairs = [(sector + index, digest) for index, digest in STATE.iter_unpack(raw)]
            if any(not sector <= place < sector + count for place, _ in pairs):
                raise self._bad("has a record that cannot be", "versions", at)
            yield Record(file, sector, count, bool(flags & _MAY_BE_ZERO), old, pairs)
            at += RECORD.size + size + len(raw)
            last = (file, sector + count)
            found += 1
        if found != self._records:
            raise self._bad(f"has {found} records, not {self._records}", "end", self._stop)
