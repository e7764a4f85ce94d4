"""Logs of changes and barriers, and what a loss of power could have left of them."""

from __future__ import annotations

import random

NEVER = 1 << 62


class Change:
    """One logged change: ``data`` at ``offset``, or with ``size`` >= 0 a new length (bytes).

    ``done`` is NEVER until it has ended; ``lost``: no later barrier covers it any more (it failed,
    or a barrier failed after it).
    """

    __slots__ = ("data", "done", "issued", "kind", "lost", "offset", "size")

    def __init__(self, kind: str, issued: int, offset: int, data: bytes, size: int = -1) -> None:
        self.kind, self.issued, self.offset, self.data, self.size = kind, issued, offset, data, size
        self.done = NEVER
        self.lost = False

    def apply(self, image: bytearray) -> None:
        """Make it in ``image``."""
        if self.size >= 0:
            if self.size < len(image):
                del image[self.size :]
            else:
                image.extend(bytes(self.size - len(image)))
        elif self.data:
            end = self.offset + len(self.data)
            if end > len(image):
                image.extend(bytes(end - len(image)))
            image[self.offset : end] = self.data


class Recorded:
    """Bytes that were changed: what they were (``base``), what they are (``data``), and how they
    came to be so."""

    def __init__(self, data: bytes) -> None:
        self.base = bytes(data)
        self.data = bytearray(data)
        self.log: list[Change] = []
        self.barriers: list[tuple[int, int]] = []
        """(issued, ended) of every flush that succeeded."""

    def durable(self, change: Change, time: int) -> bool:
        """True when a barrier that had ended at ``time`` covers ``change``."""
        if change.lost or change.done == NEVER:
            return False
        return any(change.done < issued and ended <= time for issued, ended in self.barriers)

    def forget(self) -> None:
        """A barrier failed: as with fsync, the system has forgotten what it could not write."""
        for change in self.log:
            if change.done != NEVER and not self.durable(change, NEVER):
                change.lost = True

    def crash_state(self, time: int, rng: random.Random, sector: int = 512) -> bytes:
        """What the disk may hold after a loss of power at ``time`` (a moment of the clock).

        All that a barrier covers is there.  Of everything else issued by then, each part of
        ``sector`` bytes is there or not; the file may have grown for a write whose bytes are
        missing (they read as zeroes then).  A shorter or longer length counts in the order in which
        lengths were set.
        """
        image = bytearray(self.base)
        chance = rng.choice((0.0, 0.0, 0.2, 0.5, 0.8, 1.0, 1.0))
        tear = rng.random() < 0.6
        issued = [change for change in self.log if change.issued <= time]
        issued.sort(key=lambda c: c.done if c.done <= time else NEVER + rng.randrange(1 << 20))
        covered = max((a for a, ended in self.barriers if ended <= time), default=-1)
        stopped = False  # a length that did not come to be: nothing grows beyond it afterwards
        limit = NEVER
        for change in issued:
            if change.done < covered and not change.lost:
                change.apply(image)
            elif change.size >= 0:
                if not stopped and rng.random() < chance:
                    change.apply(image)
                else:
                    stopped, limit = True, min(limit, max(len(image), change.size))
            elif change.data and not (stopped and change.offset + len(change.data) > limit):
                _apply_torn(image, change, sector if tear else NEVER, chance, rng)
        return bytes(image)


def _apply_torn(
    image: bytearray, change: Change, sector: int, chance: float, rng: random.Random
) -> None:
    end = change.offset + len(change.data)
    position = change.offset
    while position < end:
        stop = min(position - position % sector + sector, end)
        if rng.random() < chance:
            data = change.data[position - change.offset : stop - change.offset]
            Change("", 0, position, data).apply(image)
        position = stop
    if end > len(image) and rng.random() < chance:
        image.extend(bytes(end - len(image)))
