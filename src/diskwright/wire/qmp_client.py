"""The client's side of a QMP connection: commands in, bytes out; bytes in, messages out.

After QEMU's docs/interop/qmp-spec.rst.  A server ends each message with a line's end, and begins
and ends one that it indents with a brace alone on its line.  The server is not trusted: a message
has a bound, and so have its levels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import PeerError
from .qjson import DEPTH_LIMIT

REPLY_LIMIT = 64 << 20
"""Longest message of a server in bytes; the schema of QEMU has a quarter of a million."""

Message = dict[str, Any]


class QmpClient:
    """One connection.  Raises PeerError for what is no QMP."""

    def __init__(self, limit: int = REPLY_LIMIT) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._at = 0  # up to here there is no end of a message
        self._serial = 0

    def numbered(self, message: Message) -> Message:
        """``message`` with an id, by which its reply is known."""
        self._serial += 1
        return {**message, "id": self._serial}

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Message]:
        """The messages that end in ``data``, in their order."""
        buffer = self._buffer
        buffer += data
        while (end := buffer.find(b"\n", self._at)) >= 0:
            line = bytes(buffer[self._at : end]).rstrip()
            first = not self._at
            self._at = end + 1
            if not line and first:
                self._take(end + 1)
            elif line == b"}" or (first and line != b"{"):
                yield decoded(self._take(end + 1))
        if len(buffer) > self.limit:
            raise PeerError(f"the server sent a message of more than {self.limit} bytes")

    def _take(self, end: int) -> bytes:
        taken = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._at = 0
        return taken


def encoded(message: Message) -> bytes:
    """A message as it is sent."""
    return json.dumps(message).encode("ascii") + b"\n"


def decoded(text: bytes) -> Message:
    """The message that is written in ``text``.  Raises PeerError."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise PeerError("the server sent what is no JSON: is it a QMP socket?") from None
    if not isinstance(found, dict):
        raise PeerError("the server sent what is no JSON object")
    if text.count(b"{") + text.count(b"[") > DEPTH_LIMIT and _deep(found):
        raise PeerError(f"the server sent a message of more than {DEPTH_LIMIT} levels")
    return found


def _deep(value: Any) -> bool:
    """Whether it has more levels than are taken."""
    level: list[Any] = [value]
    for _ in range(DEPTH_LIMIT):
        below: list[Any] = []
        for part in level:
            below += part.values() if isinstance(part, dict) else part
        level = [part for part in below if isinstance(part, (dict, list))]
        if not level:
            return False
    return True
