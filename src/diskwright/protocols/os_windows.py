"""The table for Windows: what the ``os`` module gives there, which has no positional I/O, so that
a seek and the transfer behind it happen under one lock."""

from __future__ import annotations

import os
import sys

from .os_portable import Portable

assert sys.platform == "win32"


class Windows(Portable):
    """No locks, holes or direct I/O."""

    name = "windows"

    def open(self, filename: str, flags: int, mode: int = 0o666) -> int:
        return os.open(filename, flags | os.O_BINARY | os.O_NOINHERIT, mode)
