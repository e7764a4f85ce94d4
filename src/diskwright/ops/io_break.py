"""Commands of the io language that stop requests at breakpoints and let them go on."""

from __future__ import annotations

from ..graph.graph import primary
from ..graph.node import Node
from ..hints import TYPE_CHECKING
from .io_text import Complaint

if TYPE_CHECKING:
    from ..filters.blkdebug import BlkdebugNode
    from .io import Session


def breakpoints(node: Node | None) -> BlkdebugNode | None:
    """The first blkdebug filter on the way from ``node`` down to its bytes."""
    while node is not None:
        if node.driver_name == "blkdebug":
            from ..filters.blkdebug import BlkdebugNode

            return node if isinstance(node, BlkdebugNode) else None
        node = primary(node)
    return None


def _filter(session: Session, failure: str) -> BlkdebugNode:
    found = breakpoints(session.node)
    if found is None:
        raise Complaint(f"{failure}: Operation not supported")
    return found


def _known(done: bool, failure: str) -> None:
    if not done:
        raise Complaint(f"{failure}: No such file or directory")


async def run_break(session: Session, name: str, words: list[str]) -> None:
    """Stop the next request that comes to an event."""
    failure = "Could not set breakpoint"
    _known(_filter(session, failure).set_break(words[0], words[1]), failure)


async def run_remove_break(session: Session, name: str, words: list[str]) -> None:
    """Remove a breakpoint; requests that stand there go on."""
    failure = f"Could not remove breakpoint {words[0]}"
    _known(_filter(session, failure).remove_break(words[0]), failure)


async def run_resume(session: Session, name: str, words: list[str]) -> None:
    """Let a stopped request go on."""
    failure = "Could not resume request"
    _known(_filter(session, failure).resume(words[0]), failure)


async def run_wait_break(session: Session, name: str, words: list[str]) -> None:
    """Wait until a request stands at a breakpoint."""
    await _filter(session, "Could not wait for a breakpoint").wait_break(words[0])
