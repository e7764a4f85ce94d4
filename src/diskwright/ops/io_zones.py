"""Commands of the io language for zoned devices: no disk here is one, and so they say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from .io_text import Complaint, cvtnum, getopt

if TYPE_CHECKING:
    from .io import Session


def _refused(what: str) -> Callable[[Session, str, list[str]], Awaitable[None]]:
    async def run(session: Session, name: str, words: list[str]) -> None:
        flags = getopt(name, words, "p")
        for word in flags.operands:
            cvtnum(word)
        raise Complaint(f"zone {what} failed: Operation not supported")

    return run


run_zone_append = _refused("append")
run_zone_close = _refused("close")
run_zone_finish = _refused("finish")
run_zone_open = _refused("open")
run_zone_report = _refused("report")
run_zone_reset = _refused("reset")
