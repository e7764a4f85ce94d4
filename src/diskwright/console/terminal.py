"""A terminal by ANSI's sequences alone: its size, a screen of our own, keys.  No curses, which
Windows does not have."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_ENTER = "\x1b[?1049h\x1b[?25l"  # another screen, no cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"


def frame(lines: list[str]) -> str:
    """What shows ``lines`` in place of what the screen shows; without a blink between them."""
    columns, rows = shutil.get_terminal_size()
    shown = "\x1b[K\r\n".join(line[:columns] for line in lines[:rows])
    return f"\x1b[H{shown}\x1b[K\x1b[J"


if sys.platform == "win32":
    import msvcrt

    def prepare() -> None:
        """Have the console understand ANSI's sequences."""
        import ctypes

        kernel = ctypes.windll.kernel32
        handle = kernel.GetStdHandle(-11)  # standard output
        mode = ctypes.c_uint32()
        if kernel.GetConsoleMode(handle, ctypes.byref(mode)):
            kernel.SetConsoleMode(handle, mode.value | 4)  # virtual terminal processing

    @contextmanager
    def _keys() -> Iterator[None]:
        yield

    def key(seconds: float) -> str:
        """A key that is pressed within so long; empty without."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if msvcrt.kbhit():
                return msvcrt.getwch()
            time.sleep(0.05)
        return ""

else:
    import os
    import select
    import termios
    import tty

    def prepare() -> None:
        """Nothing needs to be done for ANSI's sequences."""

    @contextmanager
    def _keys() -> Iterator[None]:
        """Keys come one by one and are not shown."""
        before = termios.tcgetattr(0)
        tty.setcbreak(0)
        try:
            yield
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)

    def key(seconds: float) -> str:
        """A key that is pressed within so long; empty without."""
        if not select.select([0], [], [], seconds)[0]:
            return ""
        return os.read(0, 1).decode("ascii", "replace") or "q"  # at the end of input, too


@contextmanager
def screen() -> Iterator[None]:
    """A screen of our own on standard output, and keys from standard input, which are terminals."""
    prepare()
    with _keys():
        sys.stdout.write(_ENTER)
        try:
            yield
        finally:
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
