"""The map of a salvage: which ranges of the disk are lost, which are guessed, and why.

As text it is a mapfile of GNU ddrescue (its manual, "Mapfile structure"), so that other tools can
read it: ``+`` for what was read, ``-`` for what is lost, ``?`` for what is guessed; the reasons
stand in comments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..findings import GUESSED, LOST, Note
from ..records import NamedTuple

_MOST = 1 << 18
_MANY = "several damages, too many to tell apart"


class Damages:
    """What becomes a map: parts in ascending order, joined where they continue each other."""

    def __init__(self) -> None:
        self.parts: list[Note] = []

    def add(self, start: int, length: int, state: str, why: str) -> None:
        """Add what lies behind everything that was added before."""
        last = self.parts[-1] if self.parts else None
        if last is not None and last == (start - last.length, last.length, state, why):
            self.parts[-1] = last._replace(length=last.length + length)
            return
        if last is not None and len(self.parts) >= _MOST:
            worst = LOST if LOST in (state, last.state) else GUESSED
            self.parts[-1] = Note(last.start, start + length - last.start, worst, _MANY)
            return
        self.parts.append(Note(start, length, state, why))


class DamageMap(NamedTuple):
    """Of a disk of ``size`` bytes the ``parts`` that were not simply read, in ascending order; at
    most 262,144 of them."""

    size: int
    parts: tuple[Note, ...]

    def total(self, state: str) -> int:
        """Bytes in this state."""
        return sum(part.length for part in self.parts if part.state == state)

    def text(self, remarks: Iterable[str]) -> Iterator[str]:
        """The lines of a mapfile."""
        yield "# Mapfile. Created by diskwright salvage"
        for remark in remarks:
            yield f"# {remark}".replace("\n", " ")
        for part in self.parts:
            yield f"# {part.state}: {part.start:#x} {part.length:#x} {part.why}".replace("\n", " ")
        yield "# current_pos  current_status  current_pass"
        yield f"{self.size:#010x}     +               1"
        yield "#      pos        size  status"
        at = 0
        for part in self.parts:
            if part.start > at:
                yield f"{at:#010x}  {part.start - at:#010x}  +"
            yield f"{part.start:#010x}  {part.length:#010x}  {'-' if part.state == LOST else '?'}"
            at = part.start + part.length
        if at < self.size:
            yield f"{at:#010x}  {self.size - at:#010x}  +"
