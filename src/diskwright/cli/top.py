"""``top``: what the disks of a daemon do, live."""

from __future__ import annotations

import json
import shutil
import sys
import time

from ..errors import UsageError
from .images import arguments, one_operand, seconds
from .options import Opt
from .output import Call

OPTIONS = (
    Opt("d", "delay", "SECONDS", "between two looks (default 2)"),
    Opt("n", "number", "COUNT", "end after so many looks"),
    Opt("", "once", "", "print the rates of one interval, and end"),
    Opt("", "json", "", "print each look as a line of JSON"),
    Opt("a", "all", "", "also nodes that nobody gave a name"),
)


def main(call: Call, argv: list[str]) -> int:
    """Show rates until somebody presses q."""
    summary = (
        "Show what disks, nodes and jobs behind a QMP monitor do: requests and bytes per second,\n"
        "latencies, progress. SOCKET is the path of a unix socket, or HOST:PORT. q ends it."
    )
    args = arguments(call, argv, OPTIONS, "SOCKET", summary)
    if args is None:
        return 0
    address = one_operand(args, "the socket of a monitor")
    delay = seconds("--delay", args.get("delay") or "2")
    count = 1 if "once" in args else _count(args.get("number"))
    from ..console import terminal
    from ..console.connection import Connection, connect
    from ..console.sample import Watcher
    from ..console.shell import shown
    from ..console.tables import page

    live = sys.stdout.isatty() and sys.stdin.isatty() and not ("json" in args or count == 1)
    connection = Connection(connect(address))
    try:
        watcher = Watcher(connection)
        title = f"{shown(address)}  {shown(connection.version)}"

        def lines() -> list[str]:
            view = watcher.view()
            if "json" in args:
                return [json.dumps(view.to_dict())]
            return page(view, title, shutil.get_terminal_size().columns, "all" in args)

        if live:
            with terminal.screen():
                while count != 0:
                    sys.stdout.write(terminal.frame(lines()))
                    sys.stdout.flush()
                    if terminal.key(delay) in ("q", "Q", "\x03"):
                        break
                    count -= 1
            return 0
        watcher.view()  # rates need two looks
        while count != 0:
            time.sleep(delay)
            call.out("\n".join(lines()))
            sys.stdout.flush()
            count -= 1
        return 0
    finally:
        connection.close()


def _count(text: str | None) -> int:
    """How many looks; -1: until somebody ends it.  Raises UsageError."""
    if text is None:
        return -1
    if not text.isdecimal() or not 0 < len(text) < 10 or not int(text):
        raise UsageError(f"--number expects a number above 0, not '{text}'")
    return int(text)
