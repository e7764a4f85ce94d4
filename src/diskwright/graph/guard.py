"""What a disk's opener may ask of its top node beyond what the format does."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..contract import FUA, MAY_UNMAP
from ..engine.kernel import Future
from .mapped import MappedNode
from .node import Buffer
from .probe import PROBE_BYTES, probe

_ZEROES = bytes(1 << 16)


class GuardedNode(MappedNode):
    """A format node that looks at writes before it passes them on.

    - ``probed``: the image was taken for raw by guess.  A request that would put the signature of
      a format into its first sector fails with EPERM: at the next guess the image would be of that
      format, which can name any file of the host as its backing file.
    - ``writethrough``: every write is durable before it is answered.
    - ``detect_zeroes`` (``on``, ``unmap``): buffers of zeroes are written as zero requests.
    """

    writethrough = False
    detect_zeroes = "off"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._first_sector: Future[None] | None = None

    async def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> None:
        # Of overlapping requests the later wins, so a batch becomes zeroes as a whole or not.
        if self.detect_zeroes != "off" and buffers and all(map(is_zero, buffers)):
            unmap = MAY_UNMAP if self.detect_zeroes == "unmap" else 0
            await self.zero(offsets, [len(buffer) for buffer in buffers], flags | unmap)
            return
        if self.writethrough:
            flags |= FUA

        async def issue() -> None:
            await super(GuardedNode, self).write(offsets, buffers, flags)

        if self._meets_first_sector(offsets):
            await self._checked(offsets, buffers, issue)
        else:
            await issue()

    async def zero(self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0) -> None:
        if self.writethrough:
            flags |= FUA

        async def issue() -> None:
            await super(GuardedNode, self).zero(offsets, lengths, flags)

        if self._meets_first_sector(offsets):
            await self._checked(offsets, _blank(lengths), issue)
        else:
            await issue()

    async def discard(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        async def issue() -> None:
            await super(GuardedNode, self).discard(offsets, lengths)

        if self._meets_first_sector(offsets):
            await self._checked(offsets, _blank(lengths), issue)
        else:
            await issue()
        if self.writethrough:
            await self.flush()

    def _meets_first_sector(self, offsets: Sequence[int]) -> bool:
        return self.probed and min(offsets, default=PROBE_BYTES) < PROBE_BYTES

    async def _checked(
        self,
        offsets: Sequence[int],
        buffers: Sequence[Buffer],
        issue: Callable[[], Awaitable[None]],
    ) -> None:
        # One at a time: two writes that are harmless alone could make a signature together.
        while self._first_sector is not None:
            await self._first_sector
        turn: Future[None] = Future()
        self._first_sector = turn
        try:
            await self._check(offsets, buffers)
            await issue()
        finally:
            self._first_sector = None
            turn.set()

    async def _check(self, offsets: Sequence[int], buffers: Sequence[Buffer]) -> None:
        (old,) = await self.read([0], [min(PROBE_BYTES, self.size)])
        sector = bytearray(old).ljust(PROBE_BYTES, b"\0")
        for offset, buffer in zip(offsets, buffers, strict=True):
            if offset < PROBE_BYTES:
                part = memoryview(buffer).cast("B")[: PROBE_BYTES - offset]
                sector[offset : offset + len(part)] = part
        found = probe(bytes(sector))
        if found is not None:
            raise PermissionError(
                errno.EPERM,
                f"Operation not permitted (the image was taken for raw by guess and would look "
                f"like {found}; give the format 'raw' explicitly to allow it)",
            )


def _blank(lengths: Sequence[int]) -> list[Buffer]:
    return [bytes(min(length, PROBE_BYTES)) for length in lengths]


def is_zero(buffer: Buffer) -> bool:
    """True when every byte is zero."""
    view = memoryview(buffer).cast("B")
    for start in range(0, len(view), len(_ZEROES)):
        part = view[start : start + len(_ZEROES)]
        if part != _ZEROES[: len(part)]:
            return False
    return True
