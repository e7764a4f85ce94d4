"""The rules of blkdebug: what an event arms, what an armed rule fails, where requests stop.

Behaviour as documented for the driver (docs/devel/testing/blkdebug.rst of QEMU) and measured with
qemu-io 10.0 where that leaves it open.
"""

from __future__ import annotations

from ..engine.kernel import Future
from ..records import NamedTuple

_EVENTS = """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio
    read_compressed write_aio write_compressed vmstate_load vmstate_save cow_read cow_write
    reftable_load reftable_grow reftable_update refblock_load refblock_update
    refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write
    refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table
    cluster_alloc cluster_alloc_bytes cluster_free flush_to_os flush_to_disk pwritev_rmw_head
    pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
    pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write
    cluster_alloc_space none
"""
EVENTS = frozenset(_EVENTS.split())
"""All that a parent or the node itself may announce; ``none`` stands for no event."""

IOTYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")


class InjectError(NamedTuple):
    """Fail requests once ``event`` came while the machine was in ``state`` (0: in any).

    ``iotype``: one of :data:`IOTYPES`, None for all but ``block-status``.  ``errno``: the error.
    ``sector``: only requests that hold the first byte of this 512-byte sector; -1 for all.
    ``once``: only the first.  ``immediately``: without giving way to others before.
    """

    event: str
    state: int = 0
    iotype: str | None = None
    errno: int = 5
    sector: int = -1
    once: bool = False
    immediately: bool = False

    def matches(self, iotype: str, offset: int, length: int) -> bool:
        """Whether a request (bytes; a flush has none) is one that this rule fails."""
        if iotype != self.iotype and (self.iotype is not None or iotype == "block-status"):
            return False
        return self.sector < 0 or offset <= self.sector * 512 < offset + length


class SetState(NamedTuple):
    """Go to ``new_state`` when ``event`` comes in ``state`` (0: in any)."""

    event: str
    state: int = 0
    new_state: int = 0


class _Break:
    __slots__ = ("event", "tag")

    def __init__(self, event: str, tag: str) -> None:
        self.event, self.tag = event, tag


class _Stopped:
    __slots__ = ("future", "tag")

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.future: Future[None] = Future()


class Machine:
    """Rules in the order of the configuration, and breakpoints.

    The state starts at 1.  Rules with the event ``none`` are armed from the start.  An event that
    arms at least one rule disarms all others; any other event leaves what is armed as it is.
    """

    def __init__(self, inject: list[InjectError], states: list[SetState]) -> None:
        self.state = 1
        self._inject = list(inject)
        self._states = list(states)
        self._armed: list[InjectError] = []
        self._breaks: list[_Break] = []
        self._stopped: list[_Stopped] = []
        self._waiting: dict[str, list[Future[None]]] = {}
        self.messages: list[str] = []
        """What the tools say of stopped and resumed requests, until somebody takes it."""
        self._arm("none")

    # -- events
    def _arm(self, event: str) -> None:
        armed = [r for r in self._inject if r.event == event and r.state in (0, self.state)]
        if armed:
            self._armed = armed

    def event(self, event: str) -> list[Future[None]]:
        """``event`` came: arm rules, change the state, stop at breakpoints.

        Returns what the request must wait for, one after the other.  All rules see the state as
        it was before the event; of several that change it the first wins.
        """
        self._arm(event)
        for rule in self._states:
            if rule.event == event and rule.state in (0, self.state):
                self.state = rule.new_state
                break
        hit = [b for b in self._breaks if b.event == event]
        if not hit:
            return []
        self._breaks = [b for b in self._breaks if b.event != event]
        # The breakpoint that was set last stops it first.
        return [self._stop(b.tag) for b in reversed(hit)]

    def _stop(self, tag: str) -> Future[None]:
        stopped = _Stopped(tag)
        self._stopped.append(stopped)
        self.messages.append(f"blkdebug: Suspended request '{tag}'")
        for waiter in self._waiting.pop(tag, []):
            waiter.set()
        return stopped.future

    def failing(self, iotype: str, offset: int = 0, length: int = 0) -> InjectError | None:
        """The armed rule that fails this request, if any; one of ``once`` is used up by it."""
        for rule in self._armed:
            if rule.matches(iotype, offset, length):
                if rule.once:
                    self._armed = [r for r in self._armed if r is not rule]
                    self._inject = [r for r in self._inject if r is not rule]
                return rule
        return None

    # -- breakpoints
    def add_break(self, event: str, tag: str) -> bool:
        """Stop the next request that comes to ``event``; False for an unknown event."""
        if event not in EVENTS:
            return False
        self._breaks.append(_Break(event, tag))
        return True

    def is_stopped(self, tag: str) -> bool:
        """True while a request stands at the breakpoint ``tag``."""
        return any(s.tag == tag for s in self._stopped)

    def resume(self, tag: str) -> bool:
        """Let the first request that stopped at ``tag`` go on; False when there is none."""
        for stopped in self._stopped:
            if stopped.tag == tag:
                self._stopped.remove(stopped)
                self.messages.append(f"blkdebug: Resuming request '{tag}'")
                stopped.future.set()
                return True
        return False

    def remove_break(self, tag: str) -> bool:
        """Remove the breakpoints called ``tag``; the requests that stand there go on.

        False when no breakpoint was left to remove (one that stopped a request is used up).
        """
        kept = [b for b in self._breaks if b.tag != tag]
        removed = len(kept) < len(self._breaks)
        self._breaks = kept
        while self.resume(tag):
            pass
        return removed

    def stopped(self, tag: str) -> Future[None]:
        """Resolved when a request stands at ``tag``."""
        future: Future[None] = Future()
        if self.is_stopped(tag):
            future.set()
        else:
            self._waiting.setdefault(tag, []).append(future)
        return future

    def release(self) -> None:
        """Forget all breakpoints and let every stopped request go on."""
        self._breaks.clear()
        for stopped in list(self._stopped):
            self.resume(stopped.tag)
