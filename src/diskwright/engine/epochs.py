"""Epochs: when host space that was freed may be used again.

Every batch enters an epoch after its lease is granted and leaves it when its I/O has ended.
Space freed by a commit goes through, in this order: metadata on disk, batches that may still hold
the old mapping ended, ``settle``, punch, ``release``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..contract import MAY_UNMAP, NO_FALLBACK, HostRange
from ..hints import TYPE_CHECKING, Any
from .kernel import Condition

if TYPE_CHECKING:
    from .engine import Engine


class Epochs:
    """The epochs of one engine, and the quarantine of what its format freed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last = 0
        self.active: dict[int, None] = {}
        self.quarantine: deque[tuple[int, Any]] = deque()
        self.punching = 0
        self.changed = Condition()
        self._watched = 0
        self._cannot_zero: set[str] = set()

    def enter(self) -> int:
        """A new epoch; the caller must `leave` it."""
        self.last += 1
        self.active[self.last] = None
        return self.last

    def leave(self, epoch: int) -> None:
        """The batch has ended, and all of its I/O with it."""
        del self.active[epoch]
        if self.quarantine:
            self.settle()
        if not self.active or self._watched:
            self.changed.notify()

    def defer(self, epoch: int, token: Any) -> None:
        """The groups of ``token`` are on disk; settle it when all batches up to ``epoch`` ended."""
        self.quarantine.append((epoch, token))
        self.settle()

    def settle(self) -> None:
        """Settle what may be settled, in order."""
        settled = False
        while self.quarantine:
            epoch, token = self.quarantine[0]
            if self.active and next(iter(self.active)) <= epoch:
                break
            self.quarantine.popleft()
            settled = True
            freed = self.engine.format.settle(token)
            if freed:
                self.punching += 1
                _ = self.engine.driver.spawn(self._punch(freed), name="punch")
        if settled:
            self.changed.notify()

    async def _punch(self, freed: list[HostRange]) -> None:
        """Make freed space read as zeroes if that is cheap, then hand it back."""
        by_slot: dict[str, list[HostRange]] = {}
        told = [part for part in freed if part.told]
        for part in sorted(told):
            parts = by_slot.setdefault(part.slot, [])
            if parts and parts[-1].offset + parts[-1].length == part.offset:
                parts[-1] = parts[-1]._replace(length=parts[-1].length + part.length)
            else:
                parts.append(part)
        zeroed = True
        try:
            for slot, parts in by_slot.items():
                zeroed &= await self.punch(slot, parts)
        finally:
            self.engine.forget_units()
            self.engine.format.release(told, zeroed)
            if len(told) < len(freed):
                self.engine.format.release([part for part in freed if not part.told], False)
            self.punching -= 1
            self.changed.notify()

    async def punch(self, slot: str, parts: list[HostRange]) -> bool:
        """Give host space back to ``slot``; True when it reads as zeroes afterwards."""
        offsets = [part.offset for part in parts]
        lengths = [part.length for part in parts]
        if await self.zero_cheaply(slot, offsets, lengths):
            return True
        try:
            await self.engine.slots[slot].discard(offsets, lengths)
        except OSError:
            pass  # advisory: the space is used again as it is
        return False

    async def zero_cheaply(
        self, slot: str, offsets: Sequence[int], lengths: Sequence[int]
    ) -> bool:
        """Zero ranges of ``slot`` without writing data; False (some may hold what they held) where
        it cannot do that."""
        if slot not in self._cannot_zero:
            try:
                await self.engine.slots[slot].zero(offsets, lengths, MAY_UNMAP | NO_FALLBACK)
                return True
            except OSError:
                self._cannot_zero.add(slot)
        return False

    def idle(self) -> bool:
        """True when nothing waits for an epoch, a punch or a release."""
        return not (self.quarantine or self.punching)

    async def quiet(self) -> None:
        """Wait until no batch is active and the quarantine is empty."""
        while self.active or not self.idle():
            self.engine.check_failed()
            await self.changed.wait()

    async def passed(self) -> None:
        """Wait until every batch that is active now has ended."""
        last = self.last
        self._watched += 1
        try:
            while self.active and next(iter(self.active)) <= last:
                await self.changed.wait()
        finally:
            self._watched -= 1
