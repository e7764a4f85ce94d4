"""``io``: the io language from the command line and from standard input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator

from ..engine.kernel import Deadlock
from ..errors import DiskError, UsageError
from ..ops.io import Emit, Session
from ..ops.io_disk import Opened, OpenFailed
from .images import gate, new_driver, secrets, take_budget, warn_if_guessed
from .options import (
    BUDGETS,
    FORCE_SHARE,
    FORMAT,
    GATE,
    HELP,
    IMAGE_OPTS,
    OBJECT,
    Args,
    Opt,
    help_text,
)
from .options import parse as parse_options
from .output import Call, hush, output_failed, reason, to_stderr

PROMPT = "qemu-io> "

OPTIONS = (
    HELP,
    Opt("V", "version", "", "show the version and exit"),
    Opt("c", "cmd", "COMMAND", "carry out a command of the io language (may be repeated)"),
    FORMAT,
    Opt("r", "read-only", "", "open the image for reading"),
    Opt("s", "snapshot", "", "write to a temporary overlay"),
    Opt("n", "nocache", "", "go around the page cache, short for -t none"),
    Opt("C", "copy-on-read", "", "(not supported by this version)"),
    Opt("m", "misalign", "", "(taken for compatibility)"),
    Opt("k", "native-aio", "", "the same as --aio native"),
    Opt("i", "aio", "AIO", "threads, native or io_uring (taken for compatibility)"),
    Opt("t", "cache", "CACHE", "cache mode (default: writethrough)"),
    Opt("d", "discard", "DISCARD", "unmap (default) or ignore"),
    Opt("T", "trace", "PATTERN", "(taken for compatibility)"),
    FORCE_SHARE,
    IMAGE_OPTS,
    OBJECT,
    *GATE,
    *BUDGETS,
)


def main(call: Call, argv: list[str]) -> int:
    """Carry out commands on a disk: those of ``-c``, or what standard input has."""
    args = parse_options(argv, OPTIONS)
    if "help" in args:
        call.out(
            help_text(
                f"{call.title} [OPTIONS] [-c COMMAND]... [FILE]",
                "Read and write a disk by commands; 'help' among them tells which there are.",
                OPTIONS,
            ),
            "",
        )
        return 0
    if "version" in args:
        from .main import version

        call.out(version(call.name))
        return 0
    if len(args.operands) > 1:
        raise UsageError("Expecting at most one image file name")
    keys = secrets(args)
    opened = _described(args)
    take_budget(args)
    driver = new_driver()
    session = Session(
        driver, _emitter(call), gate(args), lambda disk: _opened(call, disk), secrets=keys
    )
    try:
        try:
            return driver.run(driver.in_time(_run(call, session, opened, args.all("cmd"))))
        except Deadlock:
            call.error("nothing can go on: what is waited for stands at a breakpoint")
            driver.run(session.close())
            return 1
    finally:
        driver.close()


def _described(args: Args) -> Opened | None:
    """The disk that the options describe; None without a file name."""
    if "image-opts" in args and "format" in args:
        raise UsageError("--image-opts and -f are mutually exclusive")
    if "copy-on-read" in args:
        raise UsageError("copy-on-read is not supported by this version")
    name = args.operands[0] if args.operands else None
    opened = Opened(name, name or "")
    opened.format = args.get("format")
    opened.writable = "read-only" not in args
    opened.snapshot = "snapshot" in args
    opened.force_share = "force-share" in args
    for key, value in args.options:
        if key == "nocache":
            opened.set_cache("none")
        elif key == "cache":
            opened.set_cache(value)
        elif key == "discard":
            opened.set_discard(value)
        elif key == "aio":
            opened.set_aio(value)
        elif key == "native-aio":
            opened.set_aio("native")
    if name is None:
        return None
    if "image-opts" in args:
        from ..graph.names import parse_image_opts

        opened.name = None
        try:
            opened.reference = parse_image_opts(name)
        except UsageError as error:
            raise OpenFailed(None, error) from error
    return opened


def _emitter(call: Call) -> Emit:
    def emit(text: str, stream: str) -> None:
        if stream == "out":
            _say(text + "\n")
        elif stream == "err":
            to_stderr(text + "\n")
        elif stream in ("report", "detail"):
            if stream == "report" or call.name != "qemu-io":
                call.error(text)
        else:
            _say("", now=True)

    return emit


def _say(text: str, *, now: bool = False) -> None:
    """Write to standard output; that nobody reads it keeps no command from its work."""
    try:
        sys.stdout.write(text)
        if now:
            sys.stdout.flush()
    except BrokenPipeError:
        hush()
    except OSError as error:
        raise output_failed(error) from error


def _opened(call: Call, opened: Opened) -> None:
    if opened.writable and opened.name is not None:
        warn_if_guessed(call, opened.name, opened.node)


async def _run(call: Call, session: Session, opened: Opened | None, commands: list[str]) -> int:
    failed = False
    try:
        if opened is not None:
            await session.open(opened)
        if commands:
            for command in commands:
                failed |= not await session.execute(command)
                if session.finished:
                    break
        else:
            async for line in _lines(session):
                failed |= not await session.execute(line)
                if session.finished:
                    break
    except (OSError, DiskError) as error:
        call.error(reason(error))
        failed = True
    failed |= not await session.close()
    return int(failed)


async def _lines(session: Session) -> AsyncIterator[str]:
    """Lines of standard input, each asked for by a prompt; requests go on while it waits."""
    kept = b""
    ended = False
    while True:
        _say(PROMPT, now=True)
        while b"\n" not in kept and not ended:
            chunk = await _more(session)
            ended = not chunk
            kept += chunk
        line, end, kept = kept.partition(b"\n")
        if not line and not end:
            return
        yield os.fsdecode(line)


async def _more(session: Session) -> bytes:
    fd = sys.stdin.fileno()
    mode = os.fstat(fd).st_mode
    if sys.platform != "win32" and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or os.isatty(fd)):
        await session.driver.readable(fd)
    else:
        await session.driver.turn()  # a file is always ready, and cannot be waited for
    return os.read(fd, 1 << 16)
