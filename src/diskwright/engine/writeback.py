"""Write-back: how dirty metadata reaches the disk, and what flush means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..contract import Groups, MetaWrite, Table
from ..errors import FlushFailed
from ..hints import TYPE_CHECKING
from .kernel import Future, Task, gather, wait_all

if TYPE_CHECKING:
    from .engine import Engine


class Writeback:
    """Runs one freeze at a time; whoever asks before it starts shares it.

    Order: freeze (without an await before it), then the groups' `lead` and the data slots' flush,
    then each group and a barrier, then settle.  A barrier that fails is sticky: the kernel may have
    dropped what it covered, and no later one can bring that back.  A *write* that fails (the host
    is full) is not: what was frozen is kept, and the next flush begins with it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: OSError | None = None
        """Why the last write-back did not end; None when it did."""
        self._owed: tuple[Groups, list[Table], int] | None = None
        self._next: Task[None] | None = None
        self._current: Task[None] | None = None

    def kick(self) -> Task[None]:
        """The write-back that covers everything committed up to now."""
        if self._next is None:
            self._next = self.engine.driver.spawn(self._turn(self._current), name="write-back")
        return self._next

    async def flush(self) -> None:
        """All that was committed is durable.  Raises FlushFailed once a flush has failed."""
        self.engine.check_failed()
        await self.kick()

    def running(self) -> bool:
        """True while a write-back runs or is queued."""
        return self._next is not None or self._current is not None

    async def _turn(self, before: Task[None] | None) -> None:
        if before is not None:
            try:
                await before
            except OSError:
                pass  # its askers were told
        mine = self._current = self._next
        self._next = None
        try:
            await self.write()
        except OSError as error:
            self.error = error
            raise
        else:
            self.error = None
        finally:
            if self._current is mine:
                self._current = None
            self.engine.epochs.changed.notify()

    async def write(self) -> None:
        """One write-back (and before it what the last one could not write)."""
        if self._owed is not None:
            await self._pay(*self._owed)
        engine = self.engine
        engine.check_failed()
        was_dirty = engine.view.dirty()
        groups = engine.format.freeze()
        tables = [table for table in was_dirty if not table.dirty]
        for table in tables:
            table.writeback += 1
        self._owed = groups, tables, engine.epochs.last
        await self._pay(*self._owed)

    async def _pay(self, groups: Groups, tables: list[Table], epoch: int) -> None:
        """Write what was frozen.  Until that has succeeded its tables stay in write-back."""
        self.engine.check_failed()
        await self._write_groups(groups)
        self._owed = None
        for table in tables:
            table.writeback -= 1
        self.engine.epochs.defer(epoch, groups.token)
        self.engine.tables.trim()

    def check_room(self) -> None:
        """Raise the error of a write-back that could not end, once as much is dirty as may be: what
        cannot be written must not pile up."""
        if self.error is not None and self.engine.view.dirty_weight > self.engine.tables.budget:
            raise self.error

    async def _write_groups(self, groups: Groups) -> None:
        if groups.lead:
            await self.issue(groups.lead)
        await self.flush_slots(self.engine.data_slots)
        for group in groups.groups:
            await self.issue(group)
            await self.flush_slots({write.slot for write in group})

    async def before(self, groups: Groups) -> None:
        """Make a plan's `before` groups durable; shared by all plans that need them.

        It has an epoch of its own: whoever asked may be gone, and a procedure that takes the
        groups back must not meet them on their way.
        """
        engine = self.engine
        epoch = engine.epochs.enter()
        try:
            for group in groups.groups:
                await self.issue(group)
                await self.flush_slots({write.slot for write in group})
            engine.format.settle(groups.token)
        finally:
            engine.epochs.leave(epoch)

    async def issue(self, writes: Sequence[MetaWrite]) -> None:
        """Write all of ``writes``, unordered, each announced by its tag."""
        by_slot: dict[str, list[MetaWrite]] = {}
        for write in writes:
            by_slot.setdefault(write.slot, []).append(write)
        pending: list[Future[None]] = []
        for slot, parts in by_slot.items():
            child = self.engine.slots[slot]
            if child.wants_events:
                for part in parts:
                    pending.append(self.engine.driver.start(self._announced(part), io=True))
            else:
                pending.append(
                    self.engine.driver.start(
                        child.write([p.offset for p in parts], [p.data for p in parts]), io=True
                    )
                )
        await wait_all(pending)

    async def _announced(self, write: MetaWrite) -> None:
        child = self.engine.slots[write.slot]
        pause = child.event(write.tag)
        if pause is not None:
            await pause
        await child.write([write.offset], [write.data])

    async def flush_slots(self, names: Iterable[str]) -> None:
        """Flush the children in these slots; a failure is sticky."""
        slots = self.engine.slots
        names = sorted(name for name in names if name in slots)
        try:
            if len(names) == 1:
                await slots[names[0]].flush()
            else:
                await gather(self.engine.driver, [slots[name].flush() for name in names])
        except OSError as error:
            self.engine.fail(error)
            raise

    async def clean(self) -> None:
        """Flush until nothing is dirty, in write-back, in quarantine or being punched.

        Settling a freeze dirties tables again (decrements travel with the next freeze), so this
        takes a few turns; a format that never comes to rest is a defect, hence the bound.
        """
        engine = self.engine
        for _ in range(16):
            await self.flush()
            await engine.epochs.quiet()
            if not (engine.view.busy() or self.running() or not engine.epochs.idle()):
                return
        raise FlushFailed(OSError("metadata does not come to rest"))
