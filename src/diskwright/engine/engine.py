"""The engine of one node: a format, its slots, and all that must hold between them."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Sequence

from ..bitmaps import BitmapSet
from ..contract import FastMap, Format, NeedMeta, Range, Table, total
from ..errors import CorruptImage, FlushFailed
from ..extents import Extent
from ..hints import TYPE_CHECKING, Any, Generic, TypeVar
from .epochs import Epochs
from .kernel import BaseDriver, Future, Shared, wait_all
from .leases import Leases
from .node import Node
from .procedure import Procedures
from .tables import Tables

if TYPE_CHECKING:
    from .allocate import Allocator
    from .flat import Flat
    from .pack import Packer
    from .packed import Unpacker
    from .read import Reader
    from .transform import Transformer
    from .write import Writer
    from .writeback import Writeback
    from .zero import Zeroer

T = TypeVar("T")

Opener = Callable[[str, str, str | None, bool], Awaitable[None]]
Creator = Callable[[str, str], Awaitable[None]]


class part(Generic[T]):
    """``functools.cached_property``, for parts that are imported when they are first asked for."""

    def __init__(self, make: Callable[[Engine], T]) -> None:
        self._make = make

    def __get__(self, engine: Engine, owner: type[Engine]) -> T:
        made = engine.__dict__[self._make.__name__] = self._make(engine)
        return made


class Engine:
    """Moves all data of one format.

    ``slots`` maps slot names to child nodes; the dict is the owner's and may change between
    requests.  ``data_slots`` are those that a flush must flush (all but the backing file).
    ``opener(slot, reference, format, writable)`` opens what the image names; without one it is
    refused.
    """

    def __init__(
        self,
        driver: BaseDriver,
        format: Format,
        slots: dict[str, Node],
        tables: Tables,
        opener: Opener | None = None,
    ) -> None:
        self.driver = driver
        self.format = format
        found: BitmapSet | None = getattr(format, "bitmaps", None)
        self.bitmaps = BitmapSet() if found is None else found
        """What writes are told to; see `mark` there for when."""
        self.slots = slots
        self.tables = tables
        self.view = tables.view()
        format.tables = self.view
        self.opener = opener
        self.leases = Leases()
        self.epochs = Epochs(self)
        self.shared = Shared(driver)
        self.creator: Creator | None = None
        """Makes a file beside the image: ``creator(slot, name)``."""
        self.flat: Flat | None = None
        """The whole chain as one map, while nobody writes to it."""
        self.procedures = Procedures(self)
        self.gate: Future[None] | None = None
        """Set while a whole-image procedure runs: new reads wait for it."""
        self.failure: OSError | None = None
        fast: FastMap = format  # type: ignore[assignment]  # None where it offers no shortcut
        self.map_one = fast.map_one if hasattr(format, "map_one") else None
        self.map_batch = fast.map_batch if hasattr(format, "map_batch") else _no_map
        self._loading: dict[tuple[str, int], Future[None]] = {}

    @part
    def reader(self) -> Reader:
        """For the guest's reads."""
        from .read import Reader

        return Reader(self)

    @part
    def writer(self) -> Writer:
        """For the guest's writes."""
        from .write import Writer

        return Writer(self)

    @part
    def zeroer(self) -> Zeroer:
        """For zeroes and discards."""
        from .zero import Zeroer

        return Zeroer(self)

    @part
    def allocator(self) -> Allocator:
        """For what changes the map."""
        from .allocate import Allocator

        return Allocator(self)

    @part
    def writeback(self) -> Writeback:
        """For metadata that are dirty."""
        from .writeback import Writeback

        return Writeback(self)

    @part
    def unpacker(self) -> Unpacker:
        """For compressed units; most disks have none."""
        from .packed import Unpacker

        return Unpacker(self)

    @part
    def packer(self) -> Packer:
        """For units that are to be compressed; most disks get none."""
        from .pack import Packer

        return Packer(self)

    @part
    def transformer(self) -> Transformer:
        """For what is encrypted."""
        from .transform import Transformer

        return Transformer(self)

    def forget_units(self) -> None:
        """Host space may hold something else from now on: unpacked units are void."""
        unpacker: Unpacker | None = self.__dict__.get("unpacker")
        if unpacker is not None:
            unpacker.forget()

    @property
    def zero_unit(self) -> int:
        """What zeroes and discards are aligned to, in bytes; see `FineZeroes`."""
        unit: int = getattr(self.format, "zero_unit", self.format.unit)
        return unit

    # -- failure
    def fail(self, error: OSError) -> None:
        """Remember the first failed flush; from now on every flush fails."""
        if self.failure is None:
            self.failure = error
        self.epochs.changed.notify()

    def check_failed(self) -> None:
        """Raise FlushFailed if a flush has failed."""
        if self.failure is not None:
            raise FlushFailed(self.failure)

    def check_bounds(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Raise OSError(EIO) for a range that ends beyond the image."""
        size = self.format.size
        for offset, length in ranges:
            if offset < 0 or offset + length > size:
                raise OSError(errno.EIO, f"request beyond the end of the image, offset {offset}")

    @property
    def data_slots(self) -> list[str]:
        """The slots whose nodes hold what this node wrote."""
        return [name for name in self.slots if name != "backing"]

    # -- tables
    async def need(self, miss: NeedMeta, pins: list[Table]) -> None:
        """Load the missing tables, all in one batch, and pin them for the asker.

        A load runs in its own task: an asker that is cancelled leaves it to the others.
        """
        slot = miss.slot
        wanted = list(miss.ranges)
        while wanted:
            fresh = [r for r in wanted if (slot, r[0]) not in self._loading]
            if fresh:
                task = self.driver.spawn(self._load(slot, fresh, miss.tag), name="load")
                for offset, _ in fresh:
                    self._loading[slot, offset] = task
            waits = {id(f): f for r in wanted if (f := self._loading.get((slot, r[0])))}
            await wait_all(list(waits.values()))
            absent = []
            for offset, length in wanted:
                table = self.view.get(slot, offset)
                if table is None:  # dropped between its load and our turn
                    absent.append((offset, length))
                else:
                    table.pins += 1
                    pins.append(table)
            wanted = absent

    async def _load(self, slot: str, ranges: list[tuple[int, int]], tag: str) -> None:
        epoch = self.epochs.enter()
        try:
            if self.driver.budget is not None:
                self.driver.budget.read(total(ranges))
            child = self.slots[slot]
            if child.wants_events:
                for _ in ranges:
                    pause = child.event(tag)
                    if pause is not None:
                        await pause
            data = await child.read([r[0] for r in ranges], [r[1] for r in ranges])
            for (offset, _), raw in zip(ranges, data, strict=True):
                if self.view.get(slot, offset) is None:
                    self.format.load(slot, offset, bytes(raw))
        finally:
            for offset, _ in ranges:
                self._loading.pop((slot, offset), None)
            self.epochs.leave(epoch)

    def unpin(self, pins: list[Table]) -> None:
        """Let the asker's tables go."""
        for table in pins:
            table.pins -= 1
        pins.clear()
        self.tables.trim()

    async def ask(self, question: Callable[[], T | NeedMeta], pins: list[Table]) -> T:
        """Repeat ``question`` until no table is missing.  They stay pinned until it succeeds."""
        while True:
            try:
                answer = question()
            except CorruptImage as error:
                error.met_by = error.met_by or self
                raise
            if not isinstance(answer, NeedMeta):
                return answer
            await self.need(answer, pins)

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        """See :meth:`~diskwright.contract.Format.map`.  What is corrupt here is no fault of an
        image above, through which it is read."""
        try:
            return self.format.map(ranges)
        except CorruptImage as error:
            error.met_by = error.met_by or self
            raise

    async def map_range(self, offset: int, length: int) -> list[Extent]:
        """The extents of one range, in the caller's epoch."""
        return await self.map_ranges([(offset, length)])

    async def map_ranges(self, ranges: Sequence[Range]) -> list[Extent]:
        """The extents of all ranges, one after the other, in the caller's epoch."""
        found: list[Extent] = []
        pins: list[Table] = []
        todo = [(offset, length) for offset, length in ranges if length]
        try:
            while todo:
                extents, miss = self.map(todo)
                found += extents
                done = 0
                for extent in extents:
                    offset, length = todo[done]
                    if extent.length < length:
                        todo[done] = offset + extent.length, length - extent.length
                    else:
                        done += 1
                del todo[:done]
                if todo and miss is not None:
                    await self.need(miss, pins)
        finally:
            self.unpin(pins)
        return found

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """The extents of one range."""
        while self.gate is not None:
            await self.gate
        epoch = self.epochs.enter()
        try:
            return await self.map_range(offset, length)
        finally:
            self.epochs.leave(epoch)

    async def announce(self, slot: str, tag: str) -> None:
        """Tell a child that listens what is about to be issued."""
        pause = self.slots[slot].event(tag)
        if pause is not None:
            await pause

    async def flush(self) -> None:
        """All that was answered is durable.  Waits for a whole-image procedure: its changes are
        its own to write, and no freeze may take them half done."""
        while self.gate is not None:
            await self.gate
        await self.writeback.flush()

    async def reclaim(self) -> None:
        """Make what was given up so far durable, and with that ready to be used again."""
        await self.flush()
        while not self.epochs.idle():
            self.check_failed()
            await self.epochs.changed.wait()

    # -- end
    async def close(self) -> None:
        """Wait for shared work; flush until nothing is dirty; run the format's closing procedure.

        Raises the sticky error if there is one.
        """
        await self.shared.drain()
        self.check_failed()
        await self.writeback.clean()
        closing: Any = getattr(self.format, "close", None)
        procedure = closing() if closing is not None else None
        if procedure is not None:
            await self.procedures.run(procedure, whole_image=True)


def _no_map(offsets: Sequence[int], lengths: Sequence[int], write: bool) -> Sequence[int]:
    """The shortcut of a format without one."""
    return [-1] * len(offsets)
