"""Commands of the io language that move bytes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, NamedTuple

from ..contract import COMPRESSED, FUA, MAY_UNMAP, NO_FALLBACK
from ..errors import DiskError, ImageError, UnsupportedFeature
from ..graph.closing import explain
from ..graph.node import Buffer, Node
from .io_text import (
    MAX_REQUEST,
    Complaint,
    Flags,
    Transfer,
    cvtnum,
    dump,
    getopt,
    pattern_byte,
)
from .snapshots import read_vm_state, write_vm_state

if TYPE_CHECKING:
    from .io import Session

FILL = 0xCD
"""What is written when no pattern is given."""

PIECE = 64 << 20
"""Most bytes that are held in memory for one request; longer ones are moved in pieces."""


class Outcome(NamedTuple):
    """Whether a request did what was asked, and what to tell of it."""

    good: bool
    lines: list[str]


class _Check(NamedTuple):
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


async def _read(
    session: Session, offset: int, length: int, check: _Check | None, flags: Flags
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


async def _write(
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


async def _write_packed(session: Session, offset: int, length: int, source: bytes) -> Transfer:
    """Write ``source`` over and over as one request that is stored compressed."""
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    if length:
        data = memoryview(source * (length // len(source) + 1))[:length]
        await node.write([offset], [data], COMPRESSED)
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def _write_state(session: Session, offset: int, length: int, source: bytes) -> Transfer:
    """Write ``source`` over and over into the VM state."""
    began = time.perf_counter()
    block = memoryview(source * (min(length, PIECE) // len(source) + 2))
    for at, count in _pieces(offset, length):
        phase = (at - offset) % len(source)
        await write_vm_state(session.node, at, bytes(block[phase : phase + count]))
    return Transfer("wrote", offset, length, time.perf_counter() - began)


async def _zero(session: Session, offset: int, length: int, flags: Flags) -> Transfer:
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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return explain(error)


async def _outcome(session: Session, name: str, work: Coroutine[None, None, Outcome]) -> Outcome:
    """The outcome of ``work``; a failure is worded in the name of the command."""
    try:
        return await work
    except UnsupportedFeature as error:
        return Outcome(False, [f"{name} failed: {error}"])
    except ImageError as error:
        # Whoever reads the answers knows the image's faults as I/O errors; which one it is goes
        # to standard error.
        session.emit(str(error), "report")
        return Outcome(False, [f"{name} failed: {os.strerror(errno.EIO)}"])
    except (OSError, DiskError) as error:
        session.failed = True
        return Outcome(False, [f"{name} failed: {_reason(error)}"])


def _tell(session: Session, outcome: Outcome) -> bool:
    for line in outcome.lines:
        session.emit(line, "out")
    return outcome.good


async def _reported(session: Session, name: str, work: Coroutine[None, None, Outcome]) -> bool:
    return _tell(session, await _outcome(session, name, work))


async def _moved(work: Coroutine[None, None, Transfer], flags: Flags) -> Outcome:
    transfer = await work
    return Outcome(True, [] if "q" in flags else [transfer.lines("C" in flags)])


def _length(text: str, limit: bool = True, without: str = "") -> int:
    length = cvtnum(text)
    if limit and length > MAX_REQUEST:
        raise Complaint(f"length cannot exceed {MAX_REQUEST}{without}, given {text}")
    return length


def _total(words: list[str]) -> int:
    """The bytes of all buffers of a vectored request."""
    total = 0
    for word in words:
        length = cvtnum(word)
        if length > MAX_REQUEST:
            raise Complaint(f"Argument '{word}' exceeds maximum size {MAX_REQUEST}")
        total += length
        if total > MAX_REQUEST:
            raise Complaint(f"The total number of bytes exceed the maximum size {MAX_REQUEST}")
    return total


def _flags(name: str, words: list[str], spec: str, least: int, most: int) -> Flags:
    flags = getopt(name, words, spec)
    if "P" in flags.values:
        pattern_byte(flags.values["P"])
    if not least <= len(flags.operands) <= most:
        raise Complaint("", usage=True)
    return flags


def _pattern(flags: Flags) -> int | None:
    text = flags.values.get("P")
    return None if text is None else pattern_byte(text)


async def run_read(session: Session, name: str, words: list[str]) -> bool:
    """Read, verify a pattern, dump."""
    flags = _flags(name, words, "bCl:pP:qrs:v", 2, 2)
    start = cvtnum(flags.values["s"]) if "s" in flags else 0
    span = cvtnum(flags.values["l"]) if "l" in flags else None
    pattern = _pattern(flags)
    if pattern is None and ("s" in flags or "l" in flags):
        raise Complaint("", usage=True)
    offset = cvtnum(flags.operands[0])
    length = _length(flags.operands[1])
    if span is None:
        span = max(length - start, -1)
    if span < 0 or start + span > length:
        raise Complaint("pattern verification range exceeds end of read data")
    check = None if pattern is None else _Check(pattern, start, span)
    return await _reported(session, "read", _read(session, offset, length, check, flags))


async def run_readv(session: Session, name: str, words: list[str]) -> bool:
    """Read into several buffers."""
    flags = _flags(name, words, "CP:qrv", 2, len(words))
    return await _reported(session, "readv", _vectored_read(session, flags))


async def _vectored_read(session: Session, flags: Flags) -> Outcome:
    offset = cvtnum(flags.operands[0])
    length = _total(flags.operands[1:])
    pattern = _pattern(flags)
    check = None if pattern is None else _Check(pattern, 0, length)
    return await _read(session, offset, length, check, flags)


async def run_write(session: Session, name: str, words: list[str]) -> bool:
    """Write a pattern, the bytes of a file, or zeroes."""
    flags = _flags(name, words, "bcCfnpP:qrs:uz", 2, 2)
    if "b" in flags and "z" in flags:
        raise Complaint("-b and -z cannot be specified at the same time")
    if "f" in flags and ("b" in flags or "c" in flags):
        raise Complaint("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if letter in flags and "z" not in flags:
            raise Complaint(f"-{letter} requires -z to be specified")
    if sum(letter in flags for letter in "zPs") > 1:
        raise Complaint("Only one of -z, -P, and -s can be specified at the same time")
    offset = cvtnum(flags.operands[0])
    free = "z" in flags and "n" in flags
    length = _length(flags.operands[1], not free, " without -n" if "z" in flags else "")
    if "b" in flags or "c" in flags:
        for value, word in ((offset, "offset"), (length, "count")):
            if value % 512:
                raise Complaint(f"{value} is not a sector-aligned value for '{word}'")
    if "b" in flags:
        work = _write_state(session, offset, length, _source(flags))
    elif "z" in flags:
        if "r" in flags:
            raise Complaint("cannot combine zero write with registered I/O buffer")
        work = _zero(session, offset, length, flags)
    elif "c" in flags:
        work = _write_packed(session, offset, length, _source(flags))
    else:
        work = _write(session, offset, length, _source(flags), flags)
    return await _reported(session, "write", _moved(work, flags))


def _source(flags: Flags) -> bytes:
    name = flags.values.get("s")
    if name is None:
        pattern = _pattern(flags)
        return bytes([FILL if pattern is None else pattern])
    try:
        with open(name, "rb") as file:
            source = file.read(PIECE)
    except OSError as error:
        raise Complaint(f"{name}: {error.strerror}", "err") from error
    if not source:
        raise Complaint(f"{name}: file is empty", "err")
    return source


async def run_writev(session: Session, name: str, words: list[str]) -> bool:
    """Write a pattern from several buffers."""
    flags = _flags(name, words, "CfqrP:", 2, len(words))
    offset = cvtnum(flags.operands[0])
    length = _total(flags.operands[1:])
    work = _write(session, offset, length, _source(flags), flags)
    return await _reported(session, "writev", _moved(work, flags))


async def run_discard(session: Session, name: str, words: list[str]) -> bool:
    """Give up a range."""
    flags = _flags(name, words, "Cq", 2, 2)
    offset = cvtnum(flags.operands[0])
    length = _length(flags.operands[1])
    work = _discard(session, offset, length)
    return await _reported(session, "discard", _moved(work, flags))


async def _discard(session: Session, offset: int, length: int) -> Transfer:
    node = session.node
    began = time.perf_counter()
    _inside(node, offset, length)
    if length:
        await node.discard([offset], [length])
    return Transfer("discard", offset, length, time.perf_counter() - began)


async def run_flush(session: Session, name: str, words: list[str]) -> bool:
    """Make everything durable; only the exit status tells a failure, as in qemu-io."""
    try:
        await session.node.flush()
    except OSError:
        return False
    return True


# -- requests that run beside the commands


def _start(session: Session, name: str, work: Coroutine[None, None, Outcome]) -> None:
    """Let ``work`` go as far as it comes at once; what became of it is told when the commands
    wait for something."""

    async def run() -> None:
        outcome = await _outcome(session, name, work)
        await session.driver.turn()
        _tell(session, outcome)

    session.start(session.driver.start(run(), name=name, io=True))


async def run_aio_read(session: Session, name: str, words: list[str]) -> None:
    """Start a read; it tells its own outcome."""
    flags = _flags(name, words, "CP:iqrv", 2, len(words))
    if "i" in flags:
        _invalid(session, "read")
        return
    offset = cvtnum(flags.operands[0])
    length = _total(flags.operands[1:])
    pattern = _pattern(flags)
    check = None if pattern is None else _Check(pattern, 0, length)
    _start(session, "readv", _read(session, offset, length, check, flags))


async def run_aio_write(session: Session, name: str, words: list[str]) -> None:
    """Start a write; it tells its own outcome."""
    flags = _flags(name, words, "CfiP:qruz", 2, len(words))
    if "z" in flags and len(flags.operands) != 2:
        raise Complaint("-z supports only a single length parameter")
    if "u" in flags and "z" not in flags:
        raise Complaint("-u requires -z to be specified")
    if "i" in flags:
        _invalid(session, "write")
        return
    offset = cvtnum(flags.operands[0])
    if "z" in flags:
        span = cvtnum(flags.operands[1])
        _start(
            session,
            "aio_write",
            _moved(_zero(session, offset, span, flags), flags),
        )
        return
    length = _total(flags.operands[1:])
    source = _source(flags)
    _start(
        session,
        "aio_write",
        _moved(_write(session, offset, length, source, flags), flags),
    )


def _invalid(session: Session, kind: str) -> None:
    """Say that a request was refused before it was issued (``-i``, for statistics)."""
    session.emit(f"injecting invalid {kind} request", "out")


async def run_aio_flush(session: Session, name: str, words: list[str]) -> None:
    """Wait for everything that was started."""
    await session.drain()
