"""How far an operation is: what a caller of the Python API is told, and how it says "stop"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import OperationCancelled
from ..records import NamedTuple


class Progress(NamedTuple):
    """``done`` of ``total`` steps: bytes of a disk, or whatever the operation counts.

    ``total`` is 0 as long as it is not known.  ``finished`` is true of the last report alone.
    """

    done: int
    total: int
    finished: bool = False

    @property
    def fraction(self) -> float:
        """What is done, from 0.0 to 1.0."""
        return 1.0 if self.finished else self.done / self.total if self.total else 0.0


OnProgress = Callable[[Progress], object]
"""Is told at the start, at the end, and between; an answer of ``False`` stops the operation."""


@contextmanager
def reporting(progress: OnProgress | None) -> Iterator[Callable[[int, int], None] | None]:
    """What an operation tells of its progress goes to ``progress``.

    Raises OperationCancelled when that answered ``False``, whatever the operation made of it:
    most take an error for one of the disk, and some go on behind one.
    """
    if progress is None:
        yield None
        return
    total = 0
    stopped = False

    def tell(now: Progress) -> None:
        nonlocal stopped
        if stopped or progress(now) is False:
            stopped = True
            raise OperationCancelled

    def on_progress(done: int, of: int) -> None:
        nonlocal total
        total = of
        tell(Progress(done, of))

    tell(Progress(0, 0))
    try:
        yield on_progress
    except Exception:
        if stopped:
            raise OperationCancelled from None
        raise
    if stopped:
        raise OperationCancelled
    progress(Progress(total, total, True))
