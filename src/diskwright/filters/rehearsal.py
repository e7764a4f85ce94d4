"""A rehearsal: work on a disk that is done over its files and changes none of them.

Every file that would be written to is replaced by a :class:`Rehearsed` node.  What is written goes
into a store, reads see it, and the journal keeps all of it in its order, barriers included.  It can
then be shown, or carried out on the files.
"""

from __future__ import annotations

import errno
import tempfile
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from ..contract import FUA, MAY_UNMAP
from ..engine.kernel import Future
from ..engine.node import Buffer, Node
from ..errors import DiskError, NodeClosed
from ..extents import Data, Extent, Zero
from ..records import NamedTuple
from .patches import KEPT, ZEROES, Patches

WRITE, ZERO, LENGTH, FLUSH = range(4)

_MOST_ENTRIES = 1 << 21
_IN_MEMORY = 16 << 20
_BUFFER = 1 << 20
_READ_ONLY = frozenset({"write", "resize"})


class TooMuch(DiskError):
    """A rehearsal has more to remember than it may."""


class Entry(NamedTuple):
    """One thing done to the file with this number: bytes written (at ``place`` of the store),
    zeroes, a new length (``offset``; before it was ``length``), a flush.  ``tag`` is the event that
    announced it."""

    kind: int
    file: int
    offset: int
    length: int
    place: int
    tag: str


class Rehearsal:
    """What was done to ``files``.  New bytes are kept in memory up to 16 MiB, then in a temporary
    file; of each write some 40 bytes stay in memory, for two million writes at most.

    ``writable``: the files themselves are opened and locked for writing, so that the journal can
    be carried out.
    """

    def __init__(self, writable: bool) -> None:
        self.writable = writable
        self.files: list[Rehearsed] = []
        self._store = tempfile.SpooledTemporaryFile(_IN_MEMORY)
        self._end = 0
        self._tags: dict[str, int] = {}
        self._kinds, self._numbers = array("B"), array("I")
        self._offsets, self._lengths, self._places = array("q"), array("q"), array("q")
        self._events = array("I")

    def over(self, leaf: Node) -> Node:
        """What stands in the place of an opened file."""
        node = Rehearsed(self, len(self.files), leaf)
        self.files.append(node)
        return node

    # -- the journal
    def __len__(self) -> int:
        return len(self._kinds)

    def note(
        self, kind: int, file: int, offset: int, length: int = 0, place: int = 0, tag: str = ""
    ) -> None:
        """Add an entry."""
        if len(self._kinds) >= _MOST_ENTRIES:
            raise TooMuch(
                f"more than {_MOST_ENTRIES} writes would be needed, which is too much to keep; "
                "repair without --dry-run and --undo-file"
            )
        self._kinds.append(kind)
        self._numbers.append(file)
        self._offsets.append(offset)
        self._lengths.append(length)
        self._places.append(place)
        self._events.append(self._tags.setdefault(tag, len(self._tags)))

    def entries(self) -> Iterator[Entry]:
        """All of it, in order."""
        tags = list(self._tags)
        for kind, file, offset, length, place, tag in zip(
            self._kinds,
            self._numbers,
            self._offsets,
            self._lengths,
            self._places,
            self._events,
            strict=True,
        ):
            yield Entry(kind, file, offset, length, place, tags[tag])

    @property
    def changed(self) -> bool:
        """Something would be written."""
        return any(kind != FLUSH for kind in self._kinds)

    # -- the store
    def keep(self, data: Buffer) -> int:
        """Put new bytes into the store; returns their place."""
        place = self._end
        self._store.seek(place)
        self._store.write(data)
        self._end += len(memoryview(data).cast("B"))
        return place

    def kept(self, place: int, length: int) -> bytes:
        """New bytes."""
        self._store.seek(place)
        return self._store.read(length)

    # -- the files
    async def carry_out(self) -> None:
        """Do to the files what was done over them, each barrier where it was.

        Raises OSError; the files then are between two states, as after a loss of power.
        """
        for entry in self.entries():
            leaf = self.files[entry.file].leaf
            if entry.kind == WRITE:
                for at in range(0, entry.length, _BUFFER):
                    part = self.kept(entry.place + at, min(_BUFFER, entry.length - at))
                    await leaf.write([entry.offset + at], [part])
            elif entry.kind == ZERO:
                await leaf.zero([entry.offset], [entry.length], MAY_UNMAP)
            elif entry.kind == LENGTH:
                await leaf.truncate(entry.offset)
            else:
                await leaf.flush()
        for file in self.files:
            await file.leaf.flush()

    async def give_up(self) -> None:
        """Close the files after an error that is about to be raised."""
        with suppress(Exception):
            await self.close()

    async def close(self) -> None:
        """Close the files and forget everything; all of them, then the first error is raised."""
        first: Exception | None = None
        for file in self.files:
            try:
                await file.leaf.close()
            except Exception as error:
                first = first or error
        self._store.close()
        if first is not None:
            raise first


class Rehearsed(Node):
    """What is written over ``leaf``, which for the disk's users it is."""

    wants_events = True

    def __init__(self, rehearsal: Rehearsal, number: int, leaf: Node) -> None:
        super().__init__(leaf.driver, leaf.driver_name)
        self.rehearsal = rehearsal
        self.number = number
        self.leaf = leaf
        self.patches = Patches()
        self.length = self.size = leaf.size
        """``length``: what the file has in bytes."""
        self.base = leaf.size
        """Where the file's own bytes end to be seen."""
        self.shortest = self.longest = leaf.size
        self.options = dict(leaf.options)
        self.closed = False
        self._tag = ""

    def set_permissions(self, perms: Collection[str], shared: Collection[str]) -> None:
        """The leaf holds them; a file that is only looked at needs fewer."""
        if not self.rehearsal.writable:
            perms = frozenset(perms) - _READ_ONLY
        setter = getattr(self.leaf, "set_permissions", None)
        if setter is not None:
            setter(perms, shared)

    def event(self, tag: str) -> Future[None] | None:
        self._tag = tag
        return None

    def _resize(self, size: int) -> None:
        self.size = size
        self.shortest, self.longest = min(self.shortest, size), max(self.longest, size)

    def _begin(self) -> str:
        if self.closed:
            raise NodeClosed(f"node '{self.name}' is closed")
        tag, self._tag = self._tag, ""
        return tag

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        self._begin()
        views = into if into is not None else [memoryview(bytearray(n)) for n in lengths]
        for offset, length, view in zip(offsets, lengths, views, strict=True):
            for start, end, place in list(self.patches.parts(offset, offset + length)):
                part = view[start - offset : end - offset]
                if place >= 0:
                    part[:] = self.rehearsal.kept(place, end - start)
                    continue
                known = max(min(end, self.base) - start, 0) if place == KEPT else 0
                if known:
                    await self.leaf.read([start], [known], [part[:known]])
                part[known:] = bytes(len(part) - known)
        return views

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        tag = self._begin()
        for offset, buffer in zip(offsets, buffers, strict=True):
            length = len(memoryview(buffer).cast("B"))
            if not length:
                continue
            place = self.rehearsal.keep(buffer)
            self.patches.put(offset, offset + length, place)
            self._resize(max(self.size, offset + length))
            self.rehearsal.note(WRITE, self.number, offset, length, place, tag)
        if flags & FUA:
            await self.flush()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        tag = self._begin()
        for offset, length in zip(offsets, lengths, strict=True):
            if length:
                self.patches.put(offset, offset + length, ZEROES)
                self._resize(max(self.size, offset + length))
                self.rehearsal.note(ZERO, self.number, offset, length, tag=tag)
        if flags & FUA:
            await self.flush()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._begin()  # advisory: the bytes stay

    async def flush(self) -> None:
        self._begin()
        self.rehearsal.note(FLUSH, self.number, 0)

    async def truncate(self, size: int, preallocation: str = "off") -> None:
        tag = self._begin()
        if size < 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        before = self.size
        if size < before:
            self.patches.cut(size)
            self.base = min(self.base, size)
        self._resize(size)
        self.rehearsal.note(LENGTH, self.number, size, before, tag=tag)
        self.changed()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self._begin()
        found: list[Extent] = []
        inside = max(min(offset + length, self.size), offset)
        for start, end, place in self.patches.parts(offset, inside):
            if place == ZEROES or (place == KEPT and start >= self.base):
                found.append(Zero(end - start, explicit=False))
            else:
                found.append(Data("", start, end - start, True))
        if inside < offset + length:
            found.append(Zero(offset + length - inside, explicit=False))
        return found

    def disk_size(self) -> int | None:
        """What the host has allocated for the file as it is."""
        measure = getattr(self.leaf, "disk_size", None)
        return None if measure is None else measure()

    async def close(self) -> None:
        """The file stays open: the rehearsal closes it."""
        self.closed = True
