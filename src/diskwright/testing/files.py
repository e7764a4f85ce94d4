"""A file in memory that remembers what was done to it, and fails on demand: for tests of what a
program makes of failing reads, full disks and losses of power."""

from __future__ import annotations

import errno
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ..records import NamedTuple
from .recorded import NEVER, Change, Recorded

KINDS = ("read", "write", "flush", "truncate")


class RecordingFile(Recorded, io.RawIOBase):
    """An open file of bytes, which may be given to :func:`diskwright.open` as any other.

    ``capacity`` in bytes: what goes beyond it is ENOSPC.  ``transfer``: the most bytes that one
    ``read`` or ``write`` moves, so that both are short.  ``calls`` counts by :data:`KINDS`.  It
    cannot be closed.
    """

    def __init__(
        self,
        data: bytes | os.PathLike[str] = b"",
        *,
        capacity: int = NEVER,
        transfer: int = NEVER,
        name: str = "recording",
    ) -> None:
        if isinstance(data, os.PathLike):
            with open(data, "rb") as file:
                data = file.read()
        super().__init__(data)
        self.capacity, self.transfer, self.name = capacity, transfer, name
        self.calls: Counter[str] = Counter()
        self.marks: list[tuple[int, Any]] = []
        """(moment, value) of each :meth:`mark`."""
        self._position = 0
        self._clock = 0
        self._failing: dict[tuple[str, int], tuple[int, int]] = {}

    # -- what a test says
    def fail(self, kind: str, nth: int = 1, *, code: int = errno.EIO, kept: int = 0) -> None:
        """Have the ``nth`` call of a kind from now on fail with the errno ``code``.  Of a write
        ``kept`` bytes are written (a torn write); a flush that fails makes nothing durable any
        more that was written before."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        self._failing[kind, self.calls[kind] + nth] = code, kept

    def mark(self, value: Any) -> None:
        """Remember that this was reached: crash states tell which marks came before."""
        self.marks.append((self._tick(), value))

    # -- what it is asked as a file
    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _begin(self, kind: str) -> tuple[int, int]:
        self.calls[kind] += 1
        return self._failing.pop((kind, self.calls[kind]), (0, 0))

    def _change(self, change: Change, lost: bool = False) -> None:
        self.log.append(change)
        change.apply(self.data)
        change.done, change.lost = self._tick(), lost

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = (0, self._position, len(self.data))[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "the position would be negative")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        code, _ = self._begin("read")
        if code:
            raise _error(code)
        view = memoryview(buffer).cast("B")
        part = self.data[self._position : self._position + min(len(view), self.transfer)]
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def write(self, data: Any, /) -> int:
        code, kept = self._begin("write")
        part = bytes(memoryview(data).cast("B")[: self.transfer])
        room = max(0, self.capacity - self._position)
        if not code and part and not room:
            code = errno.ENOSPC
        part = part[: kept if code else room]
        self._change(Change("write", self._tick(), self._position, part), bool(code))
        if code:
            raise _error(code)
        self._position += len(part)
        return len(part)

    def truncate(self, size: int | None = None, /) -> int:
        code, _ = self._begin("truncate")
        size = self._position if size is None else size
        if not code and size > max(self.capacity, len(self.data)):
            code = errno.ENOSPC
        if code:
            raise _error(code)
        self._change(Change("truncate", self._tick(), 0, b"", size))
        return size

    def flush(self) -> None:
        """What was written is durable."""
        code, _ = self._begin("flush")
        if code:
            self.forget()
            raise _error(code)
        self.barriers.append((self._tick(), self._tick()))

    def close(self) -> None:
        """Nothing: what it remembers is still wanted."""


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Crash(NamedTuple):
    """What a loss of power may have left: ``image``, when ``changes`` changes had been made;
    ``marks`` are those of :meth:`RecordingFile.mark` that had been reached."""

    image: bytes
    changes: int
    marks: tuple[Any, ...]


def crash_states(
    work: Callable[[RecordingFile], object],
    data: bytes | os.PathLike[str] = b"",
    *,
    each: int = 2,
    most: int = 500,
    seed: int = 0,
) -> Iterator[Crash]:
    """Run ``work`` on a file that holds ``data``, and give what a loss of power may leave of it:
    ``each`` states for every change and every flush, at most ``most``, drawn by ``seed``.

    Whatever a flush that had ended covers is there.  Of every other change each sector is there or
    not.
    """
    file = RecordingFile(data)
    work(file)
    rng = random.Random(seed)
    moments = {0, file._clock, *(c.issued for c in file.log), *(end for _, end in file.barriers)}
    every = [moment for moment in sorted(moments) for _ in range(each)]
    if len(every) > most:
        every = sorted(rng.sample(every, most))
    for moment in every:
        yield Crash(
            file.crash_state(moment, rng, rng.choice((512, 4096))),
            sum(change.issued <= moment for change in file.log),
            tuple(value for at, value in file.marks if at <= moment),
        )
