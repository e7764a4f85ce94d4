"""Commands of the io language that move bytes: their words, and how their outcome is told."""

from __future__ import annotations

import errno
import os
from collections.abc import Coroutine

from ..errors import DamagedData, DiskError, ImageError, UnsupportedFeature
from ..graph.closing import explain
from ..hints import TYPE_CHECKING
from .io_text import (
    MAX_REQUEST,
    Complaint,
    Flags,
    Transfer,
    cvtnum,
    getopt,
    pattern_byte,
)
from .io_transfer import (
    PIECE,
    Check,
    Outcome,
    discard,
    read,
    write,
    write_packed,
    write_state,
    zero,
)

if TYPE_CHECKING:
    from .io import Session

FILL = 0xCD
"""What is written when no pattern is given."""


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
    except DamagedData as error:
        session.emit(str(error), "detail")
        return Outcome(False, [f"{name} failed: {os.strerror(errno.EIO)}"])
    except ImageError as error:
        # Whoever reads the answers knows the image's faults as I/O errors; which one it is goes
        # to standard error.
        session.emit(str(error), "err" if getattr(error, "marked", False) else "report")
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
    check = None if pattern is None else Check(pattern, start, span)
    return await _reported(session, "read", read(session, offset, length, check, flags))


async def run_readv(session: Session, name: str, words: list[str]) -> bool:
    """Read into several buffers."""
    flags = _flags(name, words, "CP:qrv", 2, len(words))
    return await _reported(session, "readv", _vectored_read(session, flags))


async def _vectored_read(session: Session, flags: Flags) -> Outcome:
    offset = cvtnum(flags.operands[0])
    length = _total(flags.operands[1:])
    pattern = _pattern(flags)
    check = None if pattern is None else Check(pattern, 0, length)
    return await read(session, offset, length, check, flags)


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
        work = write_state(session, offset, length, _source(flags))
    elif "z" in flags:
        if "r" in flags:
            raise Complaint("cannot combine zero write with registered I/O buffer")
        work = zero(session, offset, length, flags)
    elif "c" in flags:
        work = write_packed(session, offset, length, _source(flags))
    else:
        work = write(session, offset, length, _source(flags), flags)
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
    work = write(session, offset, length, _source(flags), flags)
    return await _reported(session, "writev", _moved(work, flags))


async def run_discard(session: Session, name: str, words: list[str]) -> bool:
    """Give up a range."""
    flags = _flags(name, words, "Cq", 2, 2)
    offset = cvtnum(flags.operands[0])
    length = _length(flags.operands[1])
    work = discard(session, offset, length)
    return await _reported(session, "discard", _moved(work, flags))


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
    check = None if pattern is None else Check(pattern, 0, length)
    _start(session, "readv", read(session, offset, length, check, flags))


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
            _moved(zero(session, offset, span, flags), flags),
        )
        return
    length = _total(flags.operands[1:])
    source = _source(flags)
    _start(
        session,
        "aio_write",
        _moved(write(session, offset, length, source, flags), flags),
    )


def _invalid(session: Session, kind: str) -> None:
    """Say that a request was refused before it was issued (``-i``, for statistics)."""
    session.emit(f"injecting invalid {kind} request", "out")


async def run_aio_flush(session: Session, name: str, words: list[str]) -> None:
    """Wait for everything that was started."""
    await session.drain()
