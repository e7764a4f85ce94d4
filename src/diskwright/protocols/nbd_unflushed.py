"""What an NBD server has answered and no flush has covered: it is sent again to whatever server
comes after a loss of all connections, which may not have it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..records import NamedTuple
from ..wire import nbd_const as c
from ..wire.nbd_flight import Flight
from .nbd_link import Link, Trip

LIMIT = 32 << 20
"""Bytes that are kept before a flush is due."""
_OVERHEAD = 64
"""Bytes that a request without payload counts."""


class _Change(NamedTuple):
    number: int
    command: int
    flags: int
    offsets: Sequence[int]
    lengths: Sequence[int]
    payloads: Sequence[bytes]
    size: int


class Unflushed:
    """Changes in the order in which they were answered, so that of two that meet the later one
    wins again.  ``size`` in bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._changes: deque[_Change] = deque()
        self._number = 0

    def add(self, flight: Flight) -> None:
        """Keep what was answered; its buffers are copied.  Also what is durable already, lest an
        older change of the same place comes back."""
        if flight.flags & c.CMD_FLAG_FUA and not self._changes:
            return
        self._number += 1
        written = flight.buffers if flight.command == c.CMD_WRITE else ()
        payloads = [bytes(buffer) for buffer in written or ()]
        size = sum(map(len, payloads)) + _OVERHEAD * len(flight.offsets)
        flags = flight.flags & ~c.CMD_FLAG_FAST_ZERO  # slowly is better than not at all
        where = flight.offsets, flight.lengths
        self._changes.append(_Change(self._number, flight.command, flags, *where, payloads, size))
        self.size += size

    def mark(self) -> int:
        """What a flush that begins now covers."""
        return self._number

    def covered(self, mark: int) -> None:
        """A flush has covered it."""
        changes = self._changes
        while changes and changes[0].number <= mark:
            self.size -= changes.popleft().size

    async def replay(self, link: Link) -> None:
        """Send everything over ``link``, which carries nothing else yet.  Raises PeerError when it
        is lost meanwhile, and OSError when the server refuses something."""
        for change in list(self._changes):
            trip = Trip(
                change.command, change.offsets, change.lengths, change.payloads, change.flags
            )
            link.submit(trip)
            await trip.done
            if trip.failure is not None:
                if trip.failure.number == c.ESHUTDOWN:
                    link.part("the server is shutting down", c.ESHUTDOWN)
                    assert link.lost is not None
                    raise link.lost
                number = c.host_errno(trip.failure.number)
                raise OSError(number, "what was not flushed could not be written again")
