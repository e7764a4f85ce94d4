"""``block-set-write-threshold``: one event when a write ends behind an offset of a node."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from operator import add
from typing import Annotated, Any

from ..engine.node import Node
from ..errors import UsageError
from ..records import NamedTuple
from .commands import command, event
from .session import Monitor
from .types import SIZE

_LIMIT = 1 << 64


class Exceeded(NamedTuple):
    """By how many bytes a write went beyond the threshold of a node."""

    node_name: str
    amount_exceeded: int
    write_threshold: int


event(
    "BLOCK_WRITE_THRESHOLD", Exceeded,
    "A write ends behind the threshold of its node, which is no longer set.",
)  # fmt: skip


class Watch:
    """Stands before the writes of ``node``, until one ends behind ``threshold`` bytes (which is
    told before it is carried out) or :meth:`end`.  Nodes without a threshold pay nothing."""

    def __init__(self, node: Node, threshold: int, tell: Callable[[Exceeded], None]) -> None:
        self.threshold = threshold
        self._node, self._tell = node, tell
        self._write: Any = node.write
        self._zero: Any = node.zero
        vars(node).update(write=self._seen_write, zero=self._seen_zero)

    def end(self) -> None:
        """Look no more."""
        for name in ("write", "zero"):
            vars(self._node).pop(name, None)
        self._node.watch = None

    def _seen_write(
        self, offsets: Sequence[int], buffers: Sequence[Any], *more: Any, **named: Any
    ) -> Awaitable[None]:
        self._look(offsets, list(map(len, buffers)))
        found: Awaitable[None] = self._write(offsets, buffers, *more, **named)
        return found

    def _seen_zero(
        self, offsets: Sequence[int], lengths: Sequence[int], *more: Any, **named: Any
    ) -> Awaitable[None]:
        self._look(offsets, lengths)
        found: Awaitable[None] = self._zero(offsets, lengths, *more, **named)
        return found

    def _look(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        exceeded = max(map(add, offsets, lengths), default=0) - self.threshold
        if exceeded > 0:
            self._tell(Exceeded(self._node.name, exceeded, self.threshold))


@command("block-set-write-threshold")
def block_set_write_threshold(
    monitor: Monitor, node_name: str, write_threshold: Annotated[int, SIZE]
) -> None:
    """Tell of the first write to a node (also one of its parent's) that ends behind
    ``write-threshold`` bytes, by one BLOCK_WRITE_THRESHOLD; 0: of none."""
    daemon = monitor.daemon
    node = daemon.graph.nodes.get(node_name)
    if node is None:
        raise UsageError(f"Device '{node_name}' not found")
    if write_threshold >= _LIMIT:
        raise UsageError("Parameter 'write-threshold' expects uint64")
    if node.watch is not None:
        node.watch.end()

    def tell(what: Exceeded) -> None:
        node.watch.end()
        daemon.emit("BLOCK_WRITE_THRESHOLD", what)

    if write_threshold > 0:  # no write ends behind a negative one, which has no sign in QAPI
        node.watch = Watch(node, write_threshold, tell)
