"""How fast a job may be."""

from __future__ import annotations

from ..errors import UsageError


class Pace:
    """At most ``speed`` bytes a second; 0: as many as possible.  Times are in seconds."""

    def __init__(self, speed: int) -> None:
        if speed < 0:
            raise UsageError("Parameter 'speed' expects a non-negative value")
        self.speed = speed
        self._free = 0.0

    def spend(self, count: int, now: float) -> None:
        """``count`` bytes were processed."""
        if self.speed:
            self._free = max(self._free, now) + count / self.speed

    def left(self, now: float) -> float:
        """How long nothing is to be processed."""
        return max(self._free - now, 0.0)
