"""One workload that meets every part of the qcow2 machine, with one request failing somewhere."""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from diskwright.engine.node import Node
from diskwright.engine.tables import Tables
from diskwright.formats import qcow2
from diskwright.graph.mapped import MappedNode
from diskwright.ops.commit import _move
from diskwright.testing.memory import RecordingNode
from diskwright.testing.model import Mismatch, Model, pattern
from diskwright.testing.scheduler import InlineDriver
from races.cases import qcow2_image

CLUSTER = 512
MIB = 1 << 20
GROWN = 2 * MIB + 512 * 1024  # more than an L1 table of one cluster maps
FULL = 2 * MIB - 12 * 1024  # what a refcount table of one cluster can count, nearly
BASE = 64 * 1024
LARGE = ("vhdx", "vhdx-differencing", "vmdk", "vmdk-zeroed", "vmdk-backing")
KINDS = ("everything", "refcount table", "subclusters", *LARGE)
FEATURES = ("snapshots-packed", "extended-snapshots", "aes-snapshots", "bitmaps", "luks-amend",
            "data-file")  # fmt: skip


class Wrong(AssertionError):
    """The failure was not met as it has to be."""


def opened(driver: Any, leaf: RecordingNode, backing: Node | None) -> tuple[MappedNode, Any]:
    slots: dict[str, Node] = {"file": leaf}
    options: dict[str, Any] = {"writable": True}
    if backing is not None:
        slots["backing"] = backing
        options["backing"] = "given"
    assert qcow2.DRIVER.open is not None
    format, opening = qcow2.DRIVER.open(options)
    return MappedNode(driver, "qcow2", format, slots, Tables(3000)), opening


@lru_cache(maxsize=3)
def prepared(kind: str) -> tuple[bytes, bytes, bytes, int]:
    """(overlay, base, guest bytes, next free guest offset).  Of ``refcount table`` the overlay's
    refcount table is nearly full, so that the workload moves it."""
    size = GROWN if kind == "refcount table" else 256 * 1024
    full = FULL if kind == "refcount table" else 64 * 1024
    driver = InlineDriver()
    base_leaf = RecordingNode(driver, qcow2_image(("cluster_size", CLUSTER), ("size", BASE)))
    shape: tuple[tuple[str, Any], ...] = (("cluster_size", CLUSTER),)
    if kind == "subclusters":
        shape = (("cluster_size", 32 * CLUSTER), ("extended_l2", True))
        full = 128 * 1024
    image = qcow2_image(
        ("backing_file", "base"),
        ("backing_fmt", "qcow2"),
        *shape,
        ("refcount_bits", 64),
        ("size", size),
    )
    leaf = RecordingNode(driver, image)
    base, base_opening = opened(driver, base_leaf, None)
    node, opening = opened(driver, leaf, base)
    content = bytearray(size)
    content[:BASE] = pattern(5000, 0, BASE)

    async def fill() -> int:
        await base.run_procedure(base_opening, whole_image=False)
        await base.write([0], [bytes(content[:BASE])])
        await node.run_procedure(opening, whole_image=False)
        offset = BASE
        while leaf.size < full:
            content[offset : offset + 4096] = pattern(5001, offset, 4096)
            await node.write([offset], [bytes(content[offset : offset + 4096])])
            offset += 4096
        await node.close()
        await base.close()
        return offset

    free = driver.run(fill())
    return bytes(leaf.data), bytes(base_leaf.data), bytes(content), free


class Faulty:
    """The workload with request number ``at`` of ``which`` leaf (0 overlay, 1 base) failing."""

    fired_in = ""
    """The step that met the failure and went on."""
    refcounted = True
    """The format knows what is free, so after an orderly end nothing is leaked."""

    def __init__(self, kind: str, which: int, at: int, code: int) -> None:
        self.kind = kind
        overlay, base, content, self.free = prepared(kind)
        self.driver = InlineDriver()
        self.clock = 0
        self.leaves = [
            RecordingNode(self.driver, image, clock=self.tick) for image in (overlay, base)
        ]
        self.which, self.at, self.code = which, at, code
        self.opening = self.layers(self.driver, self.leaves)
        self.base, self.node = self.opening[0][0], self.opening[-1][0]
        self.model = Model(content.ljust(GROWN, b"\0"), self.tick)
        self.sizes = [len(content)]
        self.told: list[str] = []
        """What failed: step and error."""

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    @property
    def fired(self) -> bool:
        return any(leaf.failed for leaf in self.leaves)

    # -- steps
    async def write(self, offset: int, length: int) -> None:
        request, data = self.model.write(offset, length)
        try:
            await self.node.write([offset], [data])
        except BaseException:
            request.finish(self.tick(), False)
            raise
        request.finish(self.tick(), True)

    async def clear(self, offset: int, length: int, discard: bool) -> None:
        request = self.model.zero(offset, length)
        ask = self.node.discard if discard else self.node.zero
        try:
            await ask([offset], [length])
        except BaseException:
            request.finish(self.tick(), False)
            raise
        # A discard that the child refuses is a hint that was not taken.
        request.finish(self.tick(), True)

    async def flush(self) -> None:
        begun = self.tick()
        await self.node.flush()
        self.model.flushed(begun)

    async def resize(self, size: int) -> None:
        old = self.node.size
        self.sizes.append(size)
        low, high = sorted((old, size))
        request = self.model.zero(low, high - low)
        try:
            await self.node.truncate(size)
        except BaseException:
            request.finish(self.tick(), False)
            raise
        request.finish(self.tick(), True, True)

    async def commit(self) -> None:
        if self.base.size < self.node.size:
            await self.base.truncate(self.node.size)
        await _move(self.driver, self.node, self.base, 0, None)
        await self.base.flush()
        await self.node.run_procedure(self.node.format.make_empty())  # type: ignore[attr-defined]

    def steps(self) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        free = self.free
        end: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("close", self.node.close),
            ("close the base", self.base.close),
        ]
        if self.kind == "refcount table":
            return [
                ("allocate, move the refcount table", lambda: self.write(free, 16 * 1024)),
                ("flush", self.flush),
                ("overwrite", lambda: self.write(BASE + 100, 3000)),
                ("allocate again", lambda: self.write(free + 20_000, 6000)),
                *end,
            ]
        return [
            ("allocate", lambda: self.write(free, 16 * 1024)),
            ("flush", self.flush),
            ("copy on write", lambda: self.write(1000, 100)),
            ("overwrite", lambda: self.write(BASE + 100, 3000)),
            ("discard", lambda: self.clear(BASE + 4096, 8192, True)),
            ("allocate again", lambda: self.write(free + 40_000, 9000)),
            ("flush", self.flush),
            ("zero", lambda: self.clear(BASE + 2000, 5000, False)),
            ("grow, move L1", lambda: self.resize(GROWN)),
            ("write at the end", lambda: self.write(self.node.size - 600, 600)),
            ("flush", self.flush),
            ("shrink", lambda: self.resize(200 * 1024)),
            ("write", lambda: self.write(BASE + 5000, 700)),
            ("flush", self.flush),
            ("commit", self.commit),
            *end,
        ]

    async def main(self) -> None:
        for node, opening in self.opening:
            run = node.run_procedure
            await self._step("open", lambda run=run, o=opening: run(o, whole_image=False))
            if self.told:
                return
        for name, step in self.steps():
            await self._step(name, step)
        if not self.told:  # then the end of all was a success, too, whatever failed
            self.model.flushed(self.tick())

    async def _step(self, name: str, step: Callable[[], Awaitable[Any]]) -> None:
        before = self.fired
        try:
            await step()
            if self.fired and not before:
                self.fired_in = name
        except OSError as error:
            self.told.append(f"{name}: {error}")
            if not self.fired:
                raise Wrong(f"{name} failed with nothing wrong: {error!r}") from error
            if error.errno not in (self.code, errno.EIO) or not str(error):
                raise Wrong(f"{name}: {error!r} is not what went wrong") from error

    # -- afterwards
    def go(self) -> list[str]:
        """Run it; returns what failed.  Raises what is wrong."""
        if self.at:
            self.leaves[self.which].fail_at = {self.at: self.code}
        try:
            self.driver.run(self.main())
        finally:
            self.driver.close()
        if self.at and not self.fired:
            raise Wrong(f"request {self.at} was never made")
        number, kind, _ = self.leaves[self.which].failed[0] if self.at else (0, "", 0)
        # Discards are advisory, and metadata that could not be written in the background are
        # written by the next flush: nobody needs to hear of it, if everything is there afterwards.
        # A copy reads a batch that failed once more, part by part, to say which part it was.
        silent = ("discard", "zero", "write", *(("read",) if self.fired_in == "commit" else ()))
        if self.at and not self.told and kind not in silent:
            raise Wrong(f"the {kind} {number} failed and nobody was told")
        if self.driver.tasks:
            raise Wrong(f"left behind: {[t.name for t in self.driver.tasks]}")
        moment = self.tick()
        rng = random.Random(self.at)
        self._reopen([bytes(leaf.data) for leaf in self.leaves], moment, "afterwards")
        if self.at:
            states = [leaf.crash_state(moment, rng, 512) for leaf in self.leaves]
            self._reopen(states, moment, "after a crash")
        return self.told

    def layers(self, driver: Any, leaves: list[RecordingNode]) -> list[tuple[MappedNode, Any]]:
        """The graph over ``leaves``, from below: (node, opening)."""
        base, base_opening = opened(driver, leaves[1], None)
        node, opening = opened(driver, leaves[0], base)
        return [(base, base_opening), (node, opening)]

    async def look_more(self, node: Any) -> None:
        """At the top one, opened again."""

    def _reopen(self, images: list[bytes], moment: int, what: str) -> None:
        driver = InlineDriver()
        leaves = [RecordingNode(driver, image) for image in images]
        layers = self.layers(driver, leaves)
        node = layers[-1][0]

        async def look() -> bytes:
            for one, procedure in layers:
                await one.run_procedure(procedure, whole_image=False)
                result = await one.run_procedure(one.format.check(), whole_image=False)  # type: ignore[attr-defined]
                if result.corruptions or (result.leaks and self.refcounted and not self.at):
                    raise Wrong(f"{what}: check: {result.findings[:3]}")
            (content,) = await node.read([0], [node.size])
            await self.look_more(node)
            return bytes(content)

        try:
            content = driver.run(look())
        finally:
            driver.close()
        if len(content) not in self.sizes:
            raise Mismatch(f"{what}: size {len(content)}")
        self.model.check_crash(content, moment, what)


def made(kind: str, which: int, at: int, code: int) -> Faulty:
    """The workload of a kind."""
    if kind in FEATURES:
        from .features import Features

        return Features(kind, which, at, code)
    if kind in LARGE:
        from .large import Large

        return Large(kind, which, at, code)
    return Faulty(kind, which, at, code)


def requests(kind: str) -> list[list[str]]:
    """The kinds of the requests that the workload makes of each leaf, in order."""
    work = made(kind, 0, 0, 0)
    seen: list[list[str]] = [[] for _ in work.leaves]
    for leaf, kinds in zip(work.leaves, seen, strict=True):
        original = leaf._issue

        def issue(name: str, change: Any, finish: Any, o: Any = original, k: Any = kinds) -> Any:
            k.append(name)
            return o(name, change, finish)

        leaf._issue = issue  # type: ignore[method-assign]
    told = work.go()
    if told:
        raise Wrong(f"without a fault: {told}")
    return seen


Job = tuple[str, int, int, int]


def jobs(kind: str) -> list[Job]:
    """(kind, leaf, request, errno) of every request; a read does not run out of space."""
    out = []
    for which, kinds in enumerate(requests(kind)):
        for number, name in enumerate(kinds, 1):
            out.append((kind, which, number, errno.EIO))
            if name != "read":
                out.append((kind, which, number, errno.ENOSPC))
    return out


def sweep(some: list[Job]) -> tuple[int, int, list[str]]:
    """(runs, runs in which somebody was told, what is wrong)."""
    told = 0
    problems = []
    for job in some:
        try:
            told += bool(made(*job).go())
        except Exception as error:
            problems.append(f"{job}: {type(error).__name__}: {error}"[:600])
    return len(some), told, problems


def main(arguments: list[str]) -> int:
    """``python -m faults.workload STEP [KIND]``: every STEP-th of all failures."""
    for kind in arguments[1:] or (*KINDS, *FEATURES):
        every = jobs(kind)
        started = time.monotonic()
        runs, told, problems = sweep(every[:: int(arguments[0])])
        spent = time.monotonic() - started
        print(f"{kind}: {runs} of {len(every)} failures, {told} told, {spent:.1f} s", flush=True)
        print("\n".join(problems[:8]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
