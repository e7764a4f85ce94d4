"""How changes reach the disk: the log, the headers, and the order of both."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from ...contract import (
    Barrier,
    Groups,
    HostRange,
    Length,
    MetaWrite,
    Plan,
    Procedure,
    Range,
    Truncate,
    Write,
)
from ...errors import DiskError
from ...hints import Any, overload
from ...ondisk import little_endian_bytes
from ...units import align_down, align_up
from . import log
from .core import PART
from .log import Change
from .planning import BEFORE
from .structures import MIB, NO_GUID, SLOT, Header
from .zeroing import Zeroing

_EMPTY = bytes(PART)
_MOST_SECTORS = 80
"""Longest entry of a freeze: nobody else runs during a checksum, some 30 ms for so many."""


class LogGroups(Sequence[list[MetaWrite]]):
    """Groups whose bytes are made when they are asked for."""

    def __init__(self) -> None:
        self._makers: list[Callable[[], list[MetaWrite]]] = []

    def append(self, maker: Callable[[], list[MetaWrite]]) -> None:
        """One more, which ``maker`` makes (the same at every call)."""
        self._makers.append(maker)

    @overload
    def __getitem__(self, index: int) -> list[MetaWrite]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[MetaWrite]]: ...
    def __getitem__(self, index: int | slice) -> list[MetaWrite] | list[list[MetaWrite]]:
        if isinstance(index, slice):
            return [maker() for maker in self._makers[index]]
        return self._makers[index]()

    def __len__(self) -> int:
        return len(self._makers)


class Frozen:
    """Token of a freeze: the blocks that are free once its groups are on disk."""

    __slots__ = ("freed",)

    def __init__(self, freed: list[Range]) -> None:
        self.freed = freed


class Writeback(Zeroing):
    """The way to the disk.

    Every entry of the log is a sequence by itself: its tail is its own place.  It holds sectors
    that are written, once it is durable, to where they belong, and only when they are durable
    the next entry follows.  So a replay finds either the new entry or, if that is torn, the one
    before, which changes nothing any more.  No entry is longer than a third of the log: it never
    lies over the one before, and never goes around the end of the ring.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._freed: list[Range] = []
        self._log_at = 0
        self._log_sequence = 0
        self._gave_back = False
        """Space has come free in this session."""

    def abort(self, plan: Plan) -> None:
        """See `Planner.abort`."""
        self._gave_back = True
        super().abort(plan)

    def free_later(self, place: int, length: int) -> None:
        """A block to which nothing points once the next freeze is on disk."""
        self._freed.append((place, length))

    # -- freeze
    def freeze(self) -> Groups:
        """All dirty tables, in one step.

        Sector bitmaps go before the BAT: an entry that says "partially present" relies on them.
        """
        if not self.announced:
            # A plan was given out, so the headers are on their way (`before`).
            return Groups([])
        bitmaps: list[tuple[int, bytes]] = []
        slices: list[tuple[int, bytes]] = []
        for table in self.tables.dirty():
            table.dirty = False
            if type(table.data) is array:
                slices.append((table.offset, little_endian_bytes(table.data)))
            else:
                bitmaps.append((table.offset, bytes(table.data)))
        changes = as_changes(sorted(bitmaps)) + as_changes(sorted(slices))
        flushed = max(align_down(self.length, MIB), self.used)
        last = max(align_up(self.length, MIB), self.used, self.installed)
        groups = self.log_groups(changes, flushed, last, _MOST_SECTORS)
        self.used = max(self.used, self.installed)
        freed, self._freed = self._freed, []
        return Groups(groups, Frozen(freed))

    def log_groups(
        self, changes: Sequence[Change], flushed: int, last: int, most: int | None = None
    ) -> LogGroups:
        """Pairs of groups: an entry, and what it says.  ``flushed``: bytes that the file has for
        certain; ``last``: bytes that it has with all of this; ``most``: sectors of an entry."""
        groups = LogGroups()
        third = self.header.log_length // log.SECTOR // 3
        most = third if most is None else min(most, third)
        for batch in log.batches(changes, most):
            guid = self.header.log_guid
            first = guid == NO_GUID
            if first:
                guid = self.new_guid()
                self._log_at = self._log_sequence = 0
            self._log_sequence += 1
            sectors = log.sectors_for(
                sum([change.data is None for change in batch]),
                sum([change.data is not None for change in batch]),
            )
            length = sectors * log.SECTOR
            if self._log_at + length > self.header.log_length:
                self._log_at = 0
            at = self._log_at
            place = self.header.log_offset + at
            entry = (batch, guid, self._log_sequence, at, flushed, last)
            groups.append(partial(_logged_entry, place, *entry))
            self._log_at = at + length
            if first:
                for group in self._switch(self.next_headers(log_guid=guid)):
                    groups.append(partial(list, group))
            groups.append(partial(_updates, batch))
        return groups

    def _switch(self, headers: tuple[Header, Header]) -> list[list[MetaWrite]]:
        """Groups that put both headers on disk."""
        self.header = headers[1]
        return [[MetaWrite(SLOT, h.offset, h.encode())] for h in headers]

    # -- after the disk
    def settle(self, token: Any) -> list[HostRange]:
        """What the frozen groups let go is free."""
        if token == BEFORE:
            if self._next is not None:
                self.header, self._next = self._next[1], None
            self.announced = True
            self.ready = not self.broken
            return []
        if token is None:
            return []
        assert isinstance(token, Frozen)
        return [HostRange(SLOT, place, length) for place, length in token.freed]

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None:
        """Punched space may be used again."""
        self._gave_back = True
        for part in ranges:
            self.give_back_punched(part.offset, part.length, zeroed)

    def give_back_punched(self, place: int, length: int, zeroed: bool) -> None:
        """Space in the file that nothing points at any more."""
        (self.clean if zeroed else self.dirty).add(place, length)

    # -- for procedures, which run alone and with nothing dirty
    def announce(self, data: bool = True) -> Procedure:
        """Put the GUIDs of this session into the headers, before the file is changed (2.2.2.1).

        ``data``: what the guest sees changes, too.
        """
        if self.announced:
            return
        headers = self.next_headers(
            file_guid=self.new_guid(), data_guid=self.new_guid() if data else None
        )
        yield from self._put(headers)
        # The next write of a guest still has to change the GUID of the data.
        self.announced = data
        self.ready = data and not self.broken

    def logged(self, changes: Sequence[Change], length: int) -> Procedure:
        """Make ``changes`` by way of the log.  ``length``: bytes that the file has, durably;
        each entry is a change by itself, a crash may come between two of them."""
        last = max([length, *[change.offset + change.length for change in changes]])
        for group in self.log_groups(
            changes, align_down(length, MIB), align_up(last, MIB)
        ):
            yield Write(group)
            yield Barrier()

    def empty_log(self) -> Procedure:
        """Say in the headers that the log holds nothing.  All that it holds is durable."""
        if self.header.log_guid != NO_GUID:
            yield Barrier()
            yield from self._put(self.next_headers(log_guid=NO_GUID))

    def _put(self, headers: tuple[Header, Header]) -> Procedure:
        for group in self._switch(headers):
            yield Write(group)
            yield Barrier()

    # -- the end
    def mark_corrupt(self) -> Procedure | None:
        """Refuse all further writes; there is no mark for it in a VHDX file.  None when that has
        happened before."""
        if self.broken or not self.writable:
            return None
        self.broken = True
        self.ready = False
        return self._rest()

    @staticmethod
    def _rest() -> Procedure:
        yield Barrier()

    def close(self) -> Procedure | None:
        """The procedure that empties the log and cuts off what became free at the end of the file;
        None if there is nothing to do."""
        if not self.writable or (self.header.log_guid == NO_GUID and not self._gave_back):
            return None
        return self._finish()

    def _finish(self) -> Procedure:
        # A log says how long the file was: it must not be found in a shorter one.
        yield from self.empty_log()
        end = self.end_in_use()
        if not self._gave_back or not self.end_reads_zero or end >= (yield Length(SLOT)):
            return
        with suppress(OSError, DiskError):  # it stays as free space
            yield Truncate(SLOT, end)
            yield Barrier()
            self.forget_space()
            self.set_length(end)


def _logged_entry(place: int, *entry: Any) -> list[MetaWrite]:
    return [MetaWrite(SLOT, place, log.encode_entry(*entry))]


def _updates(batch: Sequence[Change]) -> list[MetaWrite]:
    return [
        MetaWrite(SLOT, offset, bytes(size) if data is None else data, "l2_update")
        for offset, size, data in batch
    ]


def as_changes(sectors: list[tuple[int, bytes]]) -> list[Change]:
    """Changes for (offset, 4 KiB), ascending; neighbours that are zero become one."""
    out: list[Change] = []
    for offset, data in sectors:
        if data != _EMPTY:
            out.append(Change(offset, PART, data))
        elif out and out[-1].data is None and out[-1].offset + out[-1].length == offset:
            out[-1] = out[-1]._replace(length=out[-1].length + PART)
        else:
            out.append(Change(offset, PART, None))
    return out
