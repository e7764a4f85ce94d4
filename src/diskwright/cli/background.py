"""What servers do with their process: go on in the background, leave their process id."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..errors import UsageError
from .output import Call, reason, to_stderr


def in_background(call: Call, serve: Callable[[Callable[[], None]], None]) -> int:
    """Run ``serve(listening)`` in a child of its own session; the status is the child's until it
    has called ``listening``."""
    if sys.platform == "win32":
        raise UsageError("serving in the background is not supported on this system")
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with open(reader, "rb") as told:
            return 0 if told.read(1) else call.failure
    os.close(reader)
    os.setsid()

    def listening() -> None:
        detach()
        os.write(writer, b"\1")
        os.close(writer)

    try:
        serve(listening)
    except Exception as error:
        to_stderr(f"{call.name}: {reason(error)}\n")
        os._exit(call.failure)
    os._exit(0)


def detach() -> None:
    """Let go of the terminal, or whatever standard input, output and error were."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def write_pid(path: str) -> None:
    """Write this process's id to a file.  Raises UsageError."""
    try:
        with open(path, "w") as file:
            file.write(f"{os.getpid()}\n")
    except OSError as error:
        raise UsageError(f"Could not create '{path}': {error.strerror}") from error


def unlink(path: str) -> None:
    """Remove a file that may be gone already."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
