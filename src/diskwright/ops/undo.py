"""Keeping the old bytes of what a repair changes, and bringing them back.

The undo file is whole and durable before the first byte of the image changes.  It says what each
sector was and every state that the repair gave it, so an image whose repair (or whose undoing) was
interrupted anywhere is told from one that somebody else has written to since.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import AsyncIterator, Iterator
from typing import Any, BinaryIO

from ..contract import MAY_UNMAP
from ..errors import ImageError
from ..extents import ZERO as ZERO_EXTENT
from ..filters import rehearsal as rh
from ..filters.rehearsal import Entry, Rehearsal, Rehearsed, TooMuch
from ..graph.node import Node
from ..records import NamedTuple
from .undofile import (
    MOST_VERSIONS,
    SECTOR,
    WINDOW,
    FileState,
    Reader,
    Record,
    Rest,
    Writer,
    sector_digest,
)

_WIDE = 64  # windows
_LOOK = 1 << 30
_PER_WINDOW = WINDOW // SECTOR
_NOTHING = bytes(SECTOR)


async def data_windows(node: Node) -> AsyncIterator[int]:
    """The windows of a file that may hold more than zeroes, ascending."""
    last = -1
    for offset in range(0, node.size, _LOOK):
        at = offset
        for extent in await node.extents(offset, min(_LOOK, node.size - offset)):
            if extent.kind != ZERO_EXTENT:
                first, stop = at // WINDOW, -(-(at + extent.length) // WINDOW)
                for window in range(max(first, last + 1), stop):
                    yield window
                    last = window
            at += extent.length


async def _read(node: Node, window: int, end: int) -> bytearray:
    """A window of a file, with zeroes from ``end`` on."""
    data = bytearray(WINDOW)
    known = min(max(end - window * WINDOW, 0), WINDOW)
    if known:
        await node.read([window * WINDOW], [known], [memoryview(data)[:known]])
    return data


class _Changes:
    """The journal of one file by windows."""

    def __init__(self, rehearsal: Rehearsal, file: Rehearsed) -> None:
        self.rehearsal = rehearsal
        self._places: dict[int, array[int]] = {}
        self._wide: list[int] = []
        self._entries: dict[int, Entry] = {}
        for index, entry in enumerate(rehearsal.entries()):
            if entry.file != file.number or entry.kind == rh.FLUSH:
                continue
            if entry.kind == rh.LENGTH:
                if entry.offset >= entry.length:
                    continue  # new space reads as zeroes
                entry = entry._replace(kind=rh.ZERO, length=entry.length - entry.offset)
            self._entries[index] = entry
            first = entry.offset // WINDOW
            last = (entry.offset + entry.length - 1) // WINDOW
            if entry.kind == rh.ZERO and last - first >= _WIDE:
                self._wide.append(index)
                continue
            for window in range(first, last + 1):
                self._places.setdefault(window, array("Q")).append(index)

    def windows(self) -> list[int]:
        """Those that are changed, without what is only zeroed in large pieces."""
        return sorted(self._places)

    def of(self, window: int) -> Iterator[Entry]:
        """What happens in a window, in order."""
        start, end = window * WINDOW, (window + 1) * WINDOW
        wide = [
            index
            for index in self._wide
            if (entry := self._entries[index]).offset < end and entry.offset + entry.length > start
        ]
        for index in sorted([*self._places.get(window, ()), *wide]):
            yield self._entries[index]

    def records(self, window: int, base: bytearray, before: int) -> list[Record]:
        """What the undo file keeps of a window that holds ``base``; the file ends at ``before``."""
        start = window * WINDOW
        now = bytearray(base)
        versions: dict[int, dict[bytes, None]] = {}
        zeroed: set[int] = set()
        for entry in self.of(window):
            first = max(entry.offset - start, 0)
            last = min(entry.offset + entry.length - start, WINDOW)
            if entry.kind == rh.WRITE:
                skip = start + first - entry.offset
                now[first:last] = self.rehearsal.kept(entry.place + skip, last - first)
            else:
                now[first:last] = bytes(last - first)
            for sector in range(first // SECTOR, (last - 1) // SECTOR + 1):
                part = now[sector * SECTOR : (sector + 1) * SECTOR]
                if part == _NOTHING:
                    zeroed.add(sector)
                else:
                    versions.setdefault(sector, {})[sector_digest(part)] = None
        changed = sorted(versions.keys() | {s for s in zeroed if _part(base, s) != _NOTHING})
        found: list[Record] = []
        for begin, stop in _runs(changed):
            old = bytes(base[begin * SECTOR : stop * SECTOR])
            listed = [
                (window * _PER_WINDOW + s, digest)
                for s in range(begin, stop)
                for digest in versions.get(s, ())
            ]
            if len(listed) > MOST_VERSIONS:
                raise TooMuch("the same place would be written too often for an undo file")
            at = start + begin * SECTOR
            inside = max(min(before - at, len(old)), 0)
            sector = window * _PER_WINDOW + begin
            # In space that the repair adds anything may still be missing.
            blank = at + len(old) > before or not zeroed.isdisjoint(range(begin, stop))
            found.append(Record(0, sector, stop - begin, blank, old[:inside], listed))
        return found


def _part(data: bytes | bytearray, sector: int) -> bytes | bytearray:
    return data[sector * SECTOR : (sector + 1) * SECTOR]


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    begin = stop = -1
    for number in numbers:
        if number != stop:
            if stop >= 0:
                yield begin, stop
            begin = number
        stop = number + 1
    if stop >= 0:
        yield begin, stop


def _mask(data: bytearray, record: Record) -> None:
    first = record.sector % _PER_WINDOW * SECTOR
    data[first : first + record.sectors * SECTOR] = bytes(record.sectors * SECTOR)


# -- saving
async def save(rehearsal: Rehearsal, path: str, replace: bool) -> int:
    """Write the undo file of what was rehearsed; it is whole and durable when this returns.

    Returns its length.  Raises OSError (FileExistsError unless ``replace``); then there is none.
    """
    folder = os.path.dirname(path) or "."
    unfinished = f"{path}.{os.getpid()}.unfinished"
    out = open(unfinished, "xb")
    try:
        with out:
            size = await _write(rehearsal, out)
            out.flush()
            os.fsync(out.fileno())
        if replace:
            os.replace(unfinished, path)
        else:
            _put_there(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    sync_folder(folder)
    return size


def _put_there(unfinished: str, path: str) -> None:
    """Give the file its name, unless that is taken."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here
        if os.path.lexists(path):
            raise FileExistsError(17, "File exists", path) from None
        os.replace(unfinished, path)
    else:
        os.unlink(unfinished)


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def _write(rehearsal: Rehearsal, out: BinaryIO) -> int:
    base = os.path.dirname(os.path.abspath(_name(rehearsal.files[0])))
    states = [
        FileState(_relative(_name(file), base), file.leaf.size, file.shortest, file.longest)
        for file in rehearsal.files
    ]
    writer = Writer(out, states)
    rests = []
    for file in rehearsal.files:
        changes, rest = _Changes(rehearsal, file), Rest()
        async for window in _joined(file.leaf, changes.windows()):
            data = await _read(file.leaf, window, file.leaf.size)
            for record in changes.records(window, data, file.leaf.size):
                writer.add(record._replace(file=file.number))
                _mask(data, record)
            rest.add(window * WINDOW, data)
        rests.append(rest.digest())
    writer.end(rests)
    return writer.size


def _name(file: Rehearsed) -> str:
    return str(file.options.get("filename", ""))


def _relative(name: str, base: str) -> str:
    """Files beside the image are known by their names, others by their paths."""
    full = os.path.abspath(name)
    return os.path.basename(full) if os.path.dirname(full) == base else full


async def _joined(node: Node, windows: list[int]) -> AsyncIterator[int]:
    """The windows with data and these, ascending, each once."""
    waiting = iter(windows)
    ahead = next(waiting, None)
    async for window in data_windows(node):
        while ahead is not None and ahead < window:
            yield ahead
            ahead = next(waiting, None)
        if ahead == window:
            ahead = next(waiting, None)
        yield window
    while ahead is not None:
        yield ahead
        ahead = next(waiting, None)


# -- bringing back
class Undone(NamedTuple):
    """What was brought back of the image ``filename``: ``bytes`` in ``places`` (ranges of sectors),
    and the ``lengths`` of so many files.  All are 0 where it was as before already."""

    places: int
    bytes: int
    lengths: int
    filename: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``diskwright check --undo --output=json``."""
        return {
            "filename": self.filename,
            "undone": bool(self.places or self.lengths),
            "places": self.places,
            "bytes": self.bytes,
            "lengths": self.lengths,
        }


async def verify(reader: Reader, nodes: list[Node]) -> None:
    """Raise ImageError unless each file is what the repair made of it, or between that and what it
    was before."""
    records = reader.records()
    ahead = next(records, None)
    for number, (node, state) in enumerate(zip(nodes, reader.files, strict=True)):
        if not state.shortest <= node.size <= state.longest:
            raise _changed(node, node.size, "its length")
        rest = Rest()
        windows = data_windows(node)
        window = await anext(windows, None)
        while window is not None or (ahead is not None and ahead.file == number):
            place = ahead.sector // _PER_WINDOW if ahead and ahead.file == number else None
            at = min(w for w in (window, place) if w is not None)
            data = await _read(node, at, node.size)
            while ahead is not None and (ahead.file, ahead.sector // _PER_WINDOW) == (number, at):
                _compare(node, data, ahead)
                _mask(data, ahead)
                ahead = next(records, None)
            rest.add(at * WINDOW, data)
            if window == at:
                window = await anext(windows, None)
        if rest.digest() != reader.rests[number]:
            raise _changed(node, None, "what the repair left alone")


def _compare(node: Node, data: bytearray, record: Record) -> None:
    """Each sector of the record must be in a state that it had."""
    known: dict[int, set[bytes]] = {}
    for sector, digest in record.versions:
        known.setdefault(sector, set()).add(digest)
    old = record.old.ljust(record.sectors * SECTOR, b"\0")
    for index in range(record.sectors):
        sector = record.sector + index
        now = bytes(_part(data, sector % _PER_WINDOW))
        if now == old[index * SECTOR : (index + 1) * SECTOR]:
            continue
        if record.may_be_zero and now == _NOTHING:
            continue
        if sector_digest(now) not in known.get(sector, ()):
            raise _changed(node, sector * SECTOR, "a sector")


def _changed(node: Node, offset: int | None, what: str) -> ImageError:
    return ImageError(
        f"was changed by others since the repair ({what} is not what the repair made of it); "
        "nothing was undone",
        file=str(node.options.get("filename", "")),
        offset=offset,
    )


async def bring_back(reader: Reader, nodes: list[Node]) -> Undone:
    """Write the old bytes and lengths.  It can be interrupted anywhere and done again."""
    places = moved = lengths = 0
    for node, state in zip(nodes, reader.files, strict=True):
        if node.size < state.before:
            await node.truncate(state.before)
            lengths += 1
    for record in reader.records():
        node, state = nodes[record.file], reader.files[record.file]
        start = record.sector * SECTOR
        length = min(record.sectors * SECTOR, max(state.before - start, 0))
        if not length:
            continue
        old = record.old or bytes(length)
        (now,) = await node.read([start], [length])
        if bytes(now) == old:
            continue
        if record.old:
            await node.write([start], [old])
        else:
            await node.zero([start], [length], MAY_UNMAP)
        places += 1
        moved += length
    for node in nodes:
        await node.flush()
    for node, state in zip(nodes, reader.files, strict=True):
        if node.size > state.before:
            await node.truncate(state.before)
            await node.flush()
            lengths += 1
    return Undone(places, moved, lengths)
