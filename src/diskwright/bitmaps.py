"""Dirty bitmaps: which parts of a disk were written since.

A bitmap costs what is set in it, not what the disk is long: bits are kept in chunks that are made
when the first of their bits is set, and a chunk that is set as a whole costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from .bits import CHUNK_SHIFT, BitmapError, Bits, Budget
from .errors import UsageError

MIN_GRANULARITY, MAX_GRANULARITY = 1 << 9, 1 << 31
DEFAULT_GRANULARITY = 1 << 16
_MOST_BITS = 1 << 34


def check_granularity(granularity: int) -> None:
    """Raise UsageError for a granularity (in bytes) that no bitmap has."""
    if granularity & granularity - 1 or not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY:
        raise UsageError("Granularity must be power of 2 and at least 512")


class DirtyBitmap:
    """What was written of a disk of ``size`` bytes, by parts of ``granularity`` bytes.

    ``enabled``: writes set bits.  ``persistent``: kept in the image.  ``inconsistent``: what is
    stored of it is not true any more; it can only be removed.  ``busy``: an operation uses it.
    """

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int = DEFAULT_GRANULARITY,
        *,
        enabled: bool = True,
        persistent: bool = False,
        budget: Budget | None = None,
    ) -> None:
        check_granularity(granularity)
        if size > _MOST_BITS * granularity:
            raise UsageError(f"A disk of {size} bytes needs a larger granularity")
        self.name = name
        self.size = size
        self.granularity = granularity
        self._shift = granularity.bit_length() - 1
        self.enabled = enabled
        self.persistent = persistent
        self.inconsistent = False
        self.busy = False
        self.bits = Bits(-(-size >> self._shift), budget)
        self.loaded = True
        """False: bits that are set in the image are not all in memory."""
        self.touched: set[int] | None = set()
        """Groups of bits (see ``GROUP``) that changed since they were stored; None: all of it."""

    GROUP = 1 << CHUNK_SHIFT

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name!r} granularity {self.granularity}>"

    @property
    def count(self) -> int:
        """Dirty bytes, in whole parts (of what is in memory)."""
        return self.bits.count << self._shift

    @property
    def changed(self) -> bool:
        """Bits changed since they were stored."""
        return self.touched is None or bool(self.touched)

    def check(self) -> None:
        """Raise BitmapError for a bitmap that cannot be used now."""
        if self.busy:
            raise BitmapError(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used"
            )
        if self.inconsistent:
            raise BitmapError(
                f"Bitmap '{self.name}' is inconsistent and cannot be used\n"
                "Try block-dirty-bitmap-remove to delete this bitmap from disk"
            )

    def mark(self, start: int, end: int) -> None:
        """The bytes [start, end) were written."""
        first, stop = start >> self._shift, min((end - 1 >> self._shift) + 1, self.bits.length)
        if first >= stop or start >= end:
            return
        self.bits.set(first, stop)
        if self.touched is not None:
            if first >> CHUNK_SHIFT == stop - 1 >> CHUNK_SHIFT:
                self.touched.add(first >> CHUNK_SHIFT)
            else:
                self.touched.update(range(first >> CHUNK_SHIFT, (stop - 1 >> CHUNK_SHIFT) + 1))

    def clear(self) -> None:
        """Nothing is dirty any more."""
        self.bits.clear()
        self.touched = None
        self.loaded = True

    def saved(self) -> Callable[[], None]:
        """What brings the bits back to what they are now."""
        bits = Bits(self.bits.length)
        bits.merge(self.bits)
        touched = None if self.touched is None else set(self.touched)
        loaded = self.loaded

        def restore() -> None:
            self.bits.clear()
            self.bits.merge(bits)
            self.touched, self.loaded = touched, loaded

        return restore

    def check_size(self, other: DirtyBitmap) -> None:
        """Raise BitmapError where ``other`` is of a disk of another size."""
        if other.size != self.size:
            raise BitmapError(
                f"Bitmaps are of different sizes (destination size is {self.size}, source size is "
                f"{other.size}) and can't be merged"
            )

    def merge(self, other: DirtyBitmap) -> None:
        """What is dirty in ``other``, which may have another granularity, is so here, too.

        Raises BitmapError for another size.
        """
        self.check_size(other)
        if other._shift == self._shift:  # runs of single bits would be many
            chunks = self.bits.merge(other.bits)
            if self.touched is not None:
                self.touched.update(chunks)
            return
        for first, stop in other.bits.runs():
            self.mark(first << other._shift, min(stop << other._shift, self.size))

    def runs(self, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """The dirty ranges in ``length`` bytes from ``offset``, as (offset, length)."""
        end = self.size if length is None else min(offset + length, self.size)
        if offset >= end:
            return
        for first, stop in self.bits.runs(offset >> self._shift, (end - 1 >> self._shift) + 1):
            a, b = max(first << self._shift, offset), min(stop << self._shift, end)
            yield a, b - a

    def extents(
        self, offset: int = 0, length: int | None = None
    ) -> Iterator[tuple[int, int, bool]]:
        """All of ``length`` bytes from ``offset`` as (offset, length, dirty)."""
        end = self.size if length is None else min(offset + length, self.size)
        for start, n in self.runs(offset, length):
            if start > offset:
                yield offset, start - offset, False
            yield start, n, True
            offset = start + n
        if offset < end:
            yield offset, end - offset, False

    def truncate(self, size: int) -> None:
        """The disk has another size; what is new is clean.  All bits are in memory."""
        self.size = size
        self.bits.resize(-(-size >> self._shift))
        self.touched = None


class BitmapSet:
    """The bitmaps of a disk, in the order in which they were made.

    ``active`` are those that writes are told to; while it is empty they cost a write nothing.
    """

    def __init__(self) -> None:
        self.active: list[DirtyBitmap] = []
        self.budget = Budget()
        self._all: dict[str, DirtyBitmap] = {}

    def __iter__(self) -> Iterator[DirtyBitmap]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def find(self, name: str) -> DirtyBitmap | None:
        """The bitmap of this name."""
        return self._all.get(name)

    def get(self, name: str) -> DirtyBitmap:
        """The bitmap of this name; raises BitmapError without one."""
        found = self._all.get(name)
        if found is None:
            raise BitmapError(f"Dirty bitmap '{name}' not found")
        return found

    def add(self, bitmap: DirtyBitmap) -> None:
        """Raises BitmapError for a name that is there."""
        if bitmap.name in self._all:
            raise BitmapError(f"Bitmap already exists: {bitmap.name}")
        self._all[bitmap.name] = bitmap
        self.refresh()

    def replace(self, bitmap: DirtyBitmap) -> None:
        """Have ``bitmap`` in place of the one of its name."""
        self._all[bitmap.name] = bitmap
        self.refresh()

    def remove(self, bitmap: DirtyBitmap) -> None:
        """Forget a bitmap, which frees its memory."""
        del self._all[bitmap.name]
        bitmap.bits.clear()
        self.refresh()

    def refresh(self) -> None:
        """Bitmaps were enabled or disabled."""
        self.active = [b for b in self._all.values() if b.enabled and not b.inconsistent]

    def mark(self, spans: Iterable[tuple[int, int]]) -> None:
        """Ranges (start, end) were written, or may have been."""
        for bitmap in self.active:
            for start, end in spans:
                bitmap.mark(start, end)

    def truncate(self, size: int) -> None:
        """The disk has another size."""
        for bitmap in self._all.values():
            if not bitmap.inconsistent and bitmap.size != size:
                bitmap.truncate(size)


def spans_of(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of each (offset, length)."""
    return [(offset, offset + length) for offset, length in ranges]

