"""The io language: reading, writing and poking at a disk by commands, line by line.

A :class:`Session` carries out lines and tells the outcome by a callback; the command line and
monitors feed it.  The language is that of qemu-io (measured with 10.0).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import import_module

from ..engine.kernel import BaseDriver, Future
from ..errors import DiskError, FlushFailed
from ..graph.closing import explain
from ..graph.gate import Gate
from ..graph.node import Node
from ..records import NamedTuple
from .io_break import breakpoints
from .io_disk import Opened, OpenFailed, open_disk_as
from .io_text import Complaint

Emit = Callable[[str, str], None]
"""Told a text and its stream: ``out``, ``err``, ``report`` (an error that wants the program's name
before it), or ``detail`` (the same, of which qemu-io says nothing).  A text may have several
lines; it has no line end."""


class Command(NamedTuple):
    """One command.  ``least`` and ``most`` arguments (-1: any number); ``disk``: needs an open
    disk; ``write``: needs a writable one; ``where``: the module that has ``run_NAME``."""

    name: str
    alias: str
    least: int
    most: int
    synopsis: str
    summary: str
    where: str = "io_disk"
    disk: bool = True
    write: bool = False


_MOVE = "io_requests"
_TELL = "io_facts"
_BREAK = "io_break"
_SELF = "io_session"
_ZONES = "io_zones"
_COMMANDS = (
    Command("abort", "", 0, 0, "", "end as by a crash", _SELF, disk=False),
    Command("aio_flush", "", 0, 0, "", "wait for all requests that were started", _MOVE),
    Command("aio_read", "", 2, -1, "[-Ciqrv] [-P pattern] off len [len..]",
            "start a read", _MOVE),
    Command("aio_write", "", 2, -1, "[-Cfiqruz] [-P pattern] off len [len..]",
            "start a write", _MOVE, write=True),
    Command("alloc", "", 1, 2, "offset [count]", "tell how much of a range this image holds",
            _TELL),
    Command("break", "", 2, 2, "event tag", "stop the next request that comes to an event",
            _BREAK),
    Command("close", "c", 0, 0, "", "close the disk"),
    Command("discard", "d", 2, -1, "[-Cq] off len", "give up the bytes of a range", _MOVE,
            write=True),
    Command("flush", "f", 0, 0, "", "make all that was written durable", _MOVE),
    Command("help", "?", 0, 1, "[command]", "tell what there is", _SELF, disk=False),
    Command("info", "i", 0, 0, "", "tell what the image is", _TELL),
    Command("length", "l", 0, 0, "", "tell the size of the disk", _TELL),
    Command("map", "", 0, 0, "", "tell which ranges this image holds", _TELL),
    Command("open", "o", 1, -1, "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
            "open a disk", disk=False),
    Command("quit", "q", 0, -1, "", "end", _SELF, disk=False),
    Command("read", "r", 2, -1, "[-abCqrv] [-P pattern [-s off] [-l len]] off len",
            "read a range", _MOVE),
    Command("readv", "", 2, -1, "[-Cqrv] [-P pattern] off len [len..]",
            "read a range into several buffers", _MOVE),
    Command("remove_break", "", 1, 1, "tag", "remove a breakpoint", _BREAK),
    Command("reopen", "", 0, -1, "[(-r|-w)] [-c cache] [-o options]",
            "open the disk again in another way"),
    Command("resume", "", 1, 1, "tag", "let a stopped request go on", _BREAK),
    Command("sigraise", "", 1, 1, "signal", "send a signal to this process", _SELF, disk=False),
    Command("sleep", "", 1, 1, "ms", "wait for so many milliseconds", _SELF, disk=False),
    Command("truncate", "t", 1, 3, "[-m prealloc_mode] off", "change the size of the disk",
            _TELL, write=True),
    Command("wait_break", "", 1, 1, "tag", "wait until a request is stopped", _BREAK),
    Command("write", "w", 2, -1, "[-bcCfnqruz] [-P pattern | -s source_file] off len",
            "write a range", _MOVE, write=True),
    Command("writev", "", 2, -1, "[-Cfqr] [-P pattern] off len [len..]",
            "write a range from several buffers", _MOVE, write=True),
    Command("zone_append", "zap", 3, 4, "offset len [len..]", "append to a zone", _ZONES),
    Command("zone_close", "zc", 2, 2, "offset len", "close zones", _ZONES),
    Command("zone_finish", "zf", 2, 2, "offset len", "fill zones up", _ZONES),
    Command("zone_open", "zo", 2, 2, "offset len", "open zones", _ZONES),
    Command("zone_report", "zrp", 2, 2, "offset number", "tell of zones", _ZONES),
    Command("zone_reset", "zrs", 2, 2, "offset len", "empty zones", _ZONES),
)  # fmt: skip

COMMANDS = {command.name: command for command in _COMMANDS}
_BY_WORD = COMMANDS | {command.alias: command for command in _COMMANDS if command.alias}

Handler = Callable[["Session", str, list[str]], Awaitable[bool | None]]


def find(word: str) -> Command | None:
    """The command that ``word`` (a name or an alias) calls."""
    return _BY_WORD.get(word)


def usage(command: Command) -> str:
    """One line: name, arguments, what it does."""
    arguments = f" {command.synopsis}" if command.synopsis else ""
    return f"{command.name}{arguments} -- {command.summary}"


class Session:
    """One run of the language: at most one open disk, and the requests that were started on it.

    ``on_open`` is told of every disk that was opened.  ``finished`` becomes True with ``quit``.
    """

    def __init__(
        self,
        driver: BaseDriver,
        emit: Emit,
        gate: Gate | None = None,
        on_open: Callable[[Opened], None] | None = None,
        secrets: Mapping[str, bytes] | None = None,
    ) -> None:
        self.driver = driver
        self.emit = emit
        self.gate = gate or Gate()
        self.on_open = on_open
        self.secrets = secrets
        self.opened: Opened | None = None
        self.finished = False
        self.failed = False
        """True once a request has failed and that was told."""
        self.pending: list[Future[None]] = []

    @property
    def node(self) -> Node:
        """The open disk."""
        if self.opened is None:
            raise Complaint("no file open, try 'help open'", "err")
        return self.opened.node

    async def execute(self, line: str) -> bool:
        """Carry out one line; False when it failed (it was told why)."""
        words = [word for word in line.split(" ") if word]
        if not words:
            return True
        command = find(words[0])
        if command is None:
            self.emit(f'command "{words[0]}" not found', "err")
            return False
        try:
            self._check(command, words)
            module = import_module(f"{__package__}.{command.where}")
            handler: Handler = getattr(module, f"run_{command.name}")
            return await handler(self, words[0], words[1:]) is not False
        except Complaint as complaint:
            if complaint.text:
                self.emit(complaint.text, complaint.stream)
            if complaint.usage:
                self.emit(usage(command), "out")
        except OpenFailed as error:
            self.emit(str(error), "report")
        except (OSError, DiskError) as error:
            self.emit(explain(error), "report")
        return False

    def _check(self, command: Command, words: list[str]) -> None:
        if command.disk:
            _ = self.node
        count = len(words) - 1
        if count < command.least or 0 <= command.most < count:
            if command.most < 0:
                expected = f"at least {command.least}"
            elif command.least == command.most:
                expected = f"{command.least}"
            else:
                expected = f"between {command.least} and {command.most}"
            raise Complaint(
                f"bad argument count {count} to {words[0]}, expected {expected} arguments", "err"
            )
        if command.write and self.node.read_only:
            raise Complaint("Block node is read-only", "report")

    async def open(self, opened: Opened) -> None:
        """Open a disk as described (its node is still to be filled in); raises OpenFailed."""
        await open_disk_as(self.driver, opened, self.gate, self.secrets)
        self.opened = opened
        filter = breakpoints(opened.node)
        if filter is not None:
            filter.on_message = lambda text: self.emit(text, "out")
        if self.on_open is not None:
            self.on_open(opened)

    def start(self, request: Future[None]) -> None:
        """Remember a request that runs beside the commands."""
        if not request.done:
            self.pending.append(request)
            request.callbacks.append(self.pending.remove)

    async def drain(self) -> None:
        """Wait until every request that was started has ended."""
        while self.pending:
            await self.pending[0]

    def release(self) -> None:
        """Let all requests that stand at breakpoints go on."""
        if self.opened is not None:
            filter = breakpoints(self.opened.node)
            if filter is not None:
                filter.release()

    async def close(self) -> bool:
        """Wait for what was started and close the disk; False when that failed."""
        opened = self.opened
        if opened is None:
            return True
        self.release()
        await self.drain()
        self.opened = None
        try:
            await opened.close()
        except FlushFailed as error:
            if not self.failed:
                self.emit(explain(error), "report")
            return False
        except (OSError, DiskError) as error:
            self.emit(f"error while closing: {explain(error)}", "report")
            return False
        return True
