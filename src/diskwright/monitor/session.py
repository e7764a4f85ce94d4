"""A monitor: one client at a time, whose commands are carried out in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from ..engine.futures import Condition
from ..engine.kernel import Task
from ..wire.qmp import OOB, Fault, QmpSession, Request
from .commands import Command, carry_out, check

if TYPE_CHECKING:
    from .daemon import Daemon

QUEUE = 8
"""Commands that wait while out-of-band ones are let by; without that ability, none does."""
UNREAD = 1 << 20
"""Bytes of replies that a client has not read, above which it is not listened to."""
OUTPUT_LIMIT = 16 << 20
"""Bytes of events that are kept for a client that reads none; later ones it does not hear of."""

_PIECE = 256 << 10
LINGER_SECONDS = 5.0
"""How long a client may take to read its last replies."""


class Stream(Protocol):
    """Where the bytes of a client come from and go to; neither call blocks."""

    def read(self) -> bytes | None:
        """What is there; None: nothing yet; empty: the client is gone."""

    def write(self, data: bytes) -> int:
        """How many bytes of ``data`` were taken.  Raises OSError when the client is gone."""

    def fileno(self) -> int:
        """The descriptor to wait for before reading,"""

    def output(self) -> int:
        """and the one before writing."""


class Monitor:
    """One monitor of ``daemon``.  ``pretty``: what it sends is indented."""

    def __init__(self, daemon: Daemon, pretty: bool = False) -> None:
        self.daemon = daemon
        self.driver = daemon.driver
        self.pretty = pretty
        self.session = self._new_session()
        self._stream: Stream | None = None
        self._queue: deque[tuple[Request, Command | Fault]] = deque()
        self._running: Task[None] | None = None
        self._urgent: Task[None] | None = None
        self._room = Condition()
        self._out = bytearray()
        self._sending: Task[None] | None = None

    def _new_session(self) -> QmpSession:
        return QmpSession(self.daemon.version, pretty=self.pretty)

    async def serve(self, stream: Stream) -> None:
        """Serve a client until it is gone; what it asked for by then is carried out."""
        self.session, self._stream = self._new_session(), stream
        self.daemon.monitors.add(self)
        self._send(self.session.greeting())
        try:
            while self._stream is not None:
                data = stream.read()
                if data is None:
                    await self.driver.readable(stream.fileno())
                    continue
                if not data:
                    break
                for request in self.session.receive(data):
                    while self._full:
                        await self._room.wait()
                    self._begin(request)
        except OSError:
            pass  # the client is gone
        finally:
            while self._running is not None:
                await self._room.wait()
            if self._sending is not None:
                timer = self.driver.later(LINGER_SECONDS, self._abandon)
                await self._sending
                timer.cancel()
            self.daemon.monitors.discard(self)
            self._stream = None
            self._out.clear()

    def _abandon(self) -> None:
        """The client does not read what it was sent."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self.driver.forget(stream.output())

    @property
    def _full(self) -> bool:
        """No more is to be asked for: too much is not done, or not heard."""
        if self._stream is None:
            return False
        waiting = len(self._queue) + (self._running is not None)
        oob = OOB in (self.session.negotiated or ())
        return waiting >= (QUEUE if oob else 1) or len(self._out) > UNREAD

    def _begin(self, request: Request) -> None:
        """Carry it out, in its turn or now."""
        found = check(request)
        if request.fault is None:
            refusal = self.session.refusal(request)
            found = found if refusal is None else refusal
        if isinstance(found, Command) and request.oob:
            self._urgent = self.driver.spawn(self._perform(request, found, oob=True), name="oob")
            return
        self._queue.append((request, found))
        if self._running is None:
            self._running = self.driver.spawn(self._work(), name="monitor")

    async def _work(self) -> None:
        try:
            while self._queue:
                request, found = self._queue.popleft()
                await self._perform(request, found)
                self._room.notify()
        finally:
            self._running = None
            self._room.notify()

    async def _perform(self, request: Request, found: Command | Fault, oob: bool = False) -> None:
        session = self.session
        answer: Any = found
        if isinstance(found, Command):
            if oob:
                answer = await carry_out(self, found, request)
            else:
                async with self.daemon.alone():
                    answer = await carry_out(self, found, request)
        if session is self.session:
            reply = session.fail if isinstance(answer, Fault) else session.reply
            self._send(reply(request, answer))

    # -- sending
    def tell(self, name: str, data: Mapping[str, Any], microseconds: int) -> None:
        """Send an event."""
        if len(self._out) < OUTPUT_LIMIT:
            self._send(self.session.event(name, data, microseconds))

    def _send(self, data: bytes) -> None:
        if self._stream is None:
            return
        self._out += data
        if self._sending is None:
            self._sending = self.driver.spawn(self._sender(), name="monitor-send")

    async def _sender(self) -> None:
        try:
            while self._out and self._stream is not None:
                done = self._stream.write(bytes(self._out[:_PIECE]))
                if done:
                    del self._out[:done]
                    self._room.notify()
                else:
                    await self.driver.writable(self._stream.output())
        except OSError:
            self._stream = None
            self._out.clear()
        finally:
            self._sending = None
            self._room.notify()
