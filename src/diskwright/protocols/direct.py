"""Transfers around the page cache: aligned requests through aligned memory, one pool job for each
run, so that the medium sees as many at a time as there are."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence
from itertools import pairwise

from ..engine.kernel import BaseDriver, wait_all
from .base import Buffer, clear
from .os_portable import Portable, Writable

_CANDIDATES = (1, 512, 1024, 2048, 4096)
_LARGEST = 1 << 20
"""Bytes a call; longer runs become several, in flight together."""
_KEPT = 8 << 20
"""Bytes in buffers of one size that wait to be used again."""


def probe_alignment(table: Portable, fd: int, size: int) -> int:
    """The smallest request that reads, found by trying.  At the end of a file every request
    "reads", so an empty one counts as the coarsest; so does one that lets a single byte be read:
    ext4 and XFS allow that where the file begins with a hole, and nowhere else."""
    if not size:
        return _CANDIDATES[-1]
    memory = mmap.mmap(-1, _CANDIDATES[-1])
    for candidate in _CANDIDATES:
        try:
            with memoryview(memory) as view:
                table.read(fd, (view[:candidate],), 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return candidate if candidate > 1 else _CANDIDATES[-1]
    raise OSError(errno.EINVAL, "no request size up to 4096 bytes can be read directly")


class Memory:
    """Page-aligned buffers, used again.  Called from several threads."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, length: int) -> mmap.mmap:
        """At least ``length`` bytes."""
        size = max(4096, 1 << (length - 1).bit_length())
        try:
            return self._free.setdefault(size, []).pop()
        except IndexError:
            return mmap.mmap(-1, size)

    def give(self, memory: mmap.mmap) -> None:
        """Done with it."""
        free = self._free[len(memory)]
        if len(free) * len(memory) < _KEPT:
            free.append(memory)


class DirectIO:
    """Aligned columns over a descriptor that goes around the page cache."""

    def __init__(self, driver: BaseDriver, table: Portable, fd: int, alignment: int) -> None:
        self.driver, self.table, self.fd, self.alignment = driver, table, fd, alignment
        self.memory = Memory()

    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        """Read; zeroes beyond the end."""
        views: Sequence[Writable] = list(map(bytearray, lengths)) if into is None else into
        jobs = []
        group: list[Writable] = []
        start = end = -1
        for offset, view in zip(offsets, views, strict=True):
            if offset != end or end - start + len(view) > _LARGEST:
                if group:
                    jobs.append(self.driver.call(self._get, start, group))
                group, start, end = [], offset, offset
            group.append(view)
            end += len(view)
        if group:
            jobs.append(self.driver.call(self._get, start, group))
        await wait_all(jobs)
        return views

    async def write(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        """Write; of overlapping requests the later wins."""
        runs: list[tuple[int, list[Buffer]]] = []
        end = -1
        start = 0
        for offset, buffer in zip(offsets, buffers, strict=True):
            if offset != end or end - start + len(buffer) > _LARGEST:
                runs.append((offset, []))
                start = end = offset
            runs[-1][1].append(buffer)
            end += len(buffer)
        spans = sorted((o, o + sum(map(len, group))) for o, group in runs)
        if any(a[1] > b[0] for a, b in pairwise(spans)):
            await self.driver.call(self._put_in_order, runs)
        else:
            await wait_all([self.driver.call(self._put, o, group) for o, group in runs])

    def _get(self, start: int, group: list[Writable]) -> None:
        length = sum(map(len, group))
        if length > _LARGEST:
            single = memoryview(group[0])
            for at in range(0, length, _LARGEST):
                self._get(start + at, [single[at : at + _LARGEST]])
            return
        memory = self.memory.take(length)
        whole = memoryview(memory)
        done = 0
        while done < length:
            count = self.table.read(self.fd, (whole[done:length],), start + done)
            done += count
            if not count or count % self.alignment:
                break
        at = 0
        for view in group:
            have = min(max(done - at, 0), len(view))
            view[:have] = whole[at : at + have]
            clear(view, have, len(view))
            at += len(view)
        whole.release()
        self.memory.give(memory)

    def _put_in_order(self, runs: list[tuple[int, list[Buffer]]]) -> None:
        for offset, group in runs:
            self._put(offset, group)

    def _put(self, start: int, group: list[Buffer]) -> None:
        length = sum(map(len, group))
        if length > _LARGEST:
            single = memoryview(group[0])
            for at in range(0, length, _LARGEST):
                self._put(start + at, [single[at : at + _LARGEST]])
            return
        memory = self.memory.take(length)
        with memoryview(memory) as whole:
            at = 0
            for buffer in group:
                whole[at : at + len(buffer)] = buffer
                at += len(buffer)
            done = 0
            while done < length:
                count = self.table.write(self.fd, (whole[done:length],), start + done)
                if not count or count % self.alignment:
                    raise OSError(errno.EIO, "a direct write ended inside a sector")
                done += count
        self.memory.give(memory)
