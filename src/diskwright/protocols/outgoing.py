"""What is on its way to one socket: buffers, in order, without joining them."""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence

from ..engine.kernel import BaseDriver, Future
from ..records import NamedTuple

Buffer = bytes | bytearray | memoryview

VECTORS = 1024  # IOV_MAX: more buffers in one sendmsg are refused


class _Sent(NamedTuple):
    """Called when everything before it has left."""

    callback: Callable[[], None]


Item = Buffer | _Sent

_RECORD = 16 << 10  # the most that one TLS record holds


def _tls_sender(sock: socket.socket) -> Callable[[Sequence[Buffer]], int]:
    """Sends one record after the other; there is no call that gathers buffers."""
    import ssl

    def send(buffers: Sequence[Buffer]) -> int:
        done = 0
        for buffer in buffers:
            view = memoryview(buffer)
            for at in range(0, len(view), _RECORD):
                try:
                    # Cut alike each time: what was begun must be offered again as it was.
                    done += sock.send(view[at : at + _RECORD])
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    if not done:
                        raise BlockingIOError from None
                    return done
        return done

    return send


def _sender_of(sock: socket.socket) -> Callable[[Sequence[Buffer]], int]:
    return _tls_sender(sock) if hasattr(sock, "do_handshake") else _sender(sock)


if sys.platform == "win32":

    def _sender(sock: socket.socket) -> Callable[[Sequence[Buffer]], int]:
        """Sends the buffers; there is no call that gathers them, so they are joined."""
        return lambda buffers: sock.send(b"".join(buffers))

else:

    def _sender(sock: socket.socket) -> Callable[[Sequence[Buffer]], int]:
        """Sends as much of the buffers as the socket takes; returns how many bytes."""
        return sock.sendmsg


class Outgoing:
    """Sends at once what the socket takes and the rest when it can be written again.

    ``broken`` is set when the peer is gone: everything queued is dropped (its callbacks run) and
    ``on_broken`` is told, for nobody may be reading from the socket at that time.
    """

    def __init__(
        self, driver: BaseDriver, sock: socket.socket, on_broken: Callable[[Exception], None]
    ) -> None:
        self.driver = driver
        self.sock = sock
        self.on_broken = on_broken
        self.fd = sock.fileno()
        self._sendmsg = _sender_of(sock)
        self.broken: Exception | None = None
        self.moved = 0.0
        """When the other side last took something (or when it first had to wait for that)."""
        self._queue: deque[Item] = deque()
        self._drainer: Future[None] | None = None

    def send(self, buffers: Sequence[Buffer], total: int) -> bool:
        """Send ``buffers`` of ``total`` bytes.  True: they are not needed any more; otherwise
        what :meth:`then` is given next is called when that is so."""
        if self.broken is not None:
            return True
        done = 0
        if not self._queue:
            try:
                done = self._sendmsg(buffers if len(buffers) <= VECTORS else buffers[:VECTORS])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._break(error)
                return True
            if done == total:
                return True
        for buffer in buffers:
            size = len(buffer)
            if done >= size:
                done -= size
            elif done:
                self._queue.append(memoryview(buffer)[done:])
                done = 0
            else:
                self._queue.append(buffer)
        self._start()
        return False

    def then(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when everything so far has left."""
        if self._queue:
            self._queue.append(_Sent(callback))
        else:
            callback()

    @property
    def waiting(self) -> bool:
        """Something waits for the client to read."""
        return bool(self._queue)

    async def drained(self) -> None:
        """Until everything was sent or the peer is gone."""
        while self._drainer is not None:
            await self._drainer

    def abandon(self) -> None:
        """Drop what is queued; the peer does not read."""
        if self._queue:
            self._break(TimeoutError("the other side does not read what is sent"))
            try:
                self.sock.shutdown(socket.SHUT_RDWR)  # also wakes whoever waits for it
            except OSError:
                pass

    def _start(self) -> None:
        if self._queue and self._drainer is None:
            self.moved = self.driver.now()
            drainer = self.driver.spawn(self._drain(), name="nbd-send")
            self._drainer = drainer

    async def _drain(self) -> None:
        try:
            while self._queue:
                await self.driver.writable(self.fd)
                try:
                    self._push()
                except (BlockingIOError, InterruptedError):
                    pass
        except OSError as error:
            self._break(error)
        finally:
            self._drainer = None

    def _push(self) -> None:
        """Send until the queue is empty or the socket full (then BlockingIOError or nothing)."""
        queue = self._queue
        while queue:
            head = queue[0]
            if isinstance(head, _Sent):
                queue.popleft()
                head.callback()
            elif not self._push_buffers():
                return

    def _push_buffers(self) -> bool:
        """One sendmsg of the buffers at the front; False when the socket took only a part."""
        queue = self._queue
        buffers: list[Buffer] = []
        for item in queue:
            if not isinstance(item, _Sent):
                buffers.append(item)
                if len(buffers) == VECTORS:
                    break
        done = self._sendmsg(buffers)
        self.moved = self.driver.now()
        for _ in buffers:
            head = queue.popleft()
            while isinstance(head, _Sent):
                head.callback()
                head = queue.popleft()
            size = len(head)
            if done < size:
                queue.appendleft(memoryview(head)[done:])
                return False
            done -= size
        return True

    def _break(self, error: Exception) -> None:
        self.broken = error.with_traceback(None)  # whose frames hold this object
        self.on_broken(error)  # before the callbacks let waiting reads begin
        queue, self._queue = self._queue, deque()
        for item in queue:
            if isinstance(item, _Sent):
                item.callback()
