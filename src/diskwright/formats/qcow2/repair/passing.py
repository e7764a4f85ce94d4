"""Passing over the runs of entries of L2 tables in which nothing is to be mended."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from ....hints import TYPE_CHECKING
from ....ondisk import big_endian_bytes
from ..check.checking import Checker
from ..check.scan import Run, pieces
from ..machine.core import OFFSET
from .entrymending import EntryMending

if TYPE_CHECKING:
    from ..format import Qcow2

_SLICE = 4096


class Passing(EntryMending):
    """Looks at entries one by one only where that is needed."""

    def __init__(self, image: Qcow2, found: Checker) -> None:
        super().__init__(image, found)
        self.fixed = image.header.crypt_method == 2
        """Clusters stay where they are."""
        self.sharing = self.fixed or bool(image.snapshot_table)
        """A cluster may have several references."""

    def spans(self, table: array[int], run: Callable[[Run], bool]) -> Iterator[range]:
        """The places in a table that must be looked at one by one, a few thousand at a time: all
        but empty ones and runs of entries for which ``run`` says that nothing is to be done."""
        for piece in pieces(big_endian_bytes(table), self.size, self.stride == 2):
            if isinstance(piece, Run):
                if run(piece):
                    continue
                stop = piece.at + piece.length
            else:
                stop = piece.at + len(piece.entries)
            for start in range(piece.at, stop, _SLICE):
                last = min(start + _SLICE, stop)
                yield range(start * self.stride, last * self.stride, self.stride)

    def free_run(self, run: Run) -> bool:
        """The run is in the file, and nothing else is where it is."""
        first = (run.entry & OFFSET) >> self.bits
        stop = first + run.length
        if self.external:
            return True
        alone = stop <= self.end and not any(self.claims.used(first, stop))
        return alone and not self._crowded(first, stop)

    def claim_run(self, run: Run) -> bool:
        """The same; it is somebody's from now on."""
        if not self.free_run(run):
            return False
        if not (self.external or self.sharing):
            first = (run.entry & OFFSET) >> self.bits
            self.claims.add_run(first, first + run.length)
        return True


def nothing(run: Run) -> bool:
    """Pass over no run."""
    return False
