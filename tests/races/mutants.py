"""Each correctness rule broken on purpose: a patched method of the engine or of the toy, under
which the races must fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from diskwright.contract import Barrier, Groups, NeedMeta, Plan, Write
from diskwright.engine import futures
from diskwright.engine.allocate import Allocator
from diskwright.engine.engine import Engine
from diskwright.engine.epochs import Epochs
from diskwright.engine.flat import Flat
from diskwright.engine.futures import Cancelled, Future, Shared, Task
from diskwright.engine.leases import Lease, Leases
from diskwright.engine.procedure import Procedures
from diskwright.engine.spans import merge_spans
from diskwright.engine.tables import Tables, View
from diskwright.engine.writeback import Writeback
from diskwright.errors import NoSpace
from diskwright.protocols.bounce import Bounce
from diskwright.testing.toy import CLUSTER, COUNTS, OFFSET, Toy
from diskwright.units import align_down, align_up

TOYS = ("toy-backing", "toy", "toy-full", "toy-aligned")
Patch = Callable[[ExitStack], None]


class Mutant(NamedTuple):
    """``rule`` of the design that it breaks; ``cases`` are tried in turn, ``seeds`` on each.
    ``known`` is a case and a seed that showed it when that was written, which is tried first where
    the search takes seconds."""

    name: str
    rule: int
    apply: Patch
    cases: tuple[str, ...] = TOYS
    seeds: int = 150
    known: tuple[str, int] | None = None


MUTANTS: list[Mutant] = []


def mutant(
    rule: int,
    cases: tuple[str, ...] = TOYS,
    seeds: int = 150,
    known: tuple[str, int] | None = None,
) -> Callable[[Patch], Patch]:
    def add(function: Patch) -> Patch:
        name = function.__name__.replace("_", " ")
        MUTANTS.append(Mutant(name, rule, function, cases, seeds, known))
        return function

    return add


@contextmanager
def applied(one: Mutant) -> Iterator[None]:
    """Run with the mutation."""
    with ExitStack() as stack:
        one.apply(stack)
        yield


def put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(patch.object(owner, name, value))


def put_everywhere(stack: ExitStack, name: str, value: Any) -> None:
    """Replace a function of the kernel in every module that imported it by name."""
    original = getattr(futures, name)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("diskwright") and (
            module.__dict__.get(name) is original
        ):
            put(stack, module, name, value)


# -- rule 1: reserve, move, commit
@mutant(1)
def commit_before_the_data_are_moved(stack: ExitStack) -> None:
    async def plan_and_move(
        self: Allocator, ranges: Any, kind: str, overlay: Any, epoch: list[int], flags: int = 0
    ) -> bool:
        engine = self.engine
        pins: list[Any] = []
        try:
            plan = await self._plan(ranges, kind, pins, epoch)
            if plan is None:
                return kind == "discard"
            if plan.before is not None:
                before = plan.before
                await engine.shared.run("before", lambda: engine.writeback.before(before))
            engine.format.commit(plan)
            await self._move(plan, overlay, flags)
        finally:
            engine.unpin(pins)
        return True

    put(stack, Allocator, "plan_and_move", plan_and_move)


@mutant(1, known=("toy-backing", 1093))
def abort_takes_back_a_table_that_others_use(stack: ExitStack) -> None:
    plan_original, own_original, abort_original = Toy.plan, Toy._own_table, Toy.abort
    installed: dict[int, list[tuple[int, int, int]]] = {}
    now: list[tuple[int, int, int]] = []

    def own_table(self: Toy, index: int, old: int, cluster: int) -> None:
        now.append((index, self.l1[index], cluster))
        own_original(self, index, old, cluster)

    def plan(self: Toy, ranges: Any, kind: str) -> Any:
        now.clear()
        made = plan_original(self, ranges, kind)
        if isinstance(made, Plan):
            installed[id(made)] = list(now)
        return made

    def abort(self: Toy, plan: Plan) -> None:
        abort_original(self, plan)
        for index, before, cluster in installed.pop(id(plan), ()):
            self.l1[index] = before
            self.l1_dirty = True
            if before and (before & OFFSET) // CLUSTER in self.dropped:
                self.dropped.remove((before & OFFSET) // CLUSTER)
            block = self.block(cluster)
            if block is not None and self.uncount(block, cluster):
                self.free.add(cluster)

    put(stack, Toy, "plan", plan)
    put(stack, Toy, "_own_table", own_table)
    put(stack, Toy, "abort", abort)


@mutant(1)
def abort_keeps_nothing_reserved_back(stack: ExitStack) -> None:
    def abort(self: Toy, plan: Plan) -> None:
        self.free.update(plan.state.taken)  # counted still, and handed out again

    put(stack, Toy, "abort", abort)


# -- rule 2: leases
def _allocate(
    shared: bool = False, each: bool = False, epoch_first: bool = False
) -> Callable[..., Any]:
    async def allocate(
        self: Allocator, ranges: Any, kind: str, overlay: Any, flags: int = 0
    ) -> bool:
        if not ranges:
            return True
        engine = self.engine
        engine.check_failed()
        unit = engine.format.unit
        spans = merge_spans([(align_down(o, unit), align_up(o + n, unit)) for o, n in ranges])
        epoch = [engine.epochs.enter()] if epoch_first else []
        held: list[Lease] = []
        try:
            for part in [[span] for span in spans] if each else [spans]:
                held.append(await engine.leases.take(part, not shared))
            if not epoch:
                epoch.append(engine.epochs.enter())
            done = await self.plan_and_move(ranges, kind, overlay, epoch, flags)
        finally:
            if epoch:
                engine.epochs.leave(epoch[0])
            for lease in held:
                engine.leases.drop(lease)
        self.press()
        return done

    return allocate


@mutant(2)
def allocating_writes_take_shared_leases(stack: ExitStack) -> None:
    put(stack, Allocator, "allocate", _allocate(shared=True))


@mutant(2, ("cipher", "toy-cipher"))
def a_part_of_a_cipher_sector_is_written_under_a_shared_lease(stack: ExitStack) -> None:
    put(stack, Allocator, "allocate", _allocate(shared=True))


@mutant(2)
def a_lease_is_queued_for_each_range(stack: ExitStack) -> None:
    put(stack, Allocator, "allocate", _allocate(each=True))


@mutant(2, ("toy", "toy-aligned"), seeds=400, known=("toy", 1363))
def writes_in_place_take_no_lease(stack: ExitStack) -> None:
    take, try_take = Leases.take, Leases.try_take

    def try_free(self: Leases, spans: Any, exclusive: bool) -> Lease | None:
        if exclusive:
            return try_take(self, spans, exclusive)
        lease = Lease([], False)
        self.queue[lease] = None
        return lease

    async def take_free(self: Leases, spans: Any, exclusive: bool) -> Lease:
        return try_free(self, spans, exclusive) or await take(self, spans, exclusive)

    put(stack, Leases, "try_take", try_free)
    put(stack, Leases, "take", take_free)


@mutant(2, ("toy-aligned", "raw-offset-aligned"))
def read_modify_write_below_the_alignment_without_an_exclusive_lease(stack: ExitStack) -> None:
    class Loose(Leases):
        async def take(self, spans: Any, exclusive: bool) -> Lease:
            return await super().take(spans, False)

    original = Bounce.__init__

    def init(self: Bounce, alignment: int, *arguments: Any) -> None:
        original(self, alignment, *arguments)
        self.leases = Loose(alignment)

    put(stack, Bounce, "__init__", init)


# -- rule 3: epochs, and issued I/O is never abandoned
@mutant(3)
def the_epoch_is_entered_before_the_lease_is_granted(stack: ExitStack) -> None:
    put(stack, Allocator, "allocate", _allocate(epoch_first=True))


async def _hasty(futures_: Any, on_error: bool, on_cancel: bool) -> list[Any]:
    error: BaseException | None = None
    for future in futures_:
        while True:
            try:
                await future
            except Cancelled as cancelled:
                if on_cancel:
                    raise
                error = cancelled
                if not future.done:
                    continue
            except Exception as first:
                if on_error:
                    raise
                error = error or first
            break
    if error is not None:
        raise error
    return [f.value for f in futures_]


@mutant(3, known=("toy-backing", 1120))
def a_cancelled_request_leaves_its_io_behind(stack: ExitStack) -> None:
    def cancel(self: Task[Any]) -> None:
        if self.done:
            return
        self._cancelling = True
        if self._waiting is not None and not self._queued:
            self._queued = True
            self.driver.soon(self._step)

    async def wait_all(pending: Any) -> list[Any]:
        return await _hasty(pending, False, True)

    put(stack, Task, "cancel", cancel)
    put_everywhere(stack, "wait_all", wait_all)


@mutant(3)
def freed_space_is_used_before_the_metadata_are_on_disk(stack: ExitStack) -> None:
    async def write(self: Writeback) -> None:
        engine = self.engine
        engine.check_failed()
        was_dirty = engine.view.dirty()
        groups = engine.format.freeze()
        tables = [table for table in was_dirty if not table.dirty]
        for table in tables:
            table.writeback += 1
        engine.epochs.defer(engine.epochs.last, groups.token)
        try:
            await self._write_groups(groups)
        except BaseException:
            for table in tables:
                engine.view.mark(table)
            raise
        finally:
            for table in tables:
                table.writeback -= 1
        engine.tables.trim()

    put(stack, Writeback, "write", write)


@mutant(3, known=("toy-full", 1015))
def freed_space_is_used_while_older_batches_run(stack: ExitStack) -> None:
    original = Epochs.settle

    def settle(self: Epochs) -> None:
        active, self.active = self.active, {}
        try:
            original(self)
        finally:
            self.active = active

    put(stack, Epochs, "settle", settle)


@mutant(3)
def space_is_handed_out_before_it_is_punched(stack: ExitStack) -> None:
    async def punch(self: Epochs, freed: Any) -> None:
        self.engine.format.release(freed, False)
        try:
            for part in freed:
                await self.punch(part.slot, [part])
        finally:
            self.punching -= 1
            self.changed.notify()

    put(stack, Epochs, "_punch", punch)


# -- rule 4: shared work, groups
class Fragile:
    """A shared task that dies with the first waiter that is cancelled."""

    def __init__(self, task: Task[Any]) -> None:
        self.task = task

    @property
    def done(self) -> bool:
        return self.task.done

    def __await__(self) -> Iterator[Any]:
        try:
            return (yield from self.task.__await__())
        except Cancelled:
            self.task.cancel()
            raise


@mutant(4)
def cancelling_a_waiter_cancels_the_flush_that_others_share(stack: ExitStack) -> None:
    async def flush(self: Writeback) -> None:
        self.engine.check_failed()
        await Fragile(self.kick())

    put(stack, Writeback, "flush", flush)


@mutant(4, known=("toy-backing", 1112))
def cancelling_a_waiter_cancels_the_before_group_that_others_share(stack: ExitStack) -> None:
    original = Shared.run
    put(stack, Shared, "run", lambda self, key, make: Fragile(original(self, key, make)))


@mutant(4, ("toy", "toy-full"), seeds=400, known=("toy", 1166))
def a_group_ends_with_its_first_error(stack: ExitStack) -> None:
    async def wait_all(pending: Any) -> list[Any]:
        return await _hasty(pending, True, False)

    put_everywhere(stack, "wait_all", wait_all)


# -- rule 5: flush
def _groups(data: bool = True, barriers: bool = True, back: bool = False) -> Callable[..., Any]:
    async def write_groups(self: Writeback, groups: Groups) -> None:
        if groups.lead:
            await self.issue(groups.lead)
        if data:
            await self.flush_slots(self.engine.data_slots)
        for group in groups.groups[::-1] if back else groups.groups:
            await self.issue(group)
            if barriers:
                await self.flush_slots({write.slot for write in group})
        if not barriers:
            await self.flush_slots(self.engine.data_slots)

    return write_groups


@mutant(5)
def metadata_are_written_before_the_data_are_flushed(stack: ExitStack) -> None:
    put(stack, Writeback, "_write_groups", _groups(data=False))


@mutant(5)
def no_barriers_between_the_groups(stack: ExitStack) -> None:
    put(stack, Writeback, "_write_groups", _groups(barriers=False))


@mutant(5)
def the_groups_are_written_backwards(stack: ExitStack) -> None:
    put(stack, Writeback, "_write_groups", _groups(back=True))


@mutant(5, seeds=400)
def the_freeze_comes_after_the_flush_of_the_data(stack: ExitStack) -> None:
    original = Writeback.write
    put(stack, Writeback, "_write_groups", _groups(data=False))

    async def write(self: Writeback) -> None:
        await self.flush_slots(self.engine.data_slots)
        await original(self)

    put(stack, Writeback, "write", write)


def _trim(dirty: bool = True, pins: bool = True, writeback: bool = True) -> Callable[..., None]:
    def trim(self: Tables) -> None:
        for key, table in list(self._map.items()):
            if self.weight <= self.budget:
                break
            if (dirty and table.dirty) or (pins and table.pins) or (writeback and table.writeback):
                continue
            del self._map[key]
            self.weight -= table.size
            self.evicted += 1
            self._views[table.owner].generation += 1

    return trim


@mutant(5)
def a_table_in_write_back_is_evicted(stack: ExitStack) -> None:
    put(stack, Tables, "trim", _trim(writeback=False))


@mutant(5)
def a_table_that_a_plan_needs_is_evicted(stack: ExitStack) -> None:
    put(stack, Tables, "trim", _trim(pins=False))


@mutant(5)
def a_failed_flush_is_not_remembered(stack: ExitStack) -> None:
    put(stack, Engine, "fail", lambda self, error: self.epochs.changed.notify())


@mutant(5, seeds=400)
def a_failed_write_back_leaves_its_tables_clean(stack: ExitStack) -> None:
    async def write(self: Writeback) -> None:
        engine = self.engine
        engine.check_failed()
        was_dirty = engine.view.dirty()
        groups = engine.format.freeze()
        tables = [table for table in was_dirty if not table.dirty]
        epoch = engine.epochs.last
        for table in tables:
            table.writeback += 1
        try:
            await self._write_groups(groups)
        finally:
            for table in tables:
                table.writeback -= 1
        engine.epochs.defer(epoch, groups.token)
        engine.tables.trim()

    put(stack, Writeback, "write", write)


# -- rule 6: reference counts
@mutant(6)
def counts_are_lowered_when_the_map_changes(stack: ExitStack) -> None:
    original = Toy.commit

    def commit(self: Toy, plan: Plan) -> None:
        already = len(self.dropped)
        original(self, plan)
        later = []
        for cluster in self.dropped[already:]:
            block = self.block(cluster)
            if block is not None and block.data[cluster % COUNTS] > 0:
                block.data[cluster % COUNTS] -= 1
                self.tables.mark(block)
                early.setdefault(id(self), set()).add(cluster)
            later.append(cluster)
        self.dropped[already:] = later

    early: dict[int, set[int]] = {}
    settle_original = Toy.settle

    def settle(self: Toy, token: Any) -> Any:
        if token != "before":
            for cluster in token:
                block = self.block(cluster)
                if block is not None and cluster in early.get(id(self), ()):
                    early[id(self)].discard(cluster)
                    block.data[cluster % COUNTS] += 1
        return settle_original(self, token)

    put(stack, Toy, "commit", commit)
    put(stack, Toy, "settle", settle)


@mutant(6)
def a_snapshot_raises_the_counts_before_copied_is_cleared(stack: ExitStack) -> None:
    original = Toy.snapshot

    def swapped(self: Toy) -> Any:
        """Hold the first group of writes back until the second is on disk."""
        procedure = original(self)
        sent: Any = None
        writes: list[Write] = []
        while True:
            try:
                request = procedure.send(sent)
            except StopIteration as stop:
                return stop.value
            sent = None
            if isinstance(request, Write):
                writes.append(request)
            if len(writes) == 1:
                continue  # the write that clears COPIED, and its barrier
            sent = yield request
            if isinstance(request, Barrier) and len(writes) == 2:
                yield writes[0]
                yield Barrier()
                writes.append(writes[0])

    put(stack, Toy, "snapshot", swapped)


# -- rule 7: before
@mutant(7)
def the_before_group_is_skipped(stack: ExitStack) -> None:
    async def before(self: Writeback, groups: Groups) -> None:
        self.engine.format.settle(groups.token)

    put(stack, Writeback, "before", before)


@mutant(7, seeds=400)
def data_move_while_the_before_group_is_on_its_way(stack: ExitStack) -> None:
    original = Writeback.before

    async def before(self: Writeback, groups: Groups) -> None:
        self.engine.driver.spawn(original(self, groups), name="before, unawaited")

    put(stack, Writeback, "before", before)


@mutant(7, ("toy-idle",), seeds=500)
def a_withdrawal_meets_a_before_group_whose_askers_are_gone(stack: ExitStack) -> None:
    async def before(self: Writeback, groups: Groups) -> None:
        for group in groups.groups:
            await self.issue(group)
            await self.flush_slots({write.slot for write in group})
        self.engine.format.settle(groups.token)

    put(stack, Writeback, "before", before)


# -- rule 8: whole-image procedures
def _quiet(gate: bool = True, wait: bool = True, clean: int = 16) -> Callable[..., Any]:
    async def quiet(self: Procedures, procedure: Any) -> Any:
        engine = self.engine
        future: Future[None] = Future()
        if gate:
            engine.gate = future
        try:
            if wait:
                await engine.epochs.quiet()
            engine.check_failed()
            if clean == 1:
                await engine.writeback.flush()
            elif clean:
                await engine.writeback.clean()
            return await self._steps(procedure)
        finally:
            engine.gate = None
            future.set()

    return quiet


def _without_a_lease(stack: ExitStack) -> None:
    async def run(self: Procedures, procedure: Any, whole_image: bool) -> Any:
        self._serial += 1
        work = self._quiet if whole_image else self._steps
        return await self.engine.shared.run(("procedure", self._serial), lambda: work(procedure))

    put(stack, Procedures, "run", run)


@mutant(8)
def a_snapshot_between_map_and_write(stack: ExitStack) -> None:
    _without_a_lease(stack)


@mutant(8, ("qcow2-snapshots", "qcow2-snapshots-features"), seeds=300)
def a_snapshot_of_qcow2_between_map_and_write(stack: ExitStack) -> None:
    _without_a_lease(stack)


@mutant(8, ("qcow2-snapshots", "qcow2-snapshots-features"), seeds=300)
def tables_of_qcow2_are_kept_across_a_snapshot(stack: ExitStack) -> None:
    put(stack, View, "clear", lambda self: None)


@mutant(8, ("qcow2-amend",), seeds=300)
def an_amendment_beside_writers(stack: ExitStack) -> None:
    _without_a_lease(stack)
    put(stack, Procedures, "_quiet", _quiet(gate=False, wait=False))


@mutant(8)
def one_flush_is_taken_for_quiet(stack: ExitStack) -> None:
    put(stack, Procedures, "_quiet", _quiet(clean=1))


@mutant(8)
def a_procedure_runs_beside_dirty_tables(stack: ExitStack) -> None:
    put(stack, Procedures, "_quiet", _quiet(clean=0))


@mutant(8, seeds=300)
def reads_go_on_and_tables_are_kept_during_a_procedure(stack: ExitStack) -> None:
    async def no_wait(self: Epochs) -> None:
        while not self.idle():
            self.engine.check_failed()
            await self.changed.wait()

    put(stack, Procedures, "_quiet", _quiet(gate=False))
    put(stack, Epochs, "quiet", no_wait)
    put(stack, View, "clear", lambda self: None)


@mutant(8)
def tables_are_kept_across_a_procedure(stack: ExitStack) -> None:
    put(stack, View, "clear", lambda self: None)


# -- rule 9: budgets, no space
def _plan(leave: bool, unpin: bool = True, flush: bool = True) -> Callable[..., Any]:
    async def plan(self: Allocator, ranges: Any, kind: str, pins: Any, epoch: list[int]) -> Any:
        engine = self.engine
        for attempt in range(4):
            try:
                return await engine.ask(lambda: engine.format.plan(ranges, kind), pins)
            except NoSpace:
                if attempt == 3 or engine.failure is not None:
                    raise
                if unpin:
                    engine.unpin(pins)
                if leave:
                    engine.epochs.leave(epoch.pop())
                try:
                    if flush:
                        await engine.writeback.flush()
                    while not engine.epochs.idle():
                        engine.check_failed()
                        await engine.epochs.changed.wait()
                finally:
                    if leave:
                        epoch.append(engine.epochs.enter())
        raise NoSpace

    return plan


@mutant(9)
def no_space_is_met_inside_the_epoch(stack: ExitStack) -> None:
    put(stack, Allocator, "_plan", _plan(leave=False))


@mutant(9)
def the_asker_lets_its_tables_go_between_two_questions(stack: ExitStack) -> None:
    async def ask(self: Engine, question: Callable[[], Any], pins: Any) -> Any:
        while True:
            answer = question()
            if not isinstance(answer, NeedMeta):
                return answer
            await self.need(answer, pins)
            self.unpin(pins)

    put(stack, Engine, "ask", ask)


@mutant(9)
def no_space_without_a_flush_and_another_try(stack: ExitStack) -> None:
    async def plan(self: Allocator, ranges: Any, kind: str, pins: Any, epoch: list[int]) -> Any:
        engine = self.engine
        return await engine.ask(lambda: engine.format.plan(ranges, kind), pins)

    put(stack, Allocator, "_plan", plan)


# -- rule 12: what is known of a chain
CHAINS = ("qcow2-backing", "qcow2-chain", "toy-backing")


@mutant(12, CHAINS)
def windows_outlive_what_they_tell(stack: ExitStack) -> None:
    put(stack, Flat, "forget", lambda self, ranges: None)


@mutant(12, CHAINS, known=("qcow2-chain", 1096))
def windows_are_made_of_what_was_before(stack: ExitStack) -> None:
    put(stack, Flat, "forget", lambda self, ranges: self._erase(ranges))
