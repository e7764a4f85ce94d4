"""A file in memory that shares all that was not changed with the one it was made from."""

from __future__ import annotations

PAGE = 16384
_ZEROES = bytearray(PAGE)
"""Never changed."""


class Pages:
    """Behaves as a sparse file does: behind its end there are zeroes."""

    __slots__ = ("_base", "_length", "_over", "_shared")

    def __init__(self, base: bytes = b"") -> None:
        self._base, self._length = base, len(base)
        self._shared = self._length
        """So many bytes of the base still show."""
        self._over: dict[int, bytearray] = {}

    def __len__(self) -> int:
        return self._length

    def __bytes__(self) -> bytes:
        return self.read(0, self._length)

    def read(self, at: int, length: int) -> bytes:
        """Always so many bytes."""
        end = min(at + length, self._length)
        if at >= end:
            return bytes(length)
        over, first, last = self._over, at // PAGE, (end - 1) // PAGE
        if last - first > len(over):
            hits = [number for number in over if first <= number <= last]
        else:
            hits = [number for number in range(first, last + 1) if number in over]
        data = self._base[at : min(end, self._shared)]
        if hits:
            whole = bytearray(data.ljust(end - at, b"\0"))
            for number in hits:
                start = number * PAGE
                a, b = max(start, at), min(start + PAGE, end)
                whole[a - at : b - at] = over[number][a - start : b - start]
            data = bytes(whole)
        return data.ljust(length, b"\0")

    def write(self, at: int, data: bytes) -> None:
        """The file grows as far as it must."""
        done, end = 0, at + len(data)
        self._length = max(self._length, end)
        while at + done < end:
            number, inside = divmod(at + done, PAGE)
            count = min(PAGE - inside, end - at - done)
            page = self._over.get(number)
            if count == PAGE and data[done : done + PAGE] == _ZEROES:
                self._over[number] = _ZEROES
                done += PAGE
                continue
            if page is _ZEROES:
                page = self._over[number] = bytearray(PAGE)
            elif page is None:
                start = number * PAGE
                stop = min(start + PAGE, self._shared)
                page = bytearray(self._base[start:stop].ljust(PAGE, b"\0"))
                self._over[number] = page
            page[inside : inside + count] = data[done : done + count]
            done += count

    def zero(self, at: int, length: int) -> None:
        """Write zeroes; whole pages of them are shared."""
        first, stop = -(-at // PAGE), (at + length) // PAGE
        if first >= stop:
            return self.write(at, bytes(length))
        self.write(at, bytes(first * PAGE - at))
        self._over |= dict.fromkeys(range(first, stop), _ZEROES)
        self._length = max(self._length, stop * PAGE)
        self.write(stop * PAGE, bytes(at + length - stop * PAGE))

    def resize(self, size: int) -> None:
        """Cut it, or let it grow by zeroes."""
        if size < self._length:
            self._shared = min(self._shared, size)
            self._over = {n: page for n, page in self._over.items() if n * PAGE < size}
            last = self._over.get(size // PAGE)
            if last is not None and last is not _ZEROES:
                last[size % PAGE :] = bytes(PAGE - size % PAGE)
        self._length = size
