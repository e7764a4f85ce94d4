"""A sparse set of bits, and what several of them may take in memory."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import DiskError

BUDGET = 256 << 20
"""Bytes that the bits of all bitmaps of a node may take in memory."""
CHUNK_SHIFT = 15
"""Bits of a chunk, as a power of two."""
_SHIFT = CHUNK_SHIFT
_CHUNK = 4096
_BITS = 1 << _SHIFT
_FULL = b"\xff" * _CHUNK


class BitmapError(DiskError):
    """A bitmap is not there, is there already, or cannot be used so."""


class Budget:
    """What several sets of bits may take together, in chunks."""

    def __init__(self, limit: int = BUDGET) -> None:
        self.left = limit // _CHUNK


class Bits:
    """``length`` bits.  Beyond its budget a chunk is taken for set as a whole: too much is called
    dirty then, never too little."""

    __slots__ = ("_chunks", "budget", "length")

    def __init__(self, length: int, budget: Budget | None = None) -> None:
        self.length = length
        self.budget = budget or Budget()
        self._chunks: dict[int, bytearray | None] = {}
        """None: all bits of the chunk are set."""

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def _whole(self, index: int) -> None:
        """All bits of a chunk, or of the part of it that is there."""
        start = index << _SHIFT
        if start + _BITS <= self.length:
            if self._chunks.get(index) is not None:
                self.budget.left += 1
            self._chunks[index] = None
            return
        data = self._chunk(index)
        count = self.length - start
        if data is not None:
            data[: count >> 3] = b"\xff" * (count >> 3)
            if count & 7:
                data[count >> 3] |= (1 << (count & 7)) - 1

    def _chunk(self, index: int) -> bytearray | None:
        """The bytes of a chunk, made if need be; None where all of it is set."""
        try:
            return self._chunks[index]
        except KeyError:
            pass
        # The last chunk of a disk may be short and is always kept by its bits.
        if self.budget.left <= 0 and (index + 1) << _SHIFT <= self.length:
            self._chunks[index] = None
            return None
        self.budget.left -= 1
        made = self._chunks[index] = bytearray(_CHUNK)
        return made

    def set(self, first: int, stop: int) -> None:
        """Set the bits [first, stop)."""
        while first < stop:
            index = first >> _SHIFT
            end = min(stop, (index + 1) << _SHIFT)
            if end - first == _BITS:
                self._whole(index)
            elif (data := self._chunk(index)) is not None:
                start = index << _SHIFT
                _fill(data, first - start, end - start)
            first = end

    def merge(self, other: Bits) -> list[int]:
        """Set what is set in ``other``, which has as many bits; returns the chunks of that."""
        for index, theirs in other._chunks.items():
            if theirs is None:
                self._whole(index)
            elif (data := self._chunk(index)) is not None:
                both = int.from_bytes(data, "little") | int.from_bytes(theirs, "little")
                data[:] = both.to_bytes(_CHUNK, "little")
        return list(other._chunks)

    def clear(self) -> None:
        """No bit is set any more."""
        self.budget.left += sum(data is not None for data in self._chunks.values())
        self._chunks.clear()

    def get(self, index: int) -> bool:
        """One bit."""
        data = self._chunks.get(index >> _SHIFT, b"")
        if data is None:
            return True
        inside = index & _BITS - 1
        return bool(data and data[inside >> 3] >> (inside & 7) & 1)

    def any(self, first: int, stop: int) -> bool:
        """Is one of the bits [first, stop) set?"""
        while first < stop:
            index = first >> _SHIFT
            end = min(stop, (index + 1) << _SHIFT)
            data = self._chunks.get(index, b"")
            if data is None:
                return True
            if data:
                a, b = first & _BITS - 1, (end - 1 & _BITS - 1) + 1
                part = data[a >> 3 : b + 7 >> 3]
                if part.count(0) < len(part):
                    inside = int.from_bytes(part, "little") >> (a & 7)
                    if inside & (1 << b - a) - 1:
                        return True
            first = end
        return False

    @property
    def count(self) -> int:
        """How many bits are set."""
        return sum(
            _BITS if data is None else int.from_bytes(data, "little").bit_count()
            for data in self._chunks.values()
        )

    @property
    def memory(self) -> int:
        """Bytes that the bits take in memory."""
        return _CHUNK * sum(data is not None for data in self._chunks.values())

    def runs(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """The set bits in [first, stop) as (first, stop), ascending and never adjacent."""
        stop = self.length if stop is None else min(stop, self.length)
        begin = end = -1
        for index in sorted(self._chunks):
            base = index << _SHIFT
            if base + _BITS <= first:
                continue
            if base >= stop:
                break
            for a, b in _chunk_runs(self._chunks[index]):
                a, b = max(base + a, first), min(base + b, stop)
                if a >= b:
                    continue
                if a == end:
                    end = b
                    continue
                if begin >= 0:
                    yield begin, end
                begin, end = a, b
        if begin >= 0:
            yield begin, end

    # -- as bytes: bit n is bit n % 8 of byte n // 8
    def data(self, at: int, length: int) -> bytes:
        """``length`` bytes from byte ``at``."""
        out = bytearray(length)
        done = 0
        while done < length:
            index, inside = divmod(at + done, _CHUNK)
            n = min(_CHUNK - inside, length - done)
            if index in self._chunks:
                chunk = self._chunks[index]
                out[done : done + n] = _FULL[:n] if chunk is None else chunk[inside : inside + n]
            done += n
        return bytes(out)

    def add_data(self, at: int, data: bytes) -> None:
        """Set what is set in ``data``, which begins at byte ``at``; bits behind the end are
        ignored.  Raises BitmapError when the budget does not allow it."""
        room = (self.length + 7 >> 3) - at
        if len(data) >= room:
            data = data[: max(room, 0)]
            if data and self.length & 7:
                data = data[:-1] + bytes([data[-1] & (1 << (self.length & 7)) - 1])
        for start in range(-(at % _CHUNK), len(data), _CHUNK):
            part = data[max(start, 0) : start + _CHUNK]
            if part.count(0) == len(part):
                continue
            index, inside = divmod(at + max(start, 0), _CHUNK)
            if len(part) == _CHUNK and part == _FULL:
                self._whole(index)
                continue
            if index not in self._chunks and self.budget.left <= 0:
                raise BitmapError(
                    f"Dirty bitmaps take more than {BUDGET >> 20} MiB of memory: "
                    "use a larger granularity"
                )
            chunk = self._chunk(index)
            if chunk is not None:
                end = inside + len(part)
                old = int.from_bytes(chunk[inside:end], "little")
                both = old | int.from_bytes(part, "little")
                chunk[inside:end] = both.to_bytes(len(part), "little")

    def groups(self, bits: int) -> list[int]:
        """Indexes of the groups of ``2**bits`` bits each that have a bit that is set, or may."""
        found: set[int] = set()
        for index, data in self._chunks.items():
            if bits >= _SHIFT:
                found.add(index >> bits - _SHIFT)
                continue
            size = 1 << bits - 3
            first = index << _SHIFT - bits
            for i in range(_BITS >> bits):
                if data is None or data.count(0, i * size, (i + 1) * size) < size:
                    found.add(first + i)
        return sorted(found)

    def resize(self, length: int) -> None:
        """Become shorter (bits are lost) or longer (new bits are not set)."""
        old, self.length = self.length, length
        if length >= old:
            return
        last = length >> _SHIFT
        for index in [i for i in self._chunks if i >= last]:
            data = self._chunks[index]
            if index > last or not length & _BITS - 1:
                if data is not None:
                    self.budget.left += 1
                del self._chunks[index]
                continue
            if data is None:
                data = self._chunks[index] = bytearray(_FULL)
                self.budget.left -= 1
            keep = length & _BITS - 1
            data[(keep + 7) >> 3 :] = bytes(_CHUNK - ((keep + 7) >> 3))
            if keep & 7:
                data[keep >> 3] &= (1 << (keep & 7)) - 1


def _fill(data: bytearray, first: int, stop: int) -> None:
    a, b = first >> 3, stop >> 3
    if a == b:
        data[a] |= (1 << stop - first) - 1 << (first & 7)
        return
    if first & 7:
        data[a] |= 0xFF << (first & 7) & 0xFF
        a += 1
    data[a:b] = _FULL[: b - a]
    if stop & 7:
        data[b] |= (1 << (stop & 7)) - 1


def _chunk_runs(data: bytearray | None) -> Iterator[tuple[int, int]]:
    if data is None:
        yield 0, _BITS
        return
    digits = f"{int.from_bytes(data, 'little'):b}"[::-1]
    end = 0
    while True:
        start = digits.find("1", end)
        if start < 0:
            return
        end = digits.find("0", start)
        if end < 0:
            end = len(digits)
        yield start, end
