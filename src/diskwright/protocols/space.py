"""Space of a file or device: zeroes, discards, holes, allocation, copies inside the system.

These are the parts that run in the pool, on a descriptor.  What a file system turned out not to
support is remembered, so that it is asked once.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from ..errors import NotSupported, UsageError
from .os_portable import Device, Portable
from .transfer import put_zeroes

Span = tuple[int, int]  # start, end
Run = tuple[int, int, bool]  # start, end, data

_UNABLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.ENODEV)
_NO_COPY = (*_UNABLE, errno.EXDEV, errno.EPERM, errno.EBADF, errno.ETXTBSY, errno.EISDIR)
_AHEAD = 32  # runs of a map that are looked up beyond what was asked
_KEPT = 4096  # runs of a map that are remembered
_CLONE_UNIT = 4096


def merged(offsets: Sequence[int], lengths: Sequence[int]) -> list[Span]:
    """The ranges in order, joined where they meet."""
    out: list[Span] = []
    for offset, length in sorted(zip(offsets, lengths, strict=True)):
        if not length:
            continue
        if out and offset <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], offset + length))
        else:
            out.append((offset, offset + length))
    return out


class Discards:
    """Ranges of a file that were given back (``done``, together ``bytes``), and those where that
    ``failed``."""

    def __init__(self) -> None:
        self.done = self.failed = self.bytes = 0

    def count(self, asked: int, done: list[int]) -> None:
        """Of ``asked`` ranges those were given back that ``done`` has the lengths of."""
        self.done += len(done)
        self.failed += asked - len(done)
        self.bytes += sum(done)


class Space:
    """The space of what one descriptor has open."""

    def __init__(self, table: Portable, fd: int, device: Device) -> None:
        self.table, self.fd, self.device = table, fd, device
        self.missing: set[str] = set()

    def _try(self, row: str, *arguments: int) -> bool:
        """Call a row; False when this file cannot do it."""
        if row in self.missing:
            return False
        try:
            getattr(self.table, row)(self.fd, *arguments)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self.missing.add(row)
            return False
        return True

    # -- zeroes and discards
    def zero(self, spans: list[Span], unmap: bool) -> tuple[list[Span], list[Span]]:
        """Zero without writing.  What is left: (whole ranges that only writing can zero, ends of
        ranges below the sector of a device, which are always written)."""
        if self.device.kind == "device":
            return self._zero_device(spans, unmap)
        end = max((b for _, b in spans), default=0)
        left: list[Span] = []
        # The rows zero inside the file; what it grows by is zero already.
        size = self._size()
        if end > size:
            self.table.extend(self.fd, end)
        for start, end in spans:
            length = end - start
            if unmap and self._try("punch", start, length):
                continue
            if self._try("zero_range", start, length):
                continue
            # Without ZERO_RANGE: a hole that is allocated again reads as zeroes and is reserved.
            if "allocate" not in self.missing and not unmap and self._try("punch", start, length):
                self._try("allocate", start, length)
                continue
            if start < size:
                left.append((start, min(end, size)))
        return left, []

    def _zero_device(self, spans: list[Span], unmap: bool) -> tuple[list[Span], list[Span]]:
        sector = self.device.sector
        left: list[Span] = []
        edges: list[Span] = []
        for start, end in spans:
            first, last = -(-start // sector) * sector, end // sector * sector
            if first >= last:
                edges.append((start, end))
                continue
            done = unmap and self._try("zero_device", first, last - first, 1)
            if not done and not self._zero_out(first, last - first):
                left.append((start, end))
                continue
            edges += [(a, b) for a, b in ((start, first), (last, end)) if a < b]
        return left, edges

    def _zero_out(self, offset: int, length: int) -> bool:
        if "zero_out" in self.missing:
            return False
        try:
            self.table.zero_device(self.fd, offset, length, False)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self.missing.add("zero_out")
            return False
        return True

    def discard(self, spans: list[Span]) -> list[int]:
        """Give the space back where it can be; how many bytes of each span, up to the first where
        that cannot be done."""
        done: list[int] = []
        if self.device.kind == "device":
            sector = self.device.sector
            for start, end in spans:
                first, last = -(-start // sector) * sector, end // sector * sector
                if first < last and not self._try("discard_device", first, last - first):
                    return done
                done.append(max(last - first, 0))
            return done
        size = self._size()
        for start, end in spans:
            end = min(end, size)
            if start < end and not self._try("punch", start, end - start):
                return done
            done.append(max(end - start, 0))
        return done

    def _size(self) -> int:
        return self.table.device(self.fd).size

    # -- length
    def resize(self, size: int, preallocation: str) -> None:
        """Set the length; new space is a hole (off), reserved (falloc) or written (full)."""
        if preallocation not in ("off", "falloc", "full"):
            raise UsageError(f"Unsupported preallocation mode '{preallocation}'")
        old = self._size()
        if self.device.kind == "device":
            if size > old:
                raise NotSupported("Cannot grow device files")
            return
        if size < old and preallocation != "off":
            raise NotSupported("Preallocation can't be used for shrinking files")
        if size <= old or preallocation == "off":
            self.table.truncate(self.fd, size)
            return
        try:
            if preallocation == "falloc" and self._try("allocate", old, size - old):
                return
            put_zeroes(self.table, self.fd, old, size)
            if preallocation == "full":
                self.table.sync(self.fd)
        except BaseException:
            self.table.truncate(self.fd, old)
            raise

    # -- copies
    def copy(self, source: int, offset: int, at: int, length: int) -> int:
        """Copy from the descriptor ``source`` inside the system; bytes copied, 0 if it cannot."""
        table = self.table
        if "clone" not in self.missing and not (offset | at | length) % _CLONE_UNIT:
            try:
                table.clone(source, offset, self.fd, at, length)
                return length
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                self.missing.add("clone")
        if "copy" in self.missing:
            return 0
        try:
            return table.copy(source, offset, self.fd, at, length)
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise
            self.missing.add("copy")
            return 0


class HoleMap:
    """Where a file has data, remembered for a window of it until something changes."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.starts: list[int] = []
        self.changes = 0

    def forget(self) -> None:
        """The file was changed."""
        self.changes += 1
        if self.runs:
            self.runs, self.starts = [], []

    def add(self, runs: list[Run], changes: int) -> None:
        """Remember ``runs``, which follow each other, if nothing changed since ``changes``."""
        if changes != self.changes or not runs:
            return
        if self.runs and self.runs[-1][1] == runs[0][0] and len(self.runs) < _KEPT:
            self.runs += runs
        else:
            self.runs = list(runs[:_KEPT])
        self.starts = [run[0] for run in self.runs]

    def at(self, offset: int) -> Run | None:
        """The run that holds ``offset``, if it is known."""
        index = bisect_right(self.starts, offset) - 1
        if index >= 0 and offset < self.runs[index][1]:
            return self.runs[index]
        return None


def find_runs(table: Portable, fd: int, start: int, stop: int, size: int) -> list[Run]:
    """Runs of data and holes from ``start`` to at least ``stop``, and some more, up to ``size``."""
    runs: list[Run] = []
    at = start
    while at < size and (at < stop or len(runs) < _AHEAD):
        found = table.data_from(fd, at)
        if found is None:
            runs.append((at, size, False))
            break
        first, end = found
        if first > at:
            runs.append((at, min(first, size), False))
        if first < size:
            runs.append((first, min(max(end, first + 1), size), True))
        at = max(end, first + 1)
    return runs


def rough_runs(
    table: Portable, fd: int, start: int, stop: int, least_hole: int
) -> Iterator[tuple[int, bool]]:
    """Ends of the runs of data and holes from ``start`` to ``stop``, alternating, and whether each
    is data.

    Where holes are dense the file is asked once in ``least_hole`` bytes only, so between data a
    hole is missed that is not twice as long.
    """
    at = known = start
    while at < stop:
        found = table.data_from(fd, at)
        first, end = (stop, stop) if found is None else found
        first, end = min(first, stop), min(max(end, first + 1), stop)
        if first - at >= least_hole or (at == start < first):
            if known < at and ((again := table.data_from(fd, known)) is None or again[0] >= at):
                at = known  # nothing followed the last data
            if at > start:
                yield at, True
            yield first, False
            start = first
        at = end if end - first >= least_hole else min(first + least_hole, stop)
        known = end
    if start < stop:
        yield stop, True
