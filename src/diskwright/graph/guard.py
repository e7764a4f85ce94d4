"""What a disk's opener may ask of its top node beyond what the format does."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence

from ..contract import FUA
from ..engine.kernel import Future
from ..hints import Any
from ..records import NamedTuple
from .mapped import MappedNode
from .node import Buffer
from .probe import PROBE_BYTES, matches


class GuardedNode(MappedNode):
    """A format node that looks at writes before it passes them on.

    - ``probed``: the image was taken for raw by guess.  A request that would put the signature of
      a format into its first or last sector fails with EPERM: at the next guess the image would be
      of that format, which can name any file of the host as its backing file.
    - ``writethrough``: every write is durable before it is answered.
    """

    writethrough = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._ends: Future[None] | None = None

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        if self.writethrough:
            flags |= FUA

        async def issue() -> None:
            await super(GuardedNode, self).write(offsets, buffers, flags)

        views = [memoryview(buffer) for buffer in buffers] if self.probed else []
        await self._pass(offsets, views, issue)

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        if self.writethrough:
            flags |= FUA

        async def issue() -> None:
            await super(GuardedNode, self).zero(offsets, lengths, flags)

        await self._pass(offsets, list(map(Blank, lengths)), issue)

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        async def issue() -> None:
            await super(GuardedNode, self).discard(offsets, lengths)

        await self._pass(offsets, list(map(Blank, lengths)), issue)
        if self.writethrough:
            await self.flush()

    async def truncate(self, size: int, preallocation: str = "off", shrink: bool = True) -> None:
        async def issue() -> None:
            await super(GuardedNode, self).truncate(size, preallocation, shrink)

        if self.probed and size < self.size:
            await self._checked([], [], issue, size)
        else:
            await issue()

    async def _pass(
        self,
        offsets: Sequence[int],
        buffers: Sequence[memoryview | Blank],
        issue: Callable[[], Awaitable[None]],
    ) -> None:
        """Issue a request, looked at before when it meets an end of a probed image."""
        last = self.size - PROBE_BYTES
        if self.probed and any(
            offset < PROBE_BYTES or offset + buffer.nbytes > last
            for offset, buffer in zip(offsets, buffers, strict=True)
        ):
            await self._checked(offsets, buffers, issue, self.size)
        else:
            await issue()

    async def _checked(
        self,
        offsets: Sequence[int],
        buffers: Sequence[memoryview | Blank],
        issue: Callable[[], Awaitable[None]],
        size: int,
    ) -> None:
        # One at a time: two writes that are harmless alone could make a signature together.
        while self._ends is not None:
            await self._ends
        turn: Future[None] = Future()
        self._ends = turn
        try:
            await self._check(offsets, buffers, size)
            await issue()
        finally:
            self._ends = None
            turn.set()

    async def _check(
        self, offsets: Sequence[int], buffers: Sequence[memoryview | Blank], size: int
    ) -> None:
        """Raise PermissionError if the image of ``size`` bytes would look like a format's with
        ``buffers`` written."""
        length = min(PROBE_BYTES, size)
        if not length:
            return
        places = (0, size - length)
        ends = [bytearray(old) for old in await self.read(places, [length] * 2)]
        for offset, buffer in zip(offsets, buffers, strict=True):
            for place, end in zip(places, ends, strict=True):
                first, stop = max(offset, place), min(offset + buffer.nbytes, place + length)
                if first < stop:
                    end[first - place : stop - place] = _part(buffer, first - offset, stop - offset)
        found = matches(bytes(ends[0]), bytes(ends[1]))
        if found:
            raise PermissionError(
                errno.EPERM,
                f"Operation not permitted (the image was taken for raw by guess and would look "
                f"like {', '.join(found)}; give the format 'raw' explicitly to allow it)",
            )


class Blank(NamedTuple):
    """So many zeroes, which are not held."""

    nbytes: int


def _part(buffer: memoryview | Blank, start: int, stop: int) -> Buffer:
    return bytes(stop - start) if isinstance(buffer, Blank) else buffer.cast("B")[start:stop]
