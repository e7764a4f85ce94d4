"""Content identifiers, and the place of the descriptor that holds them."""

from __future__ import annotations

from ...contract import MetaWrite
from ...errors import NoSpace
from ...units import SECTOR, align_down
from .descriptor import LONG_CONTENT, NO_CONTENT, Descriptor, parse

SLOT = "file"
TAG = "descriptor_update"


def random_bytes(count: int) -> bytes:
    """Where identifiers come from; tests replace it."""
    from secrets import token_bytes

    return token_bytes(count)


def new_cid(digits: int = 8) -> int:
    """A random content identifier of so many hexadecimal digits that means nothing special."""
    while True:
        cid = int.from_bytes(random_bytes(4), "little") & (1 << 4 * digits) - 1
        if cid not in (0, NO_CONTENT, LONG_CONTENT):
            return cid


class Place:
    """Where the text of a descriptor is: in slot ``file`` from ``offset``, in at most ``room``
    bytes (None: in a file of its own, which may grow).  ``stored`` is what was read there."""

    def __init__(self, offset: int, room: int | None, stored: bytes) -> None:
        self.offset = offset
        self.room = room
        self.stored = stored

    def change(self, text: Descriptor) -> list[list[MetaWrite]]:
        """What must be written so that ``text`` is stored, and no more than that: groups, each of
        which is durable before the next.

        Where the first sector that changes holds the end of what a disk cannot do without, in the
        old or in the new text, every state between is the one or the other, whatever is torn: the
        text ends there while what comes behind is written, and that sector is the last one.
        Raises NoSpace when an embedded descriptor has no room for it.
        """
        new = self.padded(text.encode())
        old = self.stored.ljust(len(new), b"\0")
        first = _common(old, new)
        if first == len(new):
            return []
        last = len(new) - _common(old[::-1], new[::-1])
        start = align_down(first, SECTOR)
        stop = start + SECTOR
        if last > stop:
            before, after = parse(self.stored).vital, text.vital
            for kept, end in ((old, before), (new, after)):
                if end <= stop:
                    cut = kept[start:end].ljust(SECTOR, b"\0")
                    return [
                        [self._write(start, cut)],
                        [self._write(stop, new[stop:last])],
                        [self._write(start, new[start:stop])],
                    ]
        return [[self._write(first, new[first:last])]]

    def _write(self, at: int, data: bytes) -> MetaWrite:
        return MetaWrite(SLOT, self.offset + at, data, TAG)

    def padded(self, text: bytes) -> bytes:
        """``text`` with NUL bytes over what is left of the old one.  Raises NoSpace."""
        if self.room is not None and len(text) > self.room:
            raise NoSpace(
                f"the descriptor needs {len(text)} bytes; the image has {self.room} for it"
            )
        return text.ljust(len(self.stored), b"\0")

    def took(self, text: bytes) -> None:
        """``text`` has been written."""
        self.stored = self.padded(text)


def _common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
