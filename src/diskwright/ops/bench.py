"""Measuring how fast a disk answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from ..engine.kernel import BaseDriver, Future, wait_all
from ..engine.node import Node
from ..errors import UsageError
from ..records import NamedTuple

# Batches after which others get a turn (Ctrl-C): what the page cache answers never waits.
_TURN = 256
# Most bytes that are in flight at once, whatever depth and request size multiply to.
_MOST_IN_FLIGHT = 256 << 20


class Workload(NamedTuple):
    """``requests`` of ``size`` bytes, ``depth`` of them at a time, from ``offset`` on, each
    ``step`` bytes behind the one before, starting over at the end of the disk.

    ``pattern``: the byte that is written; None reads.  ``flush_interval``: a flush after so many
    requests (0: none), for which all earlier ones are waited for unless ``drain`` is off.
    """

    requests: int = 75000
    size: int = 4096
    depth: int = 64
    offset: int = 0
    step: int = 4096
    pattern: int | None = None
    flush_interval: int = 0
    drain: bool = True

    def check(self) -> None:
        """Raise UsageError for a flush interval that contradicts the rest."""
        if self.flush_interval and self.pattern is None:
            raise UsageError("--flush-interval is only available in write tests")
        if self.flush_interval and self.flush_interval < self.depth:
            raise UsageError("Flush interval can't be smaller than depth")

    def offsets(self, length: int) -> Iterator[int]:
        """Where each request goes on a disk of ``length`` bytes."""
        position = self.offset
        for _ in range(self.requests):
            yield position
            position += self.step
            if position >= length:
                position %= length or 1
            if position + self.size > length:
                position = 0


async def bench(driver: BaseDriver, node: Node, load: Workload) -> float:
    """Run ``load``; returns the seconds it took.  Raises UsageError, OSError."""
    load.check()
    batch = max(1, min(load.depth, _MOST_IN_FLIGHT // load.size))
    arena = memoryview(bytearray(load.size * (1 if load.pattern is not None else batch)))
    if load.pattern:
        arena[:] = bytes([load.pattern]) * load.size
    views = [arena[i * load.size : (i + 1) * load.size] for i in range(len(arena) // load.size)]
    flushes: list[Future[None]] = []
    since_flush = 0
    offsets: list[int] = []
    batches = count()
    began = driver.now()

    async def issue() -> None:
        if offsets and load.pattern is not None:
            await node.write(offsets, [arena] * len(offsets))
        elif offsets:
            await node.read(offsets, [load.size] * len(offsets), views[: len(offsets)])
        offsets.clear()
        if not next(batches) % _TURN:
            await driver.turn()

    try:
        for position in load.offsets(node.size):
            if position + load.size > node.size:
                raise OSError(5, "Input/output error: the request ends beyond the disk")
            offsets.append(position)
            since_flush += 1
            flush = load.flush_interval and since_flush == load.flush_interval
            if flush or len(offsets) == batch:
                await issue()
            if flush:
                since_flush = 0
                flushes.append(driver.start(node.flush(), io=True))
                if load.drain or len(flushes) > load.depth:
                    await flushes.pop(0)
        await issue()
    finally:
        await wait_all(flushes)
    return driver.now() - began
