"""Random workloads, and everything that a loss of power could leave of them."""

from __future__ import annotations

import errno
import random
import sys
import time
import zlib
from collections import Counter
from typing import Any, NamedTuple

from diskwright.contract import COMPRESSED, FUA, MAY_UNMAP
from diskwright.engine.tables import Tables
from diskwright.errors import DiskError, NotSupported
from diskwright.graph.mapped import MappedNode
from diskwright.ops import snapshots
from diskwright.testing.memory import POISON, RecordingNode
from diskwright.testing.model import Mismatch, Model
from diskwright.testing.scheduler import InlineDriver, SeededDriver

from .bitmaps import Followed
from .kits import KINDS, Kit
from .snapshots import Held


class Saved(NamedTuple):
    """A crash state for other programs: the image (compressed), its backing file, and the guest's
    bytes."""

    kind: str
    seed: int
    moment: int
    image: bytes
    base: bytes
    content: bytes
    dirty: bool
    format: str
    data: bytes | None
    sizes: frozenset[int]
    """Of the disk: more than one in the middle of a resize."""


class Workload:
    """One seed: a client that writes, zeroes, discards, resizes and flushes a small disk."""

    def __init__(self, kind: str, seed: int, steps: int = 0) -> None:
        self.kind, self.seed = kind, seed
        self.rng = rng = random.Random(f"{kind} {seed}")
        self.driver = SeededDriver(seed, eager=None)
        self.kit = kit = Kit(kind, rng)
        self.size, self.base = kit.size, kit.base
        self.leaves = [
            RecordingNode(self.driver, file, delay=10, zeroes_discards=kit.zeroes_discards)
            for file in kit.files()
        ]
        self.node, self.opening = self._node(self.driver, self.leaves, kit.budget)
        whole = max(*kit.sizes, kit.size)
        self.model = Model(self.base[: self.size].ljust(whole, b"\0"), self.driver.tick)
        self.sizes: list[tuple[int, int, int]] = [(-1, -1, self.size)]
        """(begun, ended, size) of the resizes that succeeded."""
        self.steps = steps or kit.steps
        self.stats: Counter[str] = Counter()
        self.last = 0
        self.followed = Followed(self.node, random.Random(seed), self.driver.tick)
        self.held = Held(self.node, random.Random(seed), self.driver.tick)

    def _node(self, driver: Any, leaves: list[RecordingNode], budget: int) -> Any:
        slots = dict(zip(self.kit.slots, leaves, strict=True))
        if self.base:
            slots["backing"] = RecordingNode(driver, self.base)
        format, opening = self.kit.open()

        async def opener(*named: Any) -> None:
            """Every slot is filled."""

        node = MappedNode(driver, self.kit.format, format, slots, Tables(budget), opener=opener)
        return node, opening

    # -- the workload
    def _range(self) -> tuple[int, int]:
        rng = self.rng
        length = rng.choice(self.kit.lengths)
        offset = rng.randrange(self.size)
        if rng.random() < 0.6:
            offset -= offset % self.kit.unit
        return offset, min(length, self.size - offset)

    async def _write(self) -> None:
        requests, offsets, buffers = [], [], []
        for _ in range(self.rng.choice([1, 1, 3])):
            offset, length = self._range()
            request, data = self.model.write(offset, length)
            requests.append(request)
            offsets.append(offset)
            buffers.append(data)
        fua = len(requests) == 1 and self.rng.random() < 0.15
        await self.node.write(offsets, buffers, FUA if fua else 0)
        for request in requests:
            request.finish(self.driver.tick(), True, fua)

    async def _write_packed(self) -> None:
        """Whole units; where one of them is there already nothing is written."""
        unit = self.kit.pack_unit
        offset = self._range()[0] // unit * unit
        length = min(self.rng.choice([1, 1, 2, 5, 20]) * unit, self.size - offset)
        request, data = self.model.write(offset, length)
        try:
            await self.node.write([offset], [data], COMPRESSED)
        except OSError as error:
            assert error.errno == errno.EIO
            request.finish(self.driver.tick(), False)
        else:
            request.finish(self.driver.tick(), True)

    async def _zero(self) -> None:
        offset, length = self._range()
        request = self.model.zero(offset, length)
        await self.node.zero([offset], [length], self.rng.choice([0, MAY_UNMAP]))
        request.finish(self.driver.tick(), True)

    async def _discard(self) -> None:
        offset, length = self._range()
        unit = self.kit.unit
        start, end = -(-offset // unit) * unit, offset + length
        end -= 0 if end == self.size else end % unit
        request = self.model.zero(start, end - start) if start < end else None
        await self.node.discard([offset], [length])
        if request is not None:
            request.finish(self.driver.tick(), self.kit.exact_discard)

    async def _flush(self) -> None:
        begun = self.driver.tick()
        await self.node.flush()
        self.model.flushed(begun)

    async def _resize(self) -> None:
        size = self.rng.choice(self.kit.sizes)
        low, high = sorted((size, self.size))
        request = self.model.zero(low, high - low)
        begun = self.driver.tick()
        try:
            await self.node.truncate(size)
        except NotSupported:  # version 2, which it was made by now, with snapshots
            return request.finish(self.driver.tick(), False)
        self.size = size
        self.sizes.append((begun, self.driver.tick(), size))
        self.followed.resized(size)
        request.finish(self.driver.tick(), True, True)

    async def _become(self, content: bytes, work: Any) -> None:
        """Do what leaves the disk as ``content``, in that size."""
        request = self.model.put(content.ljust(len(self.model.base), b"\0"))
        begun = self.driver.tick()
        await work
        self.size = len(content)
        self.sizes.append((begun, self.driver.tick(), self.size))
        request.finish(self.driver.tick(), True, True)

    async def _snapshot(self) -> None:
        live = self.held.live
        what = self.rng.random()
        if what < 0.4 or not live:
            return await self.held.take()
        one = self.rng.choice(live)
        if what < 0.7:
            return await self.held.give_up(one)
        try:
            work = snapshots.apply(self.node, snapshots.Selector(id=one.id))
            await self._become(one.content, work)
        except NotSupported:  # counts are too narrow
            self.model.requests[-1].finish(self.driver.tick(), False)

    async def _empty(self) -> None:
        """What a commit ends with."""
        content = self.base[: self.size].ljust(self.size, b"\0")
        format: Any = self.node.format
        await self._become(content, self.node.run_procedure(format.make_empty()))

    async def _amend(self) -> None:
        format: Any = self.node.format
        change = self.rng.choice(self.kit.amendments)
        try:
            await self.node.run_procedure(format.amend(change, False))
        except DiskError:
            self.stats["amendments refused"] += 1

    async def main(self) -> None:
        await self.node.run_procedure(self.opening, whole_image=False)
        menu = [self._write] * 7 + [self._zero, self._discard, self._discard]
        menu += [self._flush, self._flush]
        menu += [self._resize] * self.kit.may_resize()
        menu += [self._write_packed] * (6 * self.kit.packs)
        menu += [self.followed.step] * (8 * self.kit.bitmaps)
        menu += [self._snapshot] * (6 * self.kit.snapshots)
        menu += [self._empty] * bool(self.base and self.kit.format == "qcow2")
        menu += [self._amend] * (3 * bool(self.kit.amendments))
        beside = None
        for _ in range(self.steps):
            action = self.rng.choice(menu)
            self.stats[action.__name__.lstrip("_")] += 1
            await action()
            if beside is not None:
                await beside
                beside = None
            if self.rng.random() < 0.2:
                beside = self.driver.spawn(self._flush(), name="flush beside")
        if beside is not None:
            await beside
        await self.node.close()
        self.last = self.driver.tick()
        self.model.flushed(self.last)
        self.last = self.driver.tick()

    # -- the crashes
    def moments(self, each: int) -> list[int]:
        """Every prefix of the log, ``each`` times (of large images: some of them)."""
        found = set()
        for leaf in self.leaves:
            found |= {change.issued for change in leaf.log}
            found |= {change.done for change in leaf.log}
            found |= {ended for _, ended in leaf.barriers}
        found.add(self.last)
        every = [moment for moment in sorted(found) for _ in range(each)]
        most = self.kit.most
        return every if len(every) <= most else sorted(self.rng.sample(every, most))

    def state(self, number: int, moment: int) -> tuple[int, int, list[bytes]]:
        """(moment, sector, files): what a loss of power then may leave."""
        sector = (512, 4096)[(moment + number) % 2]
        return moment, sector, [leaf.crash_state(moment, self.rng, sector) for leaf in self.leaves]

    def look(self, moment: int, sector: int, files: list[bytes]) -> Saved:
        """Open, check and read a crash state; raises when anything is not as it must be."""
        what = f"{self.kind} seed {self.seed}: power lost at {moment}, sectors of {sector}"
        driver = InlineDriver()
        image = files[0]
        leaves = [RecordingNode(driver, file) for file in files]
        node, opening = self._node(driver, leaves, 1 << 20)
        format = self.kit.format
        dirty = format == "vhdx" or (format == "qcow2" and bool(image[79] & 1) and image[7] > 2)
        try:
            content = driver.run(self._look(node, opening, moment, what))
        finally:
            driver.close()
        sizes = [s for begun, ended, s in self.sizes if begun <= moment]
        settled = max(i for i, (_, ended, _) in enumerate(self.sizes) if ended <= moment)
        admissible = frozenset(s for _, _, s in self.sizes[settled : len(sizes)])
        if len(content) not in admissible:
            begun = [s for b, _, s in self.sizes if b <= moment]
            raise Mismatch(f"{what}: size {len(content)}, sizes were {begun}")
        if POISON in content:
            raise Mismatch(f"{what}: bytes of a freed cluster at {content.index(POISON):#x}")
        self.model.check_crash(content, moment, what)
        data = files[1] if len(files) > 1 else None
        if self.kind == "raw-data-file" and moment == self.last and data != content:
            raise Mismatch(f"{what}: the raw data file is not what the disk reads")
        told = (self.kind, self.seed, moment, image, self.base, content, dirty, format, data)
        return Saved(*told, admissible)

    async def _look(self, node: Any, opening: Any, moment: int, what: str) -> bytes:
        await node.run_procedure(opening, whole_image=False)
        result = await node.run_procedure(node.format.check(), whole_image=False)
        corruptions = result.corruptions
        if self.kit.snapshots and node.format.header.version == 2:
            # Nothing says to the next who opens it that COPIED may be clear without need.
            corruptions -= sum("OFLAG_COPIED" in t and "refcount=1" in t for t in result.findings)
        if corruptions or result.check_errors:
            raise Mismatch(f"{what}: check: {result.findings[:4]}")
        self.stats["leaks"] += bool(result.leaks)
        (content,) = await node.read([0], [node.size])
        if self.kit.bitmaps:
            good = await self.followed.judge(node, bytes(content), moment, what)
            self.stats["good bitmaps"] += good
        if self.kit.snapshots:
            self.stats["snapshots read"] += await self.held.judge(node, moment, what)
        return bytes(content)


def explore(kind: str, seed: int, each: int, keep: int) -> tuple[Counter[str], list[Saved], str]:
    """One seed: counts, up to ``keep`` states for other programs, and what went wrong."""
    work = Workload(kind, seed)
    kept: list[Saved] = []
    try:
        work.driver.run(work.main())
        moments = work.moments(each)
        keep = min(keep, len(moments)) if work.kit.others else 0
        chosen = set(work.rng.sample(range(len(moments)), keep))
        for i, moment in enumerate(moments):
            saved = work.look(*work.state(i, moment))
            work.stats["states"] += 1
            if i in chosen:
                # Of many images at a time, which are mostly zeroes.
                kept.append(saved._replace(image=zlib.compress(saved.image, 1)))
    except Exception as error:
        return work.stats, kept, f"{kind} seed {seed}: {type(error).__name__}: {error}"
    work.stats["workloads"] += 1
    return work.stats, kept, ""


def main(arguments: list[str]) -> int:
    """``python -m crash.explorer KIND[,KIND]|all COUNT [FIRST]``."""
    kinds = KINDS if arguments[0] == "all" else tuple(arguments[0].split(","))
    first = int(arguments[2]) if len(arguments) > 2 else 0
    for kind in kinds:
        started = time.monotonic()
        total: Counter[str] = Counter()
        problems = []
        for seed in range(first, first + int(arguments[1])):
            stats, _, problem = explore(kind, seed, 2, 0)
            total.update(stats)
            if problem:
                problems.append(problem)
        print(f"{kind}: {time.monotonic() - started:.1f} s {dict(total)}", flush=True)
        for problem in problems[:3]:
            print(f"  {problem[:600]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
