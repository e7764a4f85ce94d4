"""Commands of the io language that tell of the disk: its size, its format, what it holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..graph.graph import chain
from ..graph.node import Node
from .io_text import Complaint, cvtnum, getopt, size_text

if TYPE_CHECKING:
    from .io import Session

_ALLOC_STEP = 512


async def run_length(session: Session, name: str, words: list[str]) -> None:
    """The size of the disk."""
    session.emit(size_text(session.node.size), "out")


async def run_truncate(session: Session, name: str, words: list[str]) -> None:
    """Change the size of the disk."""
    flags = getopt(name, words, "m:")
    if not flags.operands:
        raise Complaint("", usage=True)
    mode = flags.values.get("m", "off")
    if mode not in ("off", "metadata", "falloc", "full"):
        raise Complaint(f"Invalid preallocation mode '{mode}'", "report")
    await session.node.truncate(cvtnum(flags.operands[0]), mode)


async def run_info(session: Session, name: str, words: list[str]) -> None:
    """Name and facts of the format."""
    node = session.node
    format = getattr(node, "format", None)
    cluster = getattr(format, "cluster_size", 0)
    state = 0
    shift = getattr(format, "l1_shift", None)
    if shift is not None:
        state = -(-node.size >> shift) << shift
    session.emit(f"format name: {node.driver_name}", "out")
    session.emit(f"cluster size: {size_text(cluster)}", "out")
    session.emit(f"vm state offset: {size_text(state)}", "out")
    describe: Callable[[], dict[str, Any]] | None = getattr(format, "info", None)
    specific = describe() if describe is not None else {}
    if specific:
        from .info import nested

        session.emit("Format specific information:", "out")
        for line in nested(specific, "    "):
            session.emit(line, "out")


async def _held(node: Node, start: int, length: int) -> list[tuple[int, int, bool]]:
    """(start, length, held) for a prefix of a range: whether the top layer of the chain, below
    any filters, holds it."""
    from ..graph.status import allocated_above

    top = next(chain(node))
    if top is not node:
        await node.extents(start, length)  # a filter may refuse to say
    return await allocated_above(top, top.child("backing"), start, length)


async def run_alloc(session: Session, name: str, words: list[str]) -> None:
    """How many bytes of a range this image holds itself."""
    node = session.node
    start = cvtnum(words[0])
    count = cvtnum(words[1]) if len(words) > 1 else _ALLOC_STEP
    end = min(start + count, node.size)
    held, at = 0, start
    try:
        while at < end:
            for first, length, allocated in await _held(node, at, end - at):
                held += length if allocated else 0
                at = first + length
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Complaint(f"is_allocated failed: {reason}") from error
    total = max(end - start, 0)
    session.emit(f"{held}/{total} bytes allocated at offset {size_text(start)}", "out")


async def run_map(session: Session, name: str, words: list[str]) -> None:
    """The ranges that this image holds itself, and those that it does not."""
    node = session.node
    at, begin, held = 0, 0, False
    try:
        while at < node.size:
            for first, length, allocated in await _held(node, at, node.size - at):
                if first and allocated != held:
                    _tell_range(session, begin, first, held)
                    begin = first
                held, at = allocated, first + length
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise Complaint(f"Failed to get allocation status: {reason}", "report") from error
    if at > begin:
        _tell_range(session, begin, at, held)


def _tell_range(session: Session, begin: int, end: int, held: bool) -> None:
    length, word = end - begin, "   " if held else "not"
    session.emit(
        f"{size_text(length)} ({length:#x}) bytes {word} allocated at offset "
        f"{size_text(begin)} ({begin:#x})",
        "out",
    )
