"""Beginning early to write to the medium what a flush will wait for."""

from __future__ import annotations

from .os_portable import Portable

_LEAST = 64 << 10  # what is smaller is metadata, and may soon change again
_STEP = 8 << 20
_APART = 8 << 20


class WriteOut:
    """What was written to one file since the system was last asked to write it out."""

    __slots__ = ("amount", "end", "running", "start")

    def __init__(self) -> None:
        self.start = self.end = 0
        self.amount = 0
        self.running = False

    def add(self, start: int, end: int, length: int) -> bool:
        """``length`` bytes were written between ``start`` and ``end``; True when it is time to
        begin.  What lies far behind or before them is left to the flush."""
        if length < _LEAST or end - start > _APART:
            return False
        if not self.amount or start > self.end + _APART or end < self.start - _APART:
            self.start, self.end, self.amount = start, end, length
        else:
            self.start, self.end = min(self.start, start), max(self.end, end)
            self.amount += length
        return self.amount >= _STEP and not self.running

    def take(self) -> tuple[int, int]:
        """The range (offset, length) that is to be written out now."""
        self.amount = 0
        return self.start, self.end - self.start

    @staticmethod
    def begin(table: Portable, fd: int, offset: int, length: int) -> None:
        """Runs in the pool.  Nothing depends on it: whatever is wrong, the flush will say."""
        try:
            table.write_out(fd, offset, length)
        except OSError:
            pass
