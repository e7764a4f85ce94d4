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

    def path_of(self, fd: int, filename: str) -> str:
        import ctypes
        import msvcrt

        text = ctypes.create_unicode_buffer(1 << 15)
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(fd))
        ask = ctypes.windll.kernel32.GetFinalPathNameByHandleW
        if not 0 < ask(handle, text, len(text), 0) < len(text):
            raise ctypes.WinError()
        return text.value.removeprefix("\\\\?\\")
