"""What the requests of the io language do to the disk, timed."""

from __future__ import annotations

import errno
import os
import time

from ..contract import COMPRESSED, FUA, MAY_UNMAP, NO_FALLBACK
from ..graph.node import Buffer, Node
from ..hints import TYPE_CHECKING
from ..records import NamedTuple
from .io_text import Flags, Transfer, dump
from .snapshots import read_vm_state, write_vm_state

if TYPE_CHECKING:
    from .io import Session

PIECE = 64 << 20
"""Most bytes that are held in memory for one request; longer ones are moved in pieces."""


class Outcome(NamedTuple):
    """Whether a request did what was asked, and what to tell of it."""

    good: bool
    lines: list[str]


class Check(NamedTuple):
    """Bytes that must be ``byte``: ``length`` of them, ``start`` behind the request's offset."""

    byte: int
    start: int
    length: int


def _inside(node: Node, offset: int, length: int) -> None:
    if offset + length > node.size:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    if length <= PIECE:
        return [(offset, length)]
    end = offset + length
    return [(at, min(PIECE, end - at)) for at in range(offset, end, PIECE)]


async def read(
    session: Session, offset: int, length: int, check: Check | None, flags: Flags
) -> Outcome:
    """Read, verify and dump; not good when the bytes are not the pattern."""
    node = session.node
    began = time.perf_counter()
    state = "b" in flags
    if not state:
        _inside(node, offset, length)
    good = True
    shown: list[str] = []
    seconds = 0.0
    for at, count in _pieces(offset, length):
        if state:
            data: Buffer = await read_vm_state(node, at, count)
        else:
            (data,) = await node.read([at], [count]) if count else (b"",)
        seconds = time.perf_counter() - began
        if check is not None and good:
            first = max(check.start, at - offset)
            last = min(check.start + check.length, at - offset + count)
            if first < last:
                view = memoryview(data)[first - (at - offset) : last - (at - offset)]
                good = view == bytes([check.byte]) * (last - first)
        if "v" in flags and "q" not in flags:
            shown += dump(data, at)
    if "q" not in flags:
        shown.append(Transfer("read", offset, length, seconds).lines("C" in flags))
    if check is not None and not good:
        where = f"at offset {offset + check.start}, {check.length} bytes"
        shown.insert(0, f"Pattern verification failed {where}")
    return Outcome(good, shown)


async def write(
    session: Session, offset: int, length: int, source: bytes, flags: Flags
) -> Transfer:
    """Write ``source`` over and over until ``length`` bytes are full."""
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    request = FUA if "f" in flags else 0
    held = min(length, PIECE)
    block = memoryview(source * (held // len(source) + 2))
    for at, count in _pieces(offset, length):
        if count:
            phase = (at - offset) % len(source)
            await node.write([at], [block[phase : phase + count]], request)
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def write_packed(session: Session, offset: int, length: int, source: bytes) -> Transfer:
    """Write ``source`` over and over as one request that is stored compressed."""
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    if length:
        data = memoryview(source * (length // len(source) + 1))[:length]
        await node.write([offset], [data], COMPRESSED)
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def write_state(session: Session, offset: int, length: int, source: bytes) -> Transfer:
    """Write ``source`` over and over into the VM state."""
    began = time.perf_counter()
    block = memoryview(source * (min(length, PIECE) // len(source) + 2))
    for at, count in _pieces(offset, length):
        phase = (at - offset) % len(source)
        await write_vm_state(session.node, at, bytes(block[phase : phase + count]))
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def zero(session: Session, offset: int, length: int, flags: Flags) -> Transfer:
    """Zero a range as the flags -f, -u and -n say."""
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    request = (
        (FUA if "f" in flags else 0)
        | (MAY_UNMAP if "u" in flags else 0)
        | (NO_FALLBACK if "n" in flags else 0)
    )
    await node.zero([offset], [length], request)
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def discard(session: Session, offset: int, length: int) -> Transfer:
    """Give a range up."""
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    if length:
        await node.discard([offset], [length])
    return Transfer("discard", offset, length, time.perf_counter() - began)
