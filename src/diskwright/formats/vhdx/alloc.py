"""Space in the file for blocks: what is free in it, then its end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from ...errors import NoSpace
from ...hints import Any
from ...units import align_down
from .mapping import Mapping as BlockMapping
from .structures import MAX_FILE, MIB


class FreeSpace:
    """Ranges of the file that nothing uses: sorted, apart from each other."""

    __slots__ = ("_longest", "ends", "starts")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self._longest = 0
        """No range is longer, so that not every block looks through all that are too short."""

    def add(self, start: int, length: int) -> None:
        """Add a range that is not in the set."""
        end = start + length
        i = bisect_left(self.starts, start)
        if i and self.ends[i - 1] == start:
            i -= 1
            start = self.starts[i]
            del self.starts[i], self.ends[i]
        if i < len(self.starts) and self.starts[i] == end:
            end = self.ends[i]
            del self.starts[i], self.ends[i]
        self.starts.insert(i, start)
        self.ends.insert(i, end)
        self._longest = max(self._longest, end - start)

    def take(self, length: int) -> int | None:
        """The lowest range of so many bytes, taken out; None when there is none."""
        if length > self._longest:
            return None
        for i, (start, end) in enumerate(zip(self.starts, self.ends, strict=True)):
            if end - start >= length:
                if end - start == length:
                    del self.starts[i], self.ends[i]
                else:
                    self.starts[i] = start + length
                return start
        self._longest = length - 1
        return None

    def clear(self) -> None:
        """Forget all of it."""
        self.starts.clear()
        self.ends.clear()
        self._longest = 0


class Allocator(BlockMapping):
    """Takes and gives back.  Blocks are as long as they say, and lie on a mebibyte."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.clean = FreeSpace()
        """Free space that reads as zeroes."""
        self.dirty = FreeSpace()
        """Free space that may hold anything."""
        most = options.get("max_file_size")
        self.limit = MAX_FILE if most is None else min(int(most), MAX_FILE)
        self.end_reads_zero = bool(options.get("zero_beyond_end", True))

    def take(self, length: int) -> tuple[int, bool]:
        """(place, whether it reads as zeroes) of a new block.  Raises NoSpace."""
        for pool in (self.clean, self.dirty):
            place = pool.take(length)
            if place is not None:
                return place, pool is self.clean
        place = self.fresh
        if place + length > self.limit:
            raise NoSpace
        self.fresh += length
        return place, self.end_reads_zero

    def take_all(self, lengths: list[int]) -> list[tuple[int, bool]]:
        """The same for several blocks; takes nothing when it raises NoSpace."""
        taken: list[tuple[int, bool]] = []
        try:
            for length in lengths:
                taken.append(self.take(length))
        except NoSpace:
            for (place, zero), length in reversed(list(zip(taken, lengths, strict=False))):
                self.give_back(place, length, zero)
            raise
        return taken

    def give_back(self, place: int, length: int, zero: bool) -> None:
        """A block that nothing points at; ``zero``: it reads as zeroes."""
        if zero and self.end_reads_zero and place + length == self.fresh:
            # Nothing has been written there: the end of the file is where it was.
            self.fresh = place
        else:
            (self.clean if zero else self.dirty).add(place, length)

    def find_gaps(self, used: list[tuple[int, int]]) -> None:
        """All of the file that is not in one of ``used`` ((start, end), in any order) is free.

        A device ends where it ends.
        """
        if not self.end_reads_zero:
            self.fresh = align_down(self.length, MIB)
            self.limit = min(self.limit, self.fresh)
        at = 0
        for start, end in sorted(used):
            if at < start:
                self.dirty.add(at, start - at)
            at = max(at, end)
        if at < min(self.fresh, self.limit):
            self.dirty.add(at, self.fresh - at)

    def end_in_use(self) -> int:
        """Behind this all of the file is free."""
        end = self.fresh
        free = [*zip(self.clean.ends, self.clean.starts, strict=True)]
        free += zip(self.dirty.ends, self.dirty.starts, strict=True)
        for stop, start in sorted(free, reverse=True):
            if stop != end:
                break
            end = start
        return end

    def forget_space(self) -> None:
        """After a procedure that moved the end of the file: it says where that is."""
        self.clean.clear()
        self.dirty.clear()
