"""``qmp``: a shell for monitors, of ours and of QEMU's."""

from __future__ import annotations

import sys

from .images import arguments, one_operand, seconds
from .options import Opt
from .output import Call

OPTIONS = (
    Opt("c", "command", "COMMAND", "carry out COMMAND, and end (repeatable)"),
    Opt("e", "events", "", "in a script: print events, too, as they come"),
    Opt("k", "keep-going", "", "in a script: go on behind a command that failed"),
    Opt("p", "pretty", "", "in a script: print as for people"),
    Opt("", "timeout", "SECONDS", "give up when a reply or an event takes longer"),
)


def main(call: Call, argv: list[str]) -> int:
    """Carry out what is typed, or what a script says."""
    summary = (
        "Talk to a QMP monitor: SOCKET is the path of a unix socket, or HOST:PORT.\n"
        "Commands are 'COMMAND key=value a.b=c', or JSON; 'help' lists them."
    )
    args = arguments(call, argv, OPTIONS, "SOCKET", summary)
    if args is None:
        return 0
    address = one_operand(args, "the socket of a monitor")
    from ..console.connection import connect
    from ..console.shell import Shell, history_path

    typed = "command" not in args and sys.stdin.isatty() and sys.stdout.isatty()

    def out(text: str) -> None:
        call.out(text, "")
        sys.stdout.flush()

    timeout = args.get("timeout")
    shell = Shell(
        connect(address),
        out,
        pretty=typed or "pretty" in args,
        events=typed or "events" in args,
        timeout=None if timeout is None else seconds("--timeout", timeout),
    )
    try:
        if typed:
            shell.interactive(history_path())
            return 0
        lines = args.all("command") if "command" in args else sys.stdin
        return 0 if shell.script(lines, "keep-going" in args) else 1
    finally:
        shell.close()
