"""The loops that move a batch over a descriptor, and the guard that says where they run."""

from __future__ import annotations

import errno
from collections.abc import Sequence

from .base import Buffer, clear
from .os_portable import Portable, Writable

_ZERO_STEP = 1 << 16
_ZERO_RUN = 16  # buffers a call when zeroes are written


def fill(table: Portable, fd: int, offset: int, view: Writable) -> None:
    """Read all of ``view``; zeroes beyond the end of the file."""
    whole = memoryview(view)
    done, length = 0, len(whole)
    while done < length:
        count = table.read(fd, (whole[done:],), offset + done)
        if not count:
            clear(whole, done, length)
            return
        done += count


def fill_all(table: Portable, fd: int, requests: Sequence[tuple[int, Writable]]) -> None:
    """Read all requests; neighbours go into one call."""
    at = 0
    while at < len(requests):
        start, view = requests[at]
        group = [view]
        end = start + len(view)
        while (
            at + len(group) < len(requests)
            and len(group) < table.vectors
            and requests[at + len(group)][0] == end
        ):
            view = requests[at + len(group)][1]
            group.append(view)
            end += len(view)
        if len(group) == 1 or table.read(fd, group, start) != end - start:
            for offset, view in requests[at : at + len(group)]:
                fill(table, fd, offset, view)
        at += len(group)


def put(table: Portable, fd: int, offset: int, buffer: Buffer, done: int = 0) -> None:
    """Write all of ``buffer`` from its byte ``done`` on."""
    whole = memoryview(buffer)
    while done < len(whole):
        count = table.write(fd, (whole[done:],), offset + done)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        done += count


def put_all(table: Portable, fd: int, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
    """Write all requests in order; neighbours go into one call."""
    at, count = 0, len(offsets)
    while at < count:
        start = end = offsets[at]
        last = at
        while last < count and offsets[last] == end and last - at < table.vectors:
            end += len(buffers[last])
            last += 1
        written = table.write(fd, buffers[at:last], start) if last - at > 1 else 0
        if written != end - start:
            for index in range(at, last):
                length = len(buffers[index])
                put(table, fd, offsets[index], buffers[index], min(written, length))
                written -= min(written, length)
        at = last


def put_zeroes(table: Portable, fd: int, start: int, end: int) -> None:
    """Write zeroes from ``start`` to ``end``."""
    block = bytes(_ZERO_STEP)
    while start < end:
        left = min(end - start, _ZERO_STEP * _ZERO_RUN)
        buffers: list[Buffer] = [block] * (left // _ZERO_STEP)
        if left % _ZERO_STEP:
            buffers.append(block[: left % _ZERO_STEP])
        offsets = [start + i * _ZERO_STEP for i in range(len(buffers))]
        put_all(table, fd, offsets, buffers)
        start += left


class Guard:
    """Whether buffered writes run at once, on the thread that asks.

    They do while they are quick.  One long stall, or several short ones within a second, sends
    them to the pool for a while, which doubles every time it happens again soon.  A busy machine
    looks the same as a stalled file, so after a first slow batch the next ones are watched: a
    thread that never waited was only not scheduled.  Times in seconds.
    """

    patience = 0.005
    too_long = 0.050
    hopeless = 0.250  # counts also when nobody watched
    strikes = 3
    watch = 2.0
    first_pause = 0.05
    longest_pause = 5.0

    __slots__ = ("before", "count", "last", "pause", "table", "until", "watching")

    def __init__(self, table: Portable) -> None:
        self.table = table
        self.watching = 0.0
        """Until when; 0: not."""
        self.before: int | None = None
        self.count = 0
        self.last = 0.0
        self.until = 0.0
        self.pause = self.first_pause

    def look(self, now: float) -> None:
        """Called before a batch while ``watching``."""
        if now > self.watching:
            self.watching = 0.0
        else:
            self.before = self.table.waits()

    def slow(self, now: float, took: float) -> None:
        """A batch that ended ``now`` took longer than ``patience``."""
        if not self.watching:
            self.watching = now + self.watch
            if took < self.hopeless:
                return
        elif self.before is not None and self.table.waits() == self.before:
            return
        self.watching = now + self.watch
        if now - self.last > 1.0:
            self.count = 0
        self.last = now
        self.count += 1
        if took < self.too_long and self.count < self.strikes:
            return
        if now - self.until > 4 * self.longest_pause:
            self.pause = self.first_pause
        self.count = 0
        self.until = now + self.pause
        self.watching = self.until + self.watch
        self.pause = min(self.pause * 2, self.longest_pause)
