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
    """One entry of the queue.  ``spans`` are (start, end) in bytes.  ``behind`` are those that wait
    for it next: of what stands in an entry's way, it is the last in the queue."""

    __slots__ = ("_keys", "behind", "exclusive", "future", "spans", "turn")

    def __init__(self, spans: Sequence[Span], exclusive: bool) -> None:
        self.spans = spans
        self.exclusive = exclusive
        self.future: Future[None] | None = None
        self.behind: list[Lease] = []
        self.turn = 0
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
        self._turns = 0

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

    def _before(self, lease: Lease) -> Lease | None:
        """The last entry that stands in the way of ``lease``; None when there is none."""
        turn = lease.turn
        for other in reversed(self.queue):
            if other.turn < turn and self._conflict(other, lease):
                return other
        return None

    def _enter(self, lease: Lease) -> None:
        self.queue[lease] = None
        self.exclusives += lease.exclusive

    def _asked(self, spans: Sequence[Span], exclusive: bool) -> tuple[Lease, Lease | None]:
        """A lease, not yet in the queue, and what stands in its way."""
        lease = Lease(spans, exclusive)
        self._turns = lease.turn = self._turns + 1
        if self.queue and (exclusive or self.exclusives):
            return lease, self._before(lease)
        return lease, None

    def try_take(self, spans: Sequence[Span], exclusive: bool) -> Lease | None:
        """The lease if it can be granted at once, else None (and nothing is queued)."""
        lease, before = self._asked(spans, exclusive)
        if before is not None:
            return None
        self._enter(lease)
        return lease

    async def take(self, spans: Sequence[Span], exclusive: bool) -> Lease:
        """Queue for ``spans`` (start, end) and wait until granted."""
        lease, before = self._asked(spans, exclusive)
        self._enter(lease)
        if before is not None:
            before.behind.append(lease)
            lease.future = Future()
            try:
                await lease.future
            except BaseException:
                self.drop(lease)
                raise
        return lease

    def drop(self, lease: Lease) -> None:
        """Give it back, and grant what waited for nothing else."""
        del self.queue[lease]
        self.exclusives -= lease.exclusive
        behind = lease.behind
        if len(behind) > 1:
            behind.sort(key=_turn)
        for waiting in behind:
            if waiting not in self.queue:
                continue  # given up meanwhile
            before = self._before(waiting)
            if before is not None:
                before.behind.append(waiting)
            else:
                assert waiting.future is not None
                waiting.future.set()


def _turn(lease: Lease) -> int:
    return lease.turn
