"""What a user outside the graph holds in place of a node, so that another node can be put below it
while requests come, and so that they are counted."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from operator import add
from time import perf_counter_ns

from ..contract import FUA, Limits
from ..engine.futures import Condition
from ..engine.node import Buffer, Node
from ..extents import Extent
from ..hints import Any, Protocol
from .stats import FLUSH, READ, UNMAP, WRITE, Stats


class Backend(Node):
    """Stands for ``node`` and hands its requests on.

    It is in no graph and is nobody's parent: what it does with the node is said to the graph as
    that of a user outside.
    """

    def __init__(self, node: Node, writethrough: bool = False) -> None:
        """``writethrough``: each write is durable when it is done."""
        self.node = node
        self.probed = node.probed
        self._always = FUA if writethrough else 0
        self.stats = Stats()
        counters = self.stats.counters
        self._reads, self._writes = counters[READ], counters[WRITE]
        self._flushes, self._unmaps = counters[FLUSH], counters[UNMAP]
        self._running = 0
        self._held = 0
        self._changed = Condition()
        super().__init__(node.driver, node.driver_name)

    @property
    def real(self) -> Node:
        return self.node

    def move(self, node: Node) -> None:
        """Stand for ``node`` from now on; nothing may be on its way (:class:`Drain`)."""
        assert not self._running
        self.node = node

    @property
    def size(self) -> int:
        return self.node.size

    @size.setter
    def size(self, value: int) -> None:
        """Ignored at construction; it is the node's."""

    @property
    def limits(self) -> Limits:
        return self.node.limits

    @limits.setter
    def limits(self, value: Limits) -> None:
        """Ignored at construction; they are the node's."""

    @property
    def read_only(self) -> bool:
        return self.node.read_only

    @read_only.setter
    def read_only(self, value: bool) -> None:
        """Ignored at construction; it is the node's."""

    # -- requests
    def read(
        self,
        offsets: Sequence[int],
        lengths: Sequence[int],
        into: Sequence[memoryview] | None = None,
    ) -> Coroutine[Any, Any, Sequence[Buffer]]:
        size = sum(lengths)
        return self._pass(self._reads, len(offsets), size, "read", offsets, lengths, into)

    def write(
        self, offsets: Sequence[int], buffers: Sequence[Buffer], flags: int = 0
    ) -> Coroutine[Any, Any, None]:
        lengths = list(map(len, buffers))
        self._reach(offsets, lengths)
        size, flags = sum(lengths), flags | self._always
        return self._pass(self._writes, len(offsets), size, "write", offsets, buffers, flags)

    def zero(
        self, offsets: Sequence[int], lengths: Sequence[int], flags: int = 0
    ) -> Coroutine[Any, Any, None]:
        self._reach(offsets, lengths)
        size, flags = sum(lengths), flags | self._always
        return self._pass(self._writes, len(offsets), size, "zero", offsets, lengths, flags)

    def discard(
        self, offsets: Sequence[int], lengths: Sequence[int]
    ) -> Coroutine[Any, Any, None]:
        size = sum(lengths)
        return self._pass(self._unmaps, len(offsets), size, "discard", offsets, lengths)

    def flush(self) -> Coroutine[Any, Any, None]:
        return self._pass(self._flushes, 1, 0, "flush")

    def truncate(self, size: int, preallocation: str = "off") -> Coroutine[Any, Any, None]:
        return self._pass(None, 0, 0, "truncate", size, preallocation)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        return await self.node.extents(offset, length)

    def _reach(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        if len(offsets) == 1:  # most batches
            end = offsets[0] + lengths[0]
        else:
            end = max(map(add, offsets, lengths), default=0)
        if end > self.node.highest:
            self.node.highest = end

    async def _pass(self, counter: Any, count: int, size: int, request: str, *columns: Any) -> Any:
        while self._held:
            await self._changed.wait()
        self._running += 1
        began = perf_counter_ns()
        try:
            found = await getattr(self.node, request)(*columns)
        except BaseException:
            if counter is not None:
                self.stats.last = ended = perf_counter_ns()
                counter.failed += count
                counter.nanoseconds += (ended - began) * count
            raise
        finally:
            self._running -= 1
            if self._held:
                self._changed.notify()
        if counter is not None:
            self.stats.last = ended = perf_counter_ns()
            counter.done(count, size, ended - began)
        return found

    # -- drain
    def hold(self) -> None:
        """Let requests wait that come from now on, until :meth:`release`."""
        self._held += 1

    def release(self) -> None:
        """Once as often as :meth:`hold`."""
        self._held -= 1
        self._changed.notify()

    async def quiet(self) -> None:
        """Wait until no request is on its way."""
        while self._running:
            await self._changed.wait()


class Source(Protocol):
    """Where requests come from; see :class:`Backend`."""

    def hold(self) -> None: ...

    def release(self) -> None: ...

    async def quiet(self) -> None: ...


class Drain:
    """Nothing is on its way through ``backends`` between :meth:`begin` and :meth:`end`."""

    def __init__(self, backends: Iterable[Source]) -> None:
        self._backends = list(backends)

    async def begin(self) -> None:
        """Let new requests wait, and wait for those that came before."""
        for backend in self._backends:
            backend.hold()
        try:
            for backend in self._backends:
                await backend.quiet()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Let the requests go on."""
        for backend in self._backends:
            backend.release()
        self._backends = []
