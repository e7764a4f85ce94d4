"""Procedures as the work of jobs: between two requests a job may rest, and be cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import Any

from ..contract import Create, Length, Procedure, Progress, Punch, Truncate, Write
from ..graph.mapped import MappedNode
from ..graph.node import Node
from .job import Job

PIECE = 16 << 20
"""Bytes that a file grows by at once where they are reserved or written."""
_CHANGES = (Write, Truncate, Punch, Create)


async def run_steps(
    job: Job, node: MappedNode, procedure: Procedure, *, anew: bool = False
) -> Any:
    """Run ``procedure`` of ``node``'s format as a part of ``job``, beside the node's requests.

    What changes an image goes on to its end once it has begun to write, unless that image is made
    ``anew``.
    """
    steps = _Steps(job, procedure, anew)
    return await node.run_procedure(steps.procedure(), whole_image=False, on_progress=steps.rest)


async def grow(job: Job, node: Node, size: int, preallocation: str) -> None:
    """Let ``node`` become longer; what is reserved or written counts as progress, in bytes."""
    for end in _ends(job, node.size, size, preallocation):
        await node.truncate(end, preallocation)
        await job.rest()


class _Steps:
    def __init__(self, job: Job, procedure: Procedure, anew: bool) -> None:
        self.job = job
        self.anew = anew
        self._inner = procedure
        self._changed = False

    def rest(self, done: int, total: int) -> Awaitable[None] | None:
        """Between two requests."""
        return None if self._changed and not self.anew else self.job.rest()

    def procedure(self) -> Procedure:
        """The same, with a rest before each request."""
        answer: Any = None
        error: Exception | None = None
        while True:
            try:
                request = self._inner.send(answer) if error is None else self._inner.throw(error)
            except StopIteration as stop:
                return stop.value
            answer = error = None
            try:
                yield Progress(0, 0)
                self._changed |= isinstance(request, _CHANGES)
                if isinstance(request, Truncate):
                    yield from self._in_pieces(request)
                else:
                    answer = yield request
            except Exception as caught:
                error = caught

    def _in_pieces(self, request: Truncate) -> Procedure:
        slot, size, preallocation = request
        for end in _ends(self.job, (yield Length(slot)), size, preallocation):
            yield Truncate(slot, end, preallocation)
            yield Progress(0, 0)


def _ends(job: Job, now: int, size: int, preallocation: str) -> Iterator[int]:
    """The lengths in between, and ``size``; each is reached when the next is asked for."""
    if preallocation not in ("falloc", "full"):
        yield size
        return
    job.total += max(size - now, 0)
    for end in (*range(now + PIECE, size, PIECE), size):
        yield end
        job.done += max(end - now, 0)
        now = end
