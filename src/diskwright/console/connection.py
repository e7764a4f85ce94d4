"""A connection to a QMP monitor, of ours or of QEMU's; a thread reads it, so that events come while
somebody types."""

from __future__ import annotations

import errno
import os
import queue
import re
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DiskError, PeerError, UsageError
from ..wire.qmp_client import Message, QmpClient, encoded

GREETING_SECONDS = 5.0
EVENTS_KEPT = 1000
"""Events that nobody has asked for yet; the oldest are forgotten first."""
_UNASKED = 64
_READ = 256 << 10
_TCP = re.compile(r"(\[[^\[\]/]+\]|[^\[\]:/]*):(\d{1,5})")


class CommandFailed(DiskError):
    """The server answered a command with an error; ``reply`` is what it sent."""

    def __init__(self, reply: Message) -> None:
        self.reply = reply
        error = reply.get("error")
        known = error if isinstance(error, dict) else {}
        self.qmp_class = str(known.get("class", "GenericError"))
        super().__init__(str(known.get("desc", "unknown error")))


class TimedOut(DiskError):
    """The server did not answer in time."""


def connect(address: str) -> socket.socket:
    """A connected socket.  ``address`` is ``HOST:PORT``, ``[V6ADDRESS]:PORT``, ``unix:PATH``, or
    the path of a unix socket.  Raises PeerError and UsageError."""
    path = address.removeprefix("unix:")
    inet = _TCP.fullmatch(address)
    try:
        if inet is not None and not os.path.exists(address):
            host = inet[1].strip("[]") or "localhost"
            return socket.create_connection((host, int(inet[2])), GREETING_SECONDS)
        if sys.platform == "win32":
            raise UsageError(f"'{address}' is no HOST:PORT, and there are no unix sockets here")
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        return sock
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        text = getattr(error, "strerror", None) or str(error)
        raise PeerError(f"Could not connect to '{address}': {text}", number) from error


class Connection:
    """A session with a monitor, negotiated.

    ``on_event`` hears of each event as it comes, in a thread of its own.  ``timeout``: seconds to
    wait for a reply, None for ever.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_event: Callable[[Message], None] = lambda event: None,
        timeout: float | None = None,
    ) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._machine = QmpClient()
        self._on_event = on_event
        self.timeout = timeout
        self._replies: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._events: deque[Message] = deque(maxlen=EVENTS_KEPT)
        self._news = threading.Condition()
        self._ended: Exception | None = None
        self._reader = threading.Thread(target=self._read, name="qmp", daemon=True)
        self._reader.start()
        try:
            self.greeting = self._greeted()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _greeted(self) -> Message:
        try:
            found = self._reply(GREETING_SECONDS).get("QMP")
        except TimedOut:
            text = "the server says nothing: is another client connected to this monitor?"
            raise PeerError(text) from None
        if not isinstance(found, dict):
            raise PeerError("the server does not begin with a greeting: is it a QMP socket?")
        return found

    @property
    def version(self) -> str:
        """What the server calls itself."""
        version = self.greeting.get("version")
        known = version if isinstance(version, dict) else {}
        triple = known.get("qemu")
        numbers = triple if isinstance(triple, dict) else {}
        text = ".".join(str(numbers.get(part, "?")) for part in ("major", "minor", "micro"))
        package = known.get("package")
        return f"QEMU {text} ({package})" if package else f"QEMU {text}"

    def execute(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What a command returns.  Raises CommandFailed, PeerError and TimedOut."""
        reply = self.ask({"execute": name, "arguments": arguments or {}})
        if "return" not in reply:
            raise CommandFailed(reply)
        return reply["return"]

    def ask(self, message: Message) -> Message:
        """The reply to a message; with an id if that has one."""
        sent = message if "id" in message else self._machine.numbered(message)
        try:
            self._sock.sendall(encoded(sent))
        except OSError as error:
            raise self._ended or PeerError(f"the connection broke: {error.strerror}") from error
        while True:
            reply = self._reply(self.timeout)
            if reply.get("id") == sent["id"]:
                if sent is not message:
                    del reply["id"]
                return reply
            if "id" not in reply and "error" in reply:  # it was no command for the server
                return reply

    def _reply(self, timeout: float | None) -> Message:
        try:
            found = self._replies.get(timeout=timeout)
        except queue.Empty:
            raise TimedOut(f"no reply within {timeout:g} seconds") from None
        if found is None:
            self._replies.put(None)
            assert self._ended is not None
            raise self._ended
        return found

    def wait(self, wanted: Callable[[Message], bool]) -> Message:
        """The first event that is ``wanted``, of those that came and were not waited for yet, or of
        those to come.  Those before it are forgotten.  Raises PeerError and TimedOut."""
        with self._news:
            while True:
                while self._events:
                    event = self._events.popleft()
                    if wanted(event):
                        return event
                if self._ended is not None:
                    raise self._ended
                if not self._news.wait(self.timeout):
                    raise TimedOut(f"no such event within {self.timeout:g} seconds")

    def _read(self) -> None:
        try:
            while True:
                data = self._sock.recv(_READ)
                if not data:
                    raise PeerError("the server closed the connection")
                for message in self._machine.receive(data):
                    if "event" in message:
                        with self._news:
                            self._events.append(message)
                            self._news.notify_all()
                        self._on_event(message)
                    elif self._replies.qsize() < _UNASKED:
                        self._replies.put(message)
                    else:
                        raise PeerError("the server sent replies that nobody asked for")
        except PeerError as error:
            self._ended = error
        except OSError as error:
            self._ended = PeerError(f"the connection broke: {error.strerror or error}")
        with self._news:
            self._news.notify_all()
        self._replies.put(None)

    def close(self) -> None:
        """End it."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server was first
        self._sock.close()
        self._reader.join()
