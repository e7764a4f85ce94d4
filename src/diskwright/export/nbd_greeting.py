"""The handshake with one client, which takes no byte more than belongs to it: what follows can be
read by somebody else."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..engine.kernel import BaseDriver
from ..protocols.nbd_connect import patiently
from ..records import NamedTuple
from ..wire.nbd_handshake import Export, Handshake

if TYPE_CHECKING:
    from .nbd_tls import Secured, ServerTls

_CLIENT_FLAGS = 4
_OPTION = struct.Struct(">12xI")
_PART = 64 << 10


class Agreed(NamedTuple):
    """What a client has chosen: an export, the form of replies, and contexts by their numbers."""

    name: bytes
    mode: int
    contexts: Mapping[int, bytes]


class Greeting:
    """With ``tls`` nothing is said before the client has begun TLS; then ``secured`` is it, and
    ``sock`` another one than was given.  ``aborted``: the client left in an orderly way."""

    def __init__(
        self,
        driver: BaseDriver,
        sock: socket.socket,
        exports: Mapping[bytes, Export],
        seconds: float,
        tls: ServerTls | None = None,
    ) -> None:
        self.sock = sock
        self.secured: Secured | None = None
        self._driver, self._tls = driver, tls
        self._handshake = Handshake(exports, tls is not None)
        self._deadline = driver.now() + seconds
        self._rest = b""

    @property
    def aborted(self) -> bool:
        """Whether the client said that it wants no export."""
        return self._handshake.closed.startswith("aborted")

    async def carried_out(self) -> Agreed:
        """Wait for the client's choice.  Raises OSError."""
        handshake = self._handshake
        await self._send()
        await self._take(_CLIENT_FLAGS)
        while handshake.export is None:
            head = await self._take(_OPTION.size)
            left = _OPTION.unpack(head)[0]
            while left:
                left -= len(await self._take(min(left, _PART)))
            await self._send()
            if handshake.upgrade:
                await self._secure()
        return Agreed(handshake.export.name, handshake.mode, dict(handshake.contexts))

    def close(self) -> None:
        """Close the connection, which nobody else has."""
        self._driver.forget(self.sock.fileno())
        self.sock.close()

    async def _secure(self) -> None:
        from .nbd_tls import Secured

        assert self._tls is not None
        self._driver.forget(self.sock.fileno())
        secured = Secured(self._tls, self.sock)
        self.sock = secured.sock
        await secured.shake_hands(self._driver, self._deadline - self._driver.now())
        self.secured = secured
        self._handshake.secured()

    async def _send(self) -> None:
        out = memoryview(b"".join(self._handshake.out))
        self._handshake.out.clear()
        driver, sock = self._driver, self.sock
        while out:
            out = out[await patiently(driver, sock, 1, self._deadline, sock.send, out) :]
        if self._handshake.closed:
            raise ConnectionAbortedError(self._handshake.closed)

    async def _take(self, count: int) -> bytes:
        """Let the handshake have ``count`` bytes; returns them."""
        data = b""
        while len(data) < count:
            part = await patiently(
                self._driver, self.sock, 0, self._deadline, self.sock.recv, count - len(data)
            )
            if not part:
                raise ConnectionResetError("the client closed the connection")
            data += part
        rest = self._rest + data
        self._rest = rest[self._handshake.parse(memoryview(rest), 0, len(rest)) :]
        if self._handshake.closed:
            await self._send()
        return data
