"""Which mebibytes of an image file are in use: one bit each, in pieces made when they are needed.

Everything in a VHDX file lies on a border of 1 MiB and is a multiple of it, so that is the unit.
"""

from __future__ import annotations

from collections.abc import Iterator

MIB_BITS = 20
LIMIT = 1 << 27
"""Units beyond this (128 TiB) are in no sane file: an image of 64 TiB with all its bitmaps and
tables is a little over half of it.  It bounds the memory to 16 MiB."""

_PIECE_BITS = 16
_PIECE = 1 << _PIECE_BITS
_BYTES = _PIECE // 8


class Claims:
    """Units of 1 MiB that something refers to."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self.count = 0
        """Units that are in use."""
        self.end = 0
        """One more than the last of them."""

    @property
    def dense(self) -> bool:
        """True when nothing below `end` is free."""
        return self.count == self.end

    def add(self, start: int, length: int) -> bool:
        """Claim ``length`` units; False when one of them was in use (then all of them are in use
        now, but counted once)."""
        fresh = 0
        at, end = start, start + length
        while at < end:
            stop = min(end, (at | _PIECE - 1) + 1)
            fresh += self._mark(at, stop - at)
            at = stop
        self.count += fresh
        self.end = max(self.end, end)
        return fresh == length

    def _mark(self, start: int, length: int) -> int:
        piece = self._pieces.get(start >> _PIECE_BITS)
        if piece is None:
            piece = self._pieces[start >> _PIECE_BITS] = bytearray(_BYTES)
        bit = start & _PIECE - 1
        first, last = bit >> 3, (bit + length + 7) >> 3
        mask = ((1 << length) - 1) << (bit & 7)
        old = int.from_bytes(piece[first:last], "little")
        piece[first:last] = (old | mask).to_bytes(last - first, "little")
        return length - (old & mask).bit_count()

    def taken(self, start: int, length: int) -> bool:
        """True when one of these units is in use."""
        at, end = start, start + length
        while at < end:
            stop = min(end, (at | _PIECE - 1) + 1)
            piece = self._pieces.get(at >> _PIECE_BITS)
            if piece is not None:
                bit = at & _PIECE - 1
                last = (bit + stop - at + 7) >> 3
                bits = int.from_bytes(piece[bit >> 3 : last], "little") >> (bit & 7)
                if bits & (1 << stop - at) - 1:
                    return True
            at = stop
        return False

    def gaps(self, end: int) -> Iterator[tuple[int, int]]:
        """Runs (start, length) of units below ``end`` that nothing uses, ascending."""
        open_at = 0
        for number in sorted(self._pieces):
            base = number << _PIECE_BITS
            if base >= end:
                break
            bits = int.from_bytes(self._pieces[number], "little")
            # As text, so that the searches below are the interpreter's own.
            text = f"{bits:0{_PIECE}b}"[::-1]
            at = 0
            while True:
                used = text.find("1", at)
                if used < 0:
                    break
                if base + used > open_at:
                    yield open_at, min(base + used, end) - open_at
                at = text.find("0", used)
                if at < 0:
                    at = _PIECE
                open_at = base + at
                if open_at >= end or at == _PIECE:
                    break
            if open_at >= end:
                return
        if open_at < end:
            yield open_at, end - open_at
