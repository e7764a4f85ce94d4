"""Commands of the io language that need no disk."""

from __future__ import annotations

import os
import signal

from .io import COMMANDS, Session, find, usage
from .io_text import Complaint, cvtnum, integer


async def run_help(session: Session, name: str, words: list[str]) -> None:
    """All commands in one line each, or one of them."""
    if words:
        command = find(words[0])
        if command is None:
            raise Complaint(f"command {words[0]} not found")
        session.emit(usage(command), "out")
        return
    for command in COMMANDS.values():
        session.emit(usage(command), "out")
    session.emit("\nUse 'help commandname' for extended help.", "out")


async def run_quit(session: Session, name: str, words: list[str]) -> None:
    """End the session."""
    session.finished = True


async def run_sleep(session: Session, name: str, words: list[str]) -> None:
    """Wait; requests that were started go on meanwhile."""
    milliseconds = integer(words[0])
    if milliseconds is None or not 0 <= milliseconds < 1 << 53:
        raise Complaint(f"{words[0]} is not a valid number")
    await session.driver.sleep(milliseconds / 1000)


async def run_sigraise(session: Session, name: str, words: list[str]) -> None:
    """Send this process a signal."""
    number = cvtnum(words[0])
    if number > 1 << 30:
        raise Complaint(f"signal argument '{words[0]}' is too large to be a valid signal number")
    if number:
        session.emit("", "flush")
        try:
            signal.raise_signal(number)
        except ValueError as error:
            raise Complaint(f"{words[0]} is not a signal") from error


async def run_abort(session: Session, name: str, words: list[str]) -> None:
    """End without closing anything, as a crash does."""
    session.emit("", "flush")
    os.abort()
