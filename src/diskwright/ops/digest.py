"""Digests of a disk's content: what ``sha256sum`` says of the raw disk, and a tree of blocks whose
cost is that of the data, not of the disk.

The tree (SHA-256 throughout; docs/digest.md): the disk is cut into blocks of 64 KiB, the last one
filled with zeroes, and followed by blocks of zeroes up to a power of two.  A leaf is the digest of
a byte 0 and the block, a node that of a byte 1 and its two children, and the whole that of a byte
2, the disk's size as eight bytes (big-endian), and the root.  A subtree of zeroes is known by its
height, so holes of any size cost a few operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from ..engine.buffers import is_zero, page_buffer
from ..engine.kernel import BaseDriver, wait_all
from ..errors import UsageError
from ..graph.node import Node
from ..graph.status import all_status
from ..hints import TYPE_CHECKING, Any, Protocol
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .outputs import OnMoved, Output, Segments, unseen

if TYPE_CHECKING:
    from ..engine.kernel import Future

TREE = "tree"
ALGORITHMS = ("sha256", "sha512", "sha1", "md5", "blake2b", TREE)
BLOCK = 65536
"""Bytes of a leaf."""

_BUFFER = 1 << 20
_ZEROES = bytes(_BUFFER)
_ZERO_STEP = 256 << 20
"""Zeroes of one job, where each of them costs: so that progress and Ctrl-C are heard."""


class Digests(NamedTuple):
    """``size`` of the disk in bytes; ``digests``: algorithm -> hexadecimal digest.  ``filename`` is
    that of the image that was read, or was made."""

    size: int
    digests: Mapping[str, str]
    filename: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``diskwright digest --output=json``."""
        return {
            "filename": self.filename,
            "virtual-size": self.size,
            "digests": dict(self.digests),
        }


class Summer(Protocol):
    """Takes a disk's content in order."""

    def update(self, data: memoryview) -> None: ...
    def zeroes(self, length: int) -> None: ...
    def hexdigest(self) -> str: ...


class Content:
    """The digest of all bytes, zeroes included, by an algorithm of :mod:`hashlib`."""

    def __init__(self, algorithm: str) -> None:
        self._hash = hashlib.new(algorithm, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def zeroes(self, length: int) -> None:
        for at in range(0, length, _BUFFER):
            self._hash.update(_ZEROES[: length - at])

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Tree:
    """The digest of the tree of blocks; see the module's text."""

    def __init__(self) -> None:
        self._size = 0
        self._leaves = 0
        self._begun = bytearray()
        """The block that is not whole yet."""
        self._stack: list[tuple[int, bytes]] = []
        """Height and digest of whole subtrees, from left to right: heights fall."""
        self._zeroes = [_leaf(_ZEROES[:BLOCK])]
        """By height: the digest of a subtree of zeroes."""

    def update(self, data: memoryview) -> None:
        self._size += len(data)
        if self._begun:
            fill = data[: BLOCK - len(self._begun)]
            data = data[len(fill) :]
            self._begun += fill
            if len(self._begun) < BLOCK:
                return
            self._block(memoryview(self._begun))
            self._begun = bytearray()
        whole = len(data) - len(data) % BLOCK
        for at in range(0, whole, BLOCK):
            self._block(data[at : at + BLOCK])
        self._begun += data[whole:]

    def zeroes(self, length: int) -> None:
        head = min(-len(self._begun) % BLOCK, length)
        if head:
            self.update(memoryview(_ZEROES)[:head])
        self._size += length - head
        count, rest = divmod(length - head, BLOCK)
        while count:
            # The largest subtree that begins here.
            height = count.bit_length() - 1
            if self._leaves:
                height = min(height, (self._leaves & -self._leaves).bit_length() - 1)
            self._push(height, self._zero(height))
            count -= 1 << height
        self._begun += bytes(rest)

    def hexdigest(self) -> str:
        size = self._size
        if self._begun or not size:
            self.zeroes(BLOCK - len(self._begun))
        while len(self._stack) > 1:
            height = self._stack[-1][0]
            self._push(height, self._zero(height))
        self._size = size
        return hashlib.sha256(b"\2" + size.to_bytes(8, "big") + self._stack[0][1]).hexdigest()

    def _block(self, block: memoryview) -> None:
        self._push(0, self._zeroes[0] if is_zero(block) else _leaf(block))

    def _push(self, height: int, digest: bytes) -> None:
        self._leaves += 1 << height
        stack = self._stack
        while stack and stack[-1][0] == height:
            digest = _node(stack.pop()[1], digest)
            height += 1
        stack.append((height, digest))

    def _zero(self, height: int) -> bytes:
        known = self._zeroes
        while len(known) <= height:
            known.append(_node(known[-1], known[-1]))
        return known[height]


def _leaf(block: Any) -> bytes:
    found = hashlib.sha256(b"\0")
    found.update(block)
    return found.digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def summer(algorithm: str) -> Summer:
    """What computes ``algorithm``, one of :data:`ALGORITHMS`.  Raises UsageError for others."""
    if algorithm == TREE:
        return Tree()
    if algorithm not in ALGORITHMS:
        raise UsageError(
            f"Unknown digest '{algorithm}': it must be one of {', '.join(ALGORITHMS)}"
        )
    return Content(algorithm)


class Summers:
    """Several digests of one disk, fed at a time."""

    def __init__(self, algorithms: Sequence[str]) -> None:
        self._by_name = {name: summer(name) for name in algorithms}
        flat = any(name != TREE for name in algorithms)
        self.most_zeroes = _ZERO_STEP if flat else 1 << 63
        """Bytes of zeroes to feed at a time."""
        self.done = 0

    def feed(self, view: memoryview | None, length: int) -> None:
        """Take the next ``length`` bytes (None: zeroes); for the pool."""
        for one in self._by_name.values():
            if view is None:
                one.zeroes(length)
            else:
                one.update(view)
        self.done += length

    def result(self) -> Digests:
        """Of all that was fed."""
        return Digests(self.done, {name: one.hexdigest() for name, one in self._by_name.items()})


class Digesting(Output):
    """Digests of what a copy moves: of a disk of ``size`` bytes (None: of as many as come, in whole
    sectors)."""

    name = "digest"

    def __init__(self, driver: BaseDriver, algorithms: Sequence[str], size: int | None) -> None:
        self.driver, self.size = driver, size
        self._summers = Summers(algorithms)

    async def take(self, segments: Segments, moved: OnMoved = unseen) -> None:
        """``segments`` in order; what lies between them is zero."""
        async for segment in segments:
            await self._zeroes(segment.target_offset)
            if segment.zero:
                await self._zeroes(segment.target_offset + segment.length)
                continue
            (data,) = await segment.source.read([segment.source_offset], [segment.length])
            await self.driver.call(self._summers.feed, memoryview(data), segment.length)
        done = self._summers.done
        await self._zeroes(align_up(done, SECTOR) if self.size is None else self.size)

    def result(self) -> Digests:
        """When all was taken."""
        return self._summers.result()

    async def _zeroes(self, end: int) -> None:
        summers = self._summers
        while summers.done < end:
            length = min(summers.most_zeroes, end - summers.done)
            await self.driver.call(summers.feed, None, length)


async def digest(
    driver: BaseDriver,
    node: Node,
    algorithms: Sequence[str] = ("sha256",),
    on_progress: Callable[[int, int], None] | None = None,
) -> Digests:
    """Digests of an open disk's content by each of ``algorithms``.

    Ranges that the map tells to be zeroes are not read.  A job of the pool computes while the next
    piece is read.  Raises OSError, DiskError and UsageError.
    """
    summers = Summers(algorithms)
    buffers = [page_buffer(_BUFFER) for _ in range(2)]
    busy: Future[None] | None = None
    try:
        async for start, stop, zero in _runs(node):
            step = min(summers.most_zeroes, stop - start) if zero else _BUFFER
            for at in range(start, stop, step):
                length = min(step, stop - at)
                view = None
                if not zero:
                    buffers.reverse()  # the other one is being looked at
                    view = buffers[0][:length]
                    await node.read([at], [length], [view])
                if busy is not None:
                    await busy
                    if on_progress is not None:
                        on_progress(at, node.size)
                busy = driver.call(summers.feed, view, length)
    finally:
        if busy is not None:
            await wait_all([busy])  # it holds a buffer
    if on_progress is not None:
        on_progress(node.size, node.size)
    return summers.result()


async def _runs(node: Node) -> AsyncIterator[tuple[int, int, bool]]:
    """The disk in order: start, end, and whether all of it is known to be zeroes."""
    begun = 0
    async for part in all_status(node):
        end = part.start + part.length
        if part.zero:
            if begun < part.start:
                yield begun, part.start, False
            yield part.start, end, True
            begun = end
        elif end - begun >= _BUFFER:
            yield begun, end, False
            begun = end
    if begun < node.size:
        yield begun, node.size, False
