"""The client's bytes, written down a second time for the tests, and a small blocking client."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
MAGIC = 0x25609513
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZERO, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST, PAYLOAD = 1, 2, 4, 8, 16, 32
STRUCTURED, GO, INFO, LIST, ABORT, EXPORT_NAME, LIST_META, SET_META = 8, 7, 6, 3, 2, 1, 9, 10
STARTTLS, EXTENDED = 5, 11


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, number, len(data)) + data


def info(name: bytes = b"", wanted: Sequence[int] = ()) -> bytes:
    head = struct.pack(">I", len(name)) + name
    return head + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta(name: bytes = b"", *queries: bytes) -> bytes:
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(q)) + q for q in queries)


def request(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
) -> bytes:
    length = length or len(data)
    return struct.pack(">IHHQQI", MAGIC, flags, command, cookie, offset, length) + data


def wide(
    command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
) -> bytes:
    """The same as an extended request."""
    length = length or len(data)
    flags |= PAYLOAD if data else 0
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + data


def opening(
    structured: bool = True, allocation: bool = False, name: bytes = b"", extended: bool = False
) -> bytes:
    """Everything up to transmission."""
    out = struct.pack(">I", 3)
    if extended:
        out += option(EXTENDED)
    elif structured:
        out += option(STRUCTURED)
    if allocation:
        out += option(SET_META, meta(name, b"base:allocation"))
    return out + option(GO, info(name))


class Client:
    """Blocking, one thread; replies may be read in any order."""

    def __init__(
        self,
        path: str,
        structured: bool = True,
        allocation: bool = False,
        timeout: float = 20,
        name: bytes = b"",
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(path)
        self.structured = structured
        assert self.exactly(18) == GREETING
        self.sock.sendall(opening(structured, allocation, name))
        self.size = self.flags = 0
        while True:
            magic, number, kind, length = struct.unpack(">QIII", self.exactly(20))
            assert magic == 0x3E889045565A9
            data = self.exactly(length)
            assert not kind >> 31, hex(kind)
            if kind == 3 and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
            if kind == 1 and number == GO:
                break

    def exactly(self, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            part = self.sock.recv(min(count - len(out), 1 << 20))
            if not part:
                raise ConnectionError("closed by the server")
            out += part
        return bytes(out)

    def reply(self, read_length: int = 0) -> tuple[int, int, bytes]:
        """(cookie, error, payload) of the next reply."""
        magic = struct.unpack(">I", self.exactly(4))[0]
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.exactly(12))
            data = self.exactly(read_length) if read_length and not error else b""
            return cookie, error, data
        assert magic == 0x668E33EF
        flags, kind, cookie, length = struct.unpack(">HHQI", self.exactly(16))
        data = self.exactly(length)
        assert flags == 1
        if kind >> 15:
            return cookie, struct.unpack_from(">I", data)[0], data[6:]
        return cookie, 0, data[8:] if kind == 1 else data

    def call(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        data: bytes = b"",
    ) -> tuple[int, bytes]:
        """One request and its answer: (error, payload)."""
        self.sock.sendall(request(command, 7, offset, length, flags, data))
        cookie, error, payload = self.reply(length if command == READ else 0)
        assert cookie == 7
        return error, payload

    def read(self, offset: int, length: int) -> bytes:
        error, data = self.call(READ, offset, length)
        assert error == 0, error
        return data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        assert self.call(WRITE, offset, flags=flags, data=data) == (0, b"")

    def flush(self) -> None:
        assert self.call(FLUSH) == (0, b"")

    def close(self) -> None:
        try:
            self.sock.sendall(request(DISC, 0))
        finally:
            self.sock.close()
