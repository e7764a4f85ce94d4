"""The shell of ``qmp``: lines in, replies and events out; for people and for scripts."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import DiskError, PeerError, UsageError
from ..wire.qmp_client import Message
from . import language
from .connection import CommandFailed, Connection
from .schema import Schema

OWN = {
    "exit": "leave this shell; what the server does goes on (its command 'quit' ends the server)",
    "help": "list the commands, or tell the arguments of one",
    "wait": "wait for an event: wait JOB_STATUS_CHANGE status=concluded",
}
HISTORY = 1000
"""Lines of history that are kept."""
_NAMES = {
    "node-name": ("query-named-block-nodes", "node-name", {"flat": True}),
    "node": ("query-named-block-nodes", "node-name", {"flat": True}),
    "device": ("query-named-block-nodes", "node-name", {"flat": True}),
    "overlay": ("query-named-block-nodes", "node-name", {"flat": True}),
    "target": ("query-named-block-nodes", "node-name", {"flat": True}),
}
_IDS = {"job": ("query-jobs", "id"), "block-export": ("query-block-exports", "id")}


class Shell:
    """Carries lines out at the monitor behind ``sock``, and prints by ``out``, which adds nothing.

    ``pretty``: for people, otherwise each reply is a line of JSON.  ``events``: they are printed as
    they come.  ``timeout``: seconds to wait for a reply or an event, None for ever.
    """

    def __init__(
        self,
        sock: socket.socket,
        out: Callable[[str], None],
        *,
        pretty: bool = False,
        events: bool = False,
        timeout: float | None = None,
    ) -> None:
        self._out = out
        self.pretty = pretty
        self.events = events
        self._schema: Schema | None = None
        self._prompting: ModuleType | bool = False
        self.connection = Connection(sock, self._told, timeout)

    def out(self, text: str) -> None:
        """Print a line."""
        self._out(f"{text}\n")

    def _told(self, event: Message) -> None:
        if not self.events:
            return
        if not self._prompting:
            self._show(event)
            return
        editor = self._prompting  # somebody is typing: show it above that
        typed = editor.get_line_buffer() if isinstance(editor, ModuleType) else ""
        self._out(f"\r\x1b[K{event_line(event)}\n{PROMPT}{typed}")

    def _show(self, event: Message) -> None:
        self.out(event_line(event) if self.pretty else json.dumps(event))

    @property
    def schema(self) -> Schema:
        """The server's, asked for when it is first needed."""
        if self._schema is None:
            try:
                self._schema = Schema(self.connection.execute("query-qmp-schema"))
            except CommandFailed:
                self._schema = Schema()
        return self._schema

    def script(self, lines: Iterable[str], keep_going: bool) -> bool:
        """Carry out ``lines`` until one fails; with ``keep_going`` all of them.  True when none
        failed."""
        sound = True
        for line in lines:
            try:
                going, done = self.line(line)
            except UsageError as error:
                going, done = True, False
                self.out(json.dumps({"error": {"class": "UsageError", "desc": str(error)}}))
            sound = sound and done
            if not going or not (done or keep_going):
                break
        return sound

    def line(self, line: str) -> tuple[bool, bool]:
        """Carry out one line; whether the shell goes on, and whether the line did not fail.

        Raises UsageError, which no server was told, PeerError and TimedOut.
        """
        line = line.strip()
        if not line or line.startswith("#"):
            return True, True
        first, *rest = language.words(line)
        if first == "exit":
            return False, True
        if first == "help":
            self._help(rest)
        elif first == "wait":
            self._wait(rest)
        else:
            return True, self._command(line)
        return True, True

    def _command(self, line: str) -> bool:
        simple = line.startswith("{") or not any(c.isspace() for c in line)
        message = language.parse(line, Schema() if simple else self.schema)
        reply = self.connection.ask(message)
        if not self.pretty:
            self.out(json.dumps(reply))
        elif "return" in reply:
            self.out(json.dumps(reply["return"], indent=2))
        else:
            error = CommandFailed(reply)
            self.out(f"{shown(error.qmp_class)}: {shown(str(error))}")
        return "return" in reply

    def _help(self, rest: list[str]) -> None:
        schema = self.schema
        if not rest:
            self.out("Commands of the server (help COMMAND tells their arguments):")
            for line in columns(schema.commands):
                self.out(shown(line))
            self.out("Commands of this shell:")
            for name, text in OWN.items():
                self.out(f"  {name:<6} {text}")
            return
        name, *assignments = rest
        if name in OWN:
            self.out(f"{name}: {OWN[name]}")
        elif name in schema.commands:
            self.out(table(schema.help(name, language.tree(assignments))))
        else:
            raise UsageError(f"the server has no command '{name}'")

    def _wait(self, rest: list[str]) -> None:
        if not rest:
            raise UsageError("expecting the name of an event")
        wanted = language.tree(rest[1:])
        event = self.connection.wait(
            lambda one: one["event"] == rest[0] and _has(one.get("data", {}), wanted)
        )
        if not self.events:  # otherwise it was
            self._show(event)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    # -- at a terminal
    def interactive(self, history: Path | None) -> None:
        """Prompt for lines until the end.  Raises PeerError when the server is gone."""
        self.out(f"Connected to {shown(self.connection.version)}. 'help' tells the commands.")
        editor = _editor()
        if editor is not None:
            self._set_up(editor, history)
        try:
            while True:
                try:
                    line = self._typed(editor)
                    if editor is not None and secret(line):
                        editor.remove_history_item(editor.get_current_history_length() - 1)
                    if not self.line(line)[0]:
                        return
                except EOFError:
                    self.out("")
                    return
                except KeyboardInterrupt:
                    self.out("")
                except PeerError:
                    if line.strip() == "quit":
                        return
                    raise
                except DiskError as error:
                    self.out(f"{error}")
        finally:
            if editor is not None and history is not None:
                _keep(editor, history)

    def _typed(self, editor: ModuleType | None) -> str:
        self._prompting = editor or True
        try:
            return input(PROMPT)
        finally:
            self._prompting = False

    def _set_up(self, editor: ModuleType, history: Path | None) -> None:
        found: list[str] = []

        def completer(text: str, state: int) -> str | None:
            if not state:
                line = editor.get_line_buffer()[: editor.get_endidx()]
                try:
                    fitting = language.complete(line, self.schema, OWN, self.known)
                    found[:] = filter(str.isprintable, fitting)  # a terminal shows them
                except (DiskError, OSError):
                    found.clear()
            if state >= len(found):
                return None
            one = found[state]
            return one if one.endswith(("=", ".")) else f"{one} "

        editor.set_completer(completer)
        editor.set_completer_delims(" \t\n")
        libedit = "libedit" in (editor.__doc__ or "")
        editor.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if history is not None:
            try:
                editor.read_history_file(history)
            except OSError:
                pass  # there is none yet

    def known(self, command: str, member: str) -> Iterator[str]:
        """Names of what the server has, where ``member`` of ``command`` is one."""
        query: tuple[Any, ...] | None = _NAMES.get(member)
        if member == "id":
            query = next((q for start, q in _IDS.items() if command.startswith(f"{start}-")), None)
        if query is None or query[0] not in self.schema.commands:
            return
        listed = self.connection.execute(query[0], *query[2:])
        for one in listed if isinstance(listed, list) else ():
            name = one.get(query[1]) if isinstance(one, dict) else None
            if isinstance(name, str):
                yield name


PROMPT = "qmp> "


def event_line(event: Message) -> str:
    """An event as people read it."""
    stamp = event.get("timestamp")
    seconds = stamp.get("seconds") if isinstance(stamp, dict) else None
    try:
        clock = time.strftime("%H:%M:%S", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        clock = "--:--:--"
    data = f" {json.dumps(event['data'])}" if "data" in event else ""
    return f"[{clock}] {shown(str(event.get('event')))}{data}"


def shown(text: str) -> str:
    """Text of a server's, for a terminal: without control characters."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def table(rows: list[tuple[str, str]]) -> str:
    """Headings, and under them names with what they are beside them."""
    wide = min(max((len(name) for name, text in rows if text), default=0), 32) + 2
    room = max(shutil.get_terminal_size().columns - wide - 3, 30)
    lines = []
    for name, text in rows:
        if not text:
            lines.append(name)
            continue
        left = f"  {name:<{wide}}"
        for piece in textwrap.wrap(text, room) or [""]:
            lines.append(f"{left}{piece}")
            left = " " * (wide + 2)
    return "\n".join(map(shown, lines))


def columns(names: list[str]) -> Iterator[str]:
    """The names beside each other, as wide as the terminal."""
    wide = max(map(len, names), default=0) + 2
    count = max((shutil.get_terminal_size().columns - 2) // wide, 1)
    rows = -(-len(names) // count)
    for row in range(rows):
        yield "  " + "".join(f"{name:<{wide}}" for name in names[row::rows]).rstrip()


def history_path() -> Path | None:
    """Where history is kept; None where there is no place for it."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "diskwright" / "qmp_history" if base and os.path.isabs(base) else None


def secret(line: str) -> bool:
    """Whether a line is not for the history: it begins with a blank, as in shells, or may contain
    a secret."""
    return bool(line.strip()) and (line[0].isspace() or "object-add" in line)


def _editor() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # on Windows the console itself edits lines
        return None
    return readline


def _keep(editor: ModuleType, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        editor.set_history_length(HISTORY)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        editor.write_history_file(path)
    except OSError:
        pass  # it is not worth an error


def _has(value: Any, wanted: Any) -> bool:
    """Whether ``value`` has all that is in the tree ``wanted``."""
    if isinstance(wanted, dict):
        return isinstance(value, dict) and all(
            name in value and _has(value[name], part) for name, part in wanted.items()
        )
    return bool(wanted == value or wanted == json.dumps(value))
