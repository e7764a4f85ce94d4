"""Limits that blkdebug pretends to have, and cutting requests to fit them."""

from __future__ import annotations

from itertools import pairwise

from ..contract import Limits
from ..engine.kernel import Condition
from ..errors import UsageError
from ..hints import Any
from ..units import align_down, align_up, is_power_of_two

_INT_MAX = (1 << 31) - 1


class Busy:
    """The ranges that writes work on just now.

    A write of ragged ends needs its units alone, others share them.  Unlike the engine's leases
    this is no queue: a request waits only for those at work, not for one that itself still waits,
    because which of two stopped requests goes first is what breakpoints are there to decide.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, int, bool]] = []
        self._changed = Condition()

    async def take(self, start: int, end: int, alone: bool) -> tuple[int, int, bool]:
        """Wait until ``start`` ... ``end`` can be worked on; give the result to :meth:`drop`."""
        while any(s < end and start < e and (alone or a) for s, e, a in self._held):
            await self._changed.wait()
        mine = (start, end, alone)
        self._held.append(mine)
        return mine

    def drop(self, mine: tuple[int, int, bool]) -> None:
        """The work on a range has ended."""
        self._held.remove(mine)
        self._changed.notify()


def cut(offset: int, length: int, most: int) -> list[tuple[int, int]]:
    """A range in pieces of at most ``most`` bytes (0: in one)."""
    if not most or length <= most:
        return [(offset, length)] if length else []
    return [(at, min(most, offset + length - at)) for at in range(offset, offset + length, most)]


def by_unit(start: int, end: int, unit: int, most: int) -> list[tuple[int, int, bool]]:
    """A range as (offset, length, whole): pieces of whole units of at most ``most`` bytes, and
    what is left at the ends."""
    first, last = align_up(start, unit), align_down(end, unit)
    if first >= last:
        return [(start, end - start, False)] if start < end else []
    pieces = [(start, first - start, False)] if start < first else []
    most = align_down(most, unit) or (unit if most else 0)
    pieces += [(at, length, True) for at, length in cut(first, last - first, most)]
    if last < end:
        pieces.append((last, end - last, False))
    return pieces


def apart(spans: list[tuple[int, int]]) -> bool:
    """True when no two of the ranges overlap."""
    ordered = sorted(spans)
    return all(a[1] <= b[0] for a, b in pairwise(ordered))


def limits_of(options: dict[str, Any]) -> Limits:
    """The limits that the options ask for; each must be a multiple of what it rests on."""

    def taken(name: str, unit: int) -> int:
        value: int = options.get(name) or 0
        if value and (value > _INT_MAX or value % unit):
            raise UsageError(f"Cannot meet constraints with {name} {value}")
        return value

    alignment = options.get("align") or 1
    if alignment > _INT_MAX or not is_power_of_two(alignment):
        raise UsageError(f"Cannot meet constraints with align {alignment}")
    transfer = taken("max-transfer", alignment)
    zero = taken("opt-write-zero", alignment) or 1
    most_zero = taken("max-write-zero", max(alignment, zero))
    discard = taken("opt-discard", alignment) or 1
    most_discard = taken("max-discard", max(alignment, discard))
    return Limits(alignment, transfer, zero, most_zero, discard, most_discard)
