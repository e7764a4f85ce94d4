"""Leases on ranges: shared for writes in place, exclusive for what changes the map.

All ranges of a batch are one queue entry.  The queue is first in, first out: an entry is granted
when nothing before it conflicts, granted or not, so nobody starves and two batches cannot wait
for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

from .kernel import Future

Span = tuple[int, int]  # start, end

WHOLE: Span = (0, 1 << 63)

# Above this many granules a lease is compared by its spans instead of a set of granules.
_MOST_KEYS = 4096


class Lease:
    """One entry of the queue.  ``spans`` are (start, end) in bytes."""

    __slots__ = ("_keys", "exclusive", "future", "spans")

    def __init__(self, spans: Sequence[Span], exclusive: bool) -> None:
        self.spans = spans
        self.exclusive = exclusive
        self.future: Future[None] | None = None
        self._keys: frozenset[int] | bool | None = None

    def keys(self, shift: int) -> frozenset[int] | bool:
        """The granules that it touches; False when they are too many to list."""
        keys = self._keys
        if keys is None:
            last = -1
            count = 0
            for start, end in self.spans:
                count += ((end - 1) >> shift) - (start >> shift) + 1
            if count > _MOST_KEYS:
                keys = False
            else:
                found: list[int] = []
                for start, end in self.spans:
                    first, last = start >> shift, (end - 1) >> shift
                    if first == last:
                        found.append(first)
                    else:
                        found.extend(range(first, last + 1))
                keys = frozenset(found)
            self._keys = keys
        return keys


class Leases:
    """The queue of one node.  ``granule`` (bytes, a power of two) is the finest conflict seen."""

    def __init__(self, granule: int = 4096) -> None:
        self._shift = granule.bit_length() - 1
        self.queue: dict[Lease, None] = {}
        self.exclusives = 0

    def _conflict(self, one: Lease, other: Lease) -> bool:
        if not (one.exclusive or other.exclusive):
            return False
        if len(one.spans) == len(other.spans) == 1:  # of a copy: long, and not worth listing
            ((start, end),), ((first, last),) = one.spans, other.spans
            shift = self._shift
            return start >> shift <= last - 1 >> shift and first >> shift <= end - 1 >> shift
        a, b = one.keys(self._shift), other.keys(self._shift)
        if a is not False and b is not False:
            return not a.isdisjoint(b)  # type: ignore[union-attr, arg-type]
        return any(s < f and e < g for s, g in one.spans for e, f in other.spans)

    def _free(self, lease: Lease) -> bool:
        for earlier in self.queue:
            if earlier is lease:
                return True
            if self._conflict(earlier, lease):
                return False
        return True

    def try_take(self, spans: Sequence[Span], exclusive: bool) -> Lease | None:
        """The lease if it can be granted at once, else None (and nothing is queued)."""
        lease = Lease(spans, exclusive)
        if self.queue and (exclusive or self.exclusives) and not self._free(lease):
            return None
        self.queue[lease] = None
        self.exclusives += exclusive
        return lease

    async def take(self, spans: Sequence[Span], exclusive: bool) -> Lease:
        """Queue for ``spans`` (start, end) and wait until granted."""
        lease = self.try_take(spans, exclusive)
        if lease is None:
            lease = Lease(spans, exclusive)
            self.queue[lease] = None
            self.exclusives += exclusive
            lease.future = Future()
            try:
                await lease.future
            except BaseException:
                self.drop(lease)
                raise
        return lease

    def drop(self, lease: Lease) -> None:
        """Give it back, and grant what waited for it."""
        del self.queue[lease]
        self.exclusives -= lease.exclusive
        for waiting in self.queue:
            future = waiting.future
            if future is not None and not future.done and self._free(waiting):
                future.set()
