"""Messages between processes that serve together, over a unix stream socket, with sockets if need
be.

A message is 4 bytes of length, a byte that says whether a descriptor comes with it, and ``marshal``
of a tuple.  Both sides are one program: what the other one sends is believed.
"""

from __future__ import annotations

import marshal
import socket
import struct
import sys
from collections import deque
from typing import Any

from ..engine.futures import Condition
from ..engine.kernel import BaseDriver

_HEAD = struct.Struct(">I?")
_PART = 64 << 10
_DESCRIPTORS = 64
"""Most that come with one part."""


class Messages:
    """One side of ``sock``, which is its own from then on."""

    def __init__(self, driver: BaseDriver, sock: socket.socket) -> None:
        self.driver = driver
        self._sock = sock
        self._busy = False
        self._free = Condition()
        self._data = bytearray()
        self._descriptors: deque[int] = deque()
        sock.setblocking(False)

    async def send(self, message: tuple[Any, ...], sock: socket.socket | None = None) -> None:
        """Send ``message``, and with it ``sock``, which stays open here.  Raises OSError when the
        other side is gone."""
        if sys.platform == "win32":  # where sockets cannot be handed over
            raise NotImplementedError
        body = marshal.dumps(message)
        data = _HEAD.pack(len(body), sock is not None) + body
        while self._busy:
            await self._free.wait()
        self._busy = True
        sent = 0
        try:
            while sent < len(data):
                try:
                    if sent or sock is None:
                        sent += self._sock.send(data[sent:])
                    else:
                        sent = socket.send_fds(self._sock, [data], [sock.fileno()])
                except BlockingIOError:
                    await self.driver.writable(self._sock.fileno())
        finally:
            self._busy = False
            self._free.notify()

    async def receive(self) -> tuple[tuple[Any, ...], socket.socket | None] | None:
        """The next message and what came with it; None when the other side says no more."""
        if sys.platform == "win32":
            raise NotImplementedError
        while (found := self._whole()) is None:
            try:
                part, more, _, _ = socket.recv_fds(self._sock, _PART, _DESCRIPTORS)
            except BlockingIOError:
                await self.driver.readable(self._sock.fileno())
                continue
            except ConnectionError:
                return None
            self._descriptors += more
            if not part:
                return None
            self._data += part
        return found

    def _whole(self) -> tuple[tuple[Any, ...], socket.socket | None] | None:
        if len(self._data) < _HEAD.size:
            return None
        length, accompanied = _HEAD.unpack_from(self._data)
        end = _HEAD.size + length
        if len(self._data) < end:
            return None
        message = marshal.loads(memoryview(self._data)[_HEAD.size : end])
        del self._data[:end]
        if not accompanied:
            return message, None
        sock = socket.socket(fileno=self._descriptors.popleft())
        sock.setblocking(False)
        return message, sock

    def finish(self) -> None:
        """Say no more; the other side may."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has just ended by itself

    def close(self) -> None:
        """Close it, and what came and was not taken."""
        self.driver.forget(self._sock.fileno())
        self._sock.close()
        while self._descriptors:
            socket.close(self._descriptors.popleft())
