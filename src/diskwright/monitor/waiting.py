"""A command that tells what waits for what."""

from __future__ import annotations

from typing import Annotated, Any

from ..engine.waiting import report
from ..records import NamedTuple
from .commands import command
from .session import Monitor
from .types import ANY


class Waiting(NamedTuple):
    """``requests`` that wait, each a tree of ``what``, ``waits-for`` and, where requests are
    traced, ``seconds``; ``text`` says the same, and what is idle."""

    requests: Annotated[list[Any], ANY]
    text: str


@command("x-debug-query-waiting", oob=True, features=("unstable",))
def x_debug_query_waiting(monitor: Monitor) -> Waiting:
    """Tell what every request waits for: I/O, leases and who holds them, other requests.  Out of
    band it is answered while other commands hang."""
    found = report(monitor.driver)
    return Waiting([one.to_dict() for one in found.stuck], str(found))
