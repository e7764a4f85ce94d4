"""One seed: several clients on one graph under the seeded scheduler, then crashes, then a clean
end; every byte against the model."""

from __future__ import annotations

import errno
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

from diskwright.contract import FUA, MAY_UNMAP
from diskwright.engine.futures import BaseDriver, Cancelled
from diskwright.errors import FlushFailed, NotSupported, UsageError
from diskwright.formats.qcow2.format import Qcow2
from diskwright.graph.mapped import MappedNode
from diskwright.testing.model import Mismatch, Model, Request
from diskwright.testing.scheduler import InlineDriver, SeededDriver
from diskwright.testing.toy import Toy

from . import snaps
from .cases import CASES, Case, Graph

Stats = Counter[str]


class Damage(AssertionError):
    """The image is not what it has to be (check, snapshot, or flag)."""


class Kept:
    """A snapshot: where it is, and when it was taken and given up."""

    def __init__(self, slot: Any, begun: int, ended: int) -> None:
        self.slot, self.begun, self.ended = slot, begun, ended
        self.gone: int | None = None


class Run:
    """One seed of one case."""

    def __init__(self, name: str, seed: int, clients: int = 4, turns: int = 14) -> None:
        self.rng = random.Random(seed * 1_000_003 + 7)
        self.case: Case = CASES[name](self.rng)
        self.driver = SeededDriver(seed, eager=None)
        self.graph: Graph = self.case.build(self.driver)
        self.node = self.graph.top
        self.model = Model(self._first(), self.driver.tick)
        self.stats: Stats = Counter()
        self.clients, self.turns = clients, turns
        self.kept: list[Kept] = []
        self.idles: list[list[int]] = []
        self.busy = False
        self.cancels = self.rng.random() < 0.5 or self.case.idle
        self.heavy = self.rng.random() < 0.3
        self.last = 0
        self.faulty = False

    def _first(self) -> bytes:
        return self.case.base[: self.case.size].ljust(self.case.size, b"\0")

    # -- requests
    def range(self) -> tuple[int, int]:
        rng, unit, size = self.rng, self.case.unit, self.case.size
        length = rng.choice(self.case.lengths)
        if rng.random() < 0.5:
            offset = rng.randrange(size - length)
        else:
            offset = min(size - length, rng.randrange(size) // unit * unit)
        if self.heavy:
            offset %= self.case.heavy
        return offset, min(length, size - offset)

    async def _finish(
        self,
        requests: list[Request],
        coro: Coroutine[Any, Any, None],
        fua: bool,
        exact: bool = True,
    ) -> None:
        ok = False
        try:
            await coro
            ok = exact
        finally:
            moment = self.driver.tick()
            for request in requests:
                request.finish(moment, ok, ok and fua)

    async def write(self) -> None:
        requests, offsets, buffers = [], [], []
        fua = self.rng.random() < 0.1
        taken: list[tuple[int, int]] = []
        for _ in range(self.rng.choice([1, 1, 2, 4, 5])):
            offset, length = self.range()
            if any(a < offset + length and offset < b for a, b in taken) and fua:
                continue
            taken.append((offset, offset + length))
            request, data = self.model.write(offset, length)
            requests.append(request)
            offsets.append(offset)
            buffers.append(data)
        work = self.node.write(offsets, buffers, FUA if fua else 0)
        await self._finish(requests, work, fua)

    async def read(self) -> None:
        begun = self.driver.tick()
        ranges = [self.range() for _ in range(self.rng.choice([1, 1, 3, 5]))]
        into = None
        if self.rng.random() < 0.5:
            into = [memoryview(bytearray(b"\xee" * n)) for _, n in ranges]
        found = await self.node.read([o for o, _ in ranges], [n for _, n in ranges], into)
        ended = self.driver.tick()
        for (offset, _), data in zip(ranges, found, strict=True):
            self.model.check(bytes(data), offset, begun, ended, "read")

    async def zero(self) -> None:
        offset, length = self.range()
        length = min(self.case.size - offset, 2 * length)
        flags = self.rng.choice([0, MAY_UNMAP]) | (FUA if self.rng.random() < 0.1 else 0)
        requests = [self.model.zero(offset, length)]
        work = self.node.zero([offset], [length], flags)
        await self._finish(requests, work, bool(flags & FUA))

    async def discard(self) -> None:
        offset, length = self.range()
        length = min(self.case.size - offset, 2 * length)
        unit = getattr(self.format, "zero_unit", self.format.unit)
        start = -(-offset // unit) * unit
        end = offset + length
        if end < self.case.size:
            end -= end % unit
        if start >= end:
            return await self.node.discard([offset], [length])
        # A last partial unit counts as whole, unless the disk grows before its turn comes.
        whole = end - end % unit if self.case.resizes else end
        work = self.node.discard([offset], [length])
        loose = [self.model.zero(a, b - a) for a, b in [(max(start, whole), end)] if a < b]
        exact = [self.model.zero(a, b - a) for a, b in [(start, whole)] if a < b]
        try:
            return await self._finish(exact, work, False, exact=self.case.exact_discard)
        finally:
            for request in loose:
                request.finish(self.driver.tick(), False, False)

    async def flush(self) -> None:
        begun = self.driver.tick()
        await self.node.flush()
        self.model.flushed(begun)

    async def procedure(self, generator: Any) -> Any:
        return await self.node.run_procedure(generator)  # type: ignore[attr-defined]

    @property
    def format(self) -> Any:
        return self.graph.order[-1][0].format

    async def snapshot(self) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            begun = self.driver.tick()
            slot = await self.procedure(snaps.take(self.format))
            if slot is not None:
                self.kept.append(Kept(slot, begun, self.driver.tick()))
                self.stats["snapshots"] += 1
        finally:
            self.busy = False

    async def unsnapshot(self) -> None:
        live = [k for k in self.kept if k.gone is None]
        if self.busy or not live:
            return
        self.busy = True
        try:
            chosen = self.rng.choice(live)
            chosen.gone = self.driver.tick()
            await self.procedure(snaps.give_up(self.format, chosen.slot))
            self.stats["snapshots deleted"] += 1
        finally:
            self.busy = False

    async def amend(self) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            await self.procedure(self.format.amend(self.rng.choice(self.case.amendments), False))
            self.stats["amended"] += 1
        except (NotSupported, UsageError):  # of a key that is not there
            self.stats["amendments refused"] += 1
        finally:
            self.busy = False

    async def withdraw(self) -> None:
        entry = [self.driver.tick(), 1 << 62]
        self.idles.append(entry)
        await self.procedure(self.format.withdraw())
        entry[1] = self.driver.tick()
        self.stats["withdrawn"] += 1

    async def resize(self) -> None:
        """Behind the end of what the clients use, the disk grows and shrinks."""
        size = self.case.size
        bigger = size + self.rng.choice([0, 8192, 131072])
        await self.node.truncate(bigger)
        self.stats["resizes"] += 1

    # -- clients
    def _menu(self) -> Sequence[Any]:
        if self.case.idle:
            return [self.write, self.write, self.withdraw, self.withdraw, self.flush]
        menu = [self.write] * 6 + [self.read] * 4 + [self.zero, self.discard, self.discard]
        menu += [self.flush, self.flush]
        if self.case.snapshots:
            menu += [self.snapshot, self.unsnapshot]
        if self.case.resizes:
            menu.append(self.resize)
        if self.case.amendments:
            menu.append(self.amend)
        if self.case.withdraws:
            menu.append(self.withdraw)
        return menu

    async def client(self) -> None:
        menu = self._menu()
        whole = (self.snapshot, self.unsnapshot, self.amend, self.withdraw)
        for _ in range(self.turns):
            action = self.rng.choice(menu)
            task = self.driver.spawn(action(), name=action.__name__)
            may_cancel = self.cancels and self.rng.random() < 0.35 and action not in whole
            if may_cancel:
                self.driver.later(self.rng.randrange(40), task.cancel)
            self.stats["requests"] += 1
            try:
                await task
            except OSError as error:
                self._expected(error)
            except Cancelled:
                if not may_cancel:
                    raise Damage(f"{action.__name__} was cancelled, and nobody asked") from None
                self.stats["cancelled"] += 1

    def _expected(self, error: OSError) -> None:
        self.stats["errors"] += 1
        if isinstance(error, FlushFailed) and not self.faulty:
            raise error
        if error.errno not in (errno.EIO, errno.ENOSPC):
            raise error
        if error.errno == errno.EIO and not self.faulty:
            raise error
        if error.errno == errno.ENOSPC:
            self.stats["no space"] += 1

    def _faults(self) -> None:
        rng = self.rng
        if not self.case.faults or rng.random() < 0.5:
            return
        for leaf in self.graph.leaves:
            if rng.random() < 0.7:
                self.faulty = True
                leaf.fail_at = {
                    leaf.requests + rng.randrange(5, 300): rng.choice([errno.EIO, errno.ENOSPC])
                    for _ in range(rng.choice([1, 1, 3]))
                }

    def _failure(self) -> bool:
        return any(node.engine.failure is not None for node, _ in self.graph.order)

    async def main(self) -> None:
        await self.graph.open()
        self._faults()
        clients = [self.driver.spawn(self.client(), name="client") for _ in range(self.clients)]
        for client in clients:
            await client
        for leaf in self.graph.leaves:
            leaf.fail_at = {}
            self.faulty |= bool(leaf.failed) or bool(self.case.capacity)
        await self._whole("final")
        if not self._failure():
            try:
                await self.flush()
            except OSError as error:
                self._expected(error)
            await self._whole("after the flush")
        await self._refill()
        self.last = self.driver.tick()

    async def _refill(self) -> None:
        """Give all space back and take it again at once: what is in quarantine must come free."""
        if self._failure() or not isinstance(self.format, Toy) or any(self.format.snapshots):
            return
        if self.case.capacity:
            return
        size = self.case.size
        request = self.model.zero(0, size)
        await self._finish([request], self.node.discard([0], [size]), False)
        request, data = self.model.write(0, size)
        await self._finish([request], self.node.write([0], [data]), False)
        self.stats["refilled"] += 1

    async def _whole(self, what: str) -> None:
        begun = self.driver.tick()
        (data,) = await self.node.read([0], [self.case.size])
        self.model.check(bytes(data), 0, begun, self.driver.tick(), what)

    async def end(self) -> bool:
        """Close; True when everything could be written."""
        try:
            await self.graph.close()
            return True
        except OSError as error:
            full = error.errno == errno.ENOSPC and self.case.capacity
            if not self._failure() and not full:
                raise
            return False

    def go(self, crashes: int = 12) -> Stats:
        """Run all of it; raises what is wrong."""
        if self.case.capacity:
            self.faulty = True
        self.driver.run(self.main())
        failed = self._failure()
        clean = self.driver.run(self.end())
        left = [task.name for task in self.driver.tasks]
        if left or any(leaf.in_flight for leaf in self.graph.leaves):
            raise Damage(f"close left tasks: {left}")
        rng = random.Random(self.rng.random())
        sectors = [64, 128] if self.case.unit <= 256 else [512, 512, 4096]
        for i in range(min(crashes, self.case.crashes)):
            moment = rng.randrange(self.last + 1) if i else self.last
            sector = rng.choice(sectors)
            states = [leaf.crash_state(moment, rng, sector) for leaf in self.graph.leaves]
            Reopened(self, states, moment, f"crash at {moment} of {self.last}").look()
            self.stats["crash states"] += 1
        if not failed:
            states = [bytes(leaf.data) for leaf in self.graph.leaves]
            moment = self.driver.tick()
            leaks = clean and self.case.check_leaks()
            Reopened(self, states, moment, "after close", leaks=leaks).look()
            self.stats["clean ends"] += 1
        for node, _ in self.graph.order:
            self.stats["allocations"] += node.engine.epochs.last
        self.stats["evicted"] += self.graph.tables.evicted
        self.stats["seeds"] += 1
        self.stats["steps"] += self.driver.clock
        return self.stats


class Reopened:
    """The graph again, from what is on the leaves."""

    def __init__(
        self, run: Run, images: list[bytes], moment: int, what: str, leaks: bool = False
    ) -> None:
        self.run, self.moment, self.what, self.leaks = run, moment, what, leaks
        self.driver: BaseDriver = InlineDriver()
        self.graph = run.case.build(self.driver, images)

    def look(self) -> None:
        assert isinstance(self.driver, InlineDriver)
        try:
            self.driver.run(self._look())
        finally:
            self.driver.close()

    async def _look(self) -> None:
        run = self.run
        await self.graph.open()
        for node, _ in self.graph.order:
            await self._check(node)
        (data,) = await self.graph.top.read([0], [run.case.size])
        run.model.check_crash(bytes(data), self.moment, self.what)
        format = self.graph.order[-1][0].format
        if not getattr(format, "modified", True):
            self._unmodified(bytes(data))
        if run.case.snapshots:
            await self._snapshots(format)

    async def _check(self, node: MappedNode) -> None:
        check = getattr(node.format, "check", None)
        if check is None:
            return
        result = await node.run_procedure(check(), whole_image=False)
        if isinstance(node.format, Qcow2):
            lazy = node.format.dirty
            if node.format.header.version == 2 and self.run.case.snapshots:
                # Nothing says to the next who opens it that COPIED may be clear without need.
                result.corruptions -= len(
                    [t for t in result.findings if "OFLAG_COPIED" in t and "refcount=1" in t]
                )
            if result.corruptions and not lazy:
                raise Damage(f"{self.what}: check: {result.findings[:4]}")
            if self.leaks and (result.leaks or lazy):
                raise Damage(f"{self.what}: {result.findings[:4]}, dirty {lazy}")
            return
        if result.corruptions:
            raise Damage(f"{self.what}: check: {result.corruptions[:4]}")
        if self.leaks and result.leaks:
            raise Damage(f"{self.what}: leaks: {result.leaks}")

    def _unmodified(self, data: bytes) -> None:
        """A disk that says it was not modified is as some withdrawal left it, or as at first."""
        run = self.run
        if data == run._first():
            return
        why = "it never said so"
        for begun, ended in reversed(run.idles):
            if begun <= self.moment:
                try:
                    run.model.check(data, 0, begun, min(ended, self.moment), "withdrawn")
                except Mismatch as mismatch:
                    why = str(mismatch)
                else:
                    return
        raise Damage(f"{self.what}: changed, and says it was not: {why}")

    async def _snapshots(self, format: Any) -> None:
        live = [
            k
            for k in self.run.kept
            if k.ended <= self.moment and (k.gone is None or k.gone > self.moment)
        ]
        for kept in live:
            if not snaps.there(format, kept.slot):
                raise Damage(f"{self.what}: snapshot {kept.slot} is lost")
            node = self.graph.top
            assert isinstance(node, MappedNode)
            data = await snaps.content(node, kept.slot, self.run.case.size)
            self.run.model.check(
                data, 0, kept.begun, kept.ended, f"{self.what}: snapshot {kept.slot}"
            )


def run_seeds(
    name: str, first: int, count: int, stop: int = 1, seconds: float = 1e9, crashes: int = 12
) -> tuple[Stats, list[tuple[int, str]]]:
    """Run ``count`` seeds; the sums, and (seed, what went wrong) of up to ``stop`` failures."""
    total: Stats = Counter()
    failures: list[tuple[int, str]] = []
    started = time.monotonic()
    for seed in range(first, first + count):
        try:
            total.update(Run(name, seed).go(crashes))
        except (Exception, Cancelled) as error:
            total["seeds"] += 1
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({last.filename.split('/')[-1]}:{last.lineno})"
            failures.append((seed, text))
            if len(failures) >= stop:
                break
        if time.monotonic() - started > seconds:
            break
    return total, failures


def main(arguments: list[str]) -> int:
    """``python -m races.harness CASE[,CASE] COUNT [FIRST]``: seeds from the command line."""
    first = int(arguments[2]) if len(arguments) > 2 else 0
    names = list(CASES) if arguments[0] == "all" else arguments[0].split(",")
    for name in names:
        started = time.monotonic()
        total, failures = run_seeds(name, first, int(arguments[1]), stop=3)
        spent = time.monotonic() - started
        print(f"{name}: {spent:.1f} s, {dict(total)}", flush=True)
        for seed, text in failures:
            print(f"  seed {seed}: {text[:700]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
