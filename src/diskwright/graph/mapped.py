"""A node that is a format over slots: all of its data movement is the engine's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ..contract import Format, Limits, Procedure
from ..engine.engine import Engine, Opener
from ..engine.kernel import BaseDriver, Timer
from ..engine.tables import Tables
from ..errors import CorruptImage, DamagedData, DiskError, NodeClosed, NotSupported
from ..extents import Extent
from ..hints import Any
from .node import Buffer, Node


class MappedNode(Node):
    """Format + slots + engine.

    ``children`` fill the slots; they are attached, not owned: whoever closes the graph closes
    them.  ``opener`` opens what the image names (through the gate); see :class:`Engine`.
    """

    def __init__(
        self,
        driver: BaseDriver,
        driver_name: str,
        format: Format,
        children: dict[str, Node],
        tables: Tables | None = None,
        name: str = "",
        opener: Opener | None = None,
    ) -> None:
        self._limits: Limits | None = None
        self._look = True  # whether there is a chain to be looked through is not known
        self._procedures = 0  # that run: they may change any map
        super().__init__(driver, driver_name, name)
        self.format = format
        self._slots: dict[str, Node] = {}
        self.engine = Engine(driver, format, self._slots, tables or Tables(), opener)
        self.closed = False
        self.keeps_discarded = False
        """Discards do nothing."""
        self._cleaning: Timer | None = None
        self.creations: Any = None
        """Makes files beside the image (:class:`.creating.Creations`); None where nothing may."""
        for slot, child in children.items():
            self.attach(slot, child)

    # -- structure
    def child_changed(self, slot: str) -> None:
        edge = self.children.get(slot)
        if edge is None:
            self._slots.pop(slot, None)
        else:
            self._slots[slot] = edge.child
            format: Any = self.format
            if slot == "backing" and hasattr(format, "has_backing"):
                # A caller may give a backing file to an image that names none: its unallocated
                # clusters then stop reading as zeroes.
                format.has_backing = True
            if slot == "file" and hasattr(format, "follow"):
                format.follow(edge.child.size)  # a disk that is as long as its file
        self._limits = None
        self.changed()

    def changed(self) -> None:
        self._look = True
        self.engine.flat = None
        super().changed()

    @property
    def limits(self) -> Limits:
        """Of all children but the backing file; merged when they are asked for, as a disk may be
        in a thousand files."""
        if self._limits is None:
            found = Limits()
            for name, child in self._slots.items():
                if name != "backing":
                    found = found.merged(child.limits)
            self._limits = found
        return self._limits

    @limits.setter
    def limits(self, value: Limits) -> None:
        """Ignored at construction; they are the children's."""

    @property
    def size(self) -> int:
        return self.format.size

    @size.setter
    def size(self, value: int) -> None:
        """Ignored at construction; the format knows its size."""

    # -- requests
    async def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Sequence[Buffer]:
        if self._look:
            self._look = False
            if "backing" in self._slots and not self._procedures:
                from ..engine.flat import flat_of

                self.engine.flat = flat_of(self)
        try:
            return await self.engine.reader.read(offsets, lengths, into)
        except CorruptImage as error:
            raise await self._corrupt(error) from error

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        self._writable()
        try:
            await self.engine.writer.write(offsets, buffers, flags)
        except CorruptImage as error:
            raise await self._corrupt(error) from error

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        self._writable()
        try:
            await self.engine.zeroer.zero(offsets, lengths, flags)
        except CorruptImage as error:
            raise await self._corrupt(error) from error

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        self._writable()
        if self.keeps_discarded:
            return
        try:
            await self.engine.zeroer.discard(offsets, lengths)
        except CorruptImage as error:
            raise await self._corrupt(error) from error

    async def flush(self) -> None:
        if self.read_only or self.closed:
            return
        await self.engine.flush()

    async def extents(self, offset: int, length: int) -> list[Extent]:
        try:
            return await self.engine.extents(offset, length)
        except CorruptImage as error:
            raise await self._corrupt(error) from error

    async def truncate(self, size: int, preallocation: str = "off", shrink: bool = True) -> None:
        self._writable()
        resize = getattr(self.format, "resize", None)
        if resize is None:
            raise NotSupported(f"{self.driver_name} images cannot be resized")
        for bitmap in self.engine.bitmaps:
            if bitmap.busy:
                bitmap.check()
        await self.run_procedure(resize(size, preallocation, shrink))
        self.engine.bitmaps.truncate(self.size)
        self.changed()

    async def _corrupt(self, error: CorruptImage) -> CorruptImage:
        """Metadata were met that nothing must go by: let the format mark the image, so that
        nobody writes to it before it is repaired.  What was answered before still gets flushed.
        """
        mark = getattr(self.format, "mark_corrupt", None)
        ours = error.met_by in (self.engine, self.format)
        sound = isinstance(error, DamagedData) or not ours
        procedure = mark() if mark is not None and not sound else None
        if procedure is None:
            return error
        try:
            await self.run_procedure(procedure)
        except (OSError, DiskError):
            pass  # the format refuses to write from now on, mark or no mark
        told = CorruptImage(
            f"{self.driver_name}: Marking image as corrupt: {error.detail}; "
            "further corruption events will be suppressed"
        )
        told.marked = True
        return told

    def _writable(self) -> None:
        if self.closed:
            raise NodeClosed(f"node '{self.name}' is closed")
        if self.read_only:
            raise PermissionError(1, "Operation not permitted: the node is read-only")

    # -- tables
    def keep_tables(self) -> None:
        """Give the format's tables the memory that its options ask for, and forget those that it
        does not use for as long as they say.  Called once it is open, and closing ends it."""
        format: Any = self.format
        if self._cleaning is not None:
            self._cleaning.cancel()
        self.engine.tables.claim(self.engine.view.owner, getattr(format, "table_budget", None))
        interval = getattr(format, "clean_interval", 0)
        if interval:
            self._cleaning = self.driver.later(interval, self._forget_unused)

    def _forget_unused(self) -> None:
        if not self.closed:
            format: Any = self.format
            self.engine.view.forget_unused()
            self._cleaning = self.driver.later(format.clean_interval, self._forget_unused)

    # -- procedures
    async def run_procedure(
        self,
        procedure: Procedure,
        whole_image: bool = True,
        on_progress: Callable[[int, int], Awaitable[None] | None] | None = None,
    ) -> Any:
        """Run a format's procedure; ``whole_image``: alone, with nothing dirty (rule 8)."""
        self.engine.procedures.on_progress = on_progress
        self._procedures += 1
        self.engine.flat = None
        try:
            if self.creations is None:
                return await self.engine.procedures.run(procedure, whole_image)
            attempt = self.creations.attempt(procedure)
            try:
                return await self.engine.procedures.run(attempt.procedure, whole_image)
            except BaseException:
                await attempt.undo()
                raise
        except CorruptImage as error:
            if not whole_image:
                raise
            raise await self._corrupt(error) from error
        finally:
            self._procedures -= 1
            self._look = True

    async def close(self) -> None:
        if self.closed:
            return
        try:
            if not self.read_only:
                try:
                    await self.engine.close()
                except CorruptImage as error:
                    raise await self._corrupt(error) from error
            else:
                await self.engine.shared.drain()
        finally:
            self.closed = True
            if self._cleaning is not None:
                self._cleaning.cancel()
            self.engine.view.clear()
            self.engine.tables.withdraw(self.engine.view.owner)
