"""What an NBD server says, written down a second time for the tests of the client."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from diskwright.wire.nbd_client import NbdClient
from diskwright.wire.nbd_flight import Flight
from diskwright.wire.nbd_negotiation import Agreement, Negotiation

OPT_MAGIC, REP_MAGIC = 0x49484156454F5054, 0x3E889045565A9
ACK, SERVER, INFO, CONTEXT = 1, 2, 3, 4
ERR = 1 << 31
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN = (ERR | n for n in (1, 2, 3, 5, 6, 7))
EXPORT_NAME, LIST, STARTTLS, GO, STRUCTURED, SET_META, EXTENDED = 1, 3, 5, 7, 8, 10, 11
HAS_FLAGS, READ_ONLY, FLUSH, FUA = 1, 2, 4, 8
MAGICS = {"simple": 0x67446698, "structured": 0x668E33EF, "extended": 0x6E8A278C}
DONE, NONE, DATA, HOLE, STATUS, STATUS_EXT = 1, 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002


def greeting(flags: int = 3) -> bytes:
    return b"NBDMAGIC" + struct.pack(">QH", OPT_MAGIC, flags)


def rep(option: int, kind: int, data: bytes = b"", magic: int = REP_MAGIC) -> bytes:
    return struct.pack(">QIII", magic, option, kind, len(data)) + data


def export(size: int = 1 << 20, flags: int = HAS_FLAGS) -> bytes:
    return rep(GO, INFO, struct.pack(">HQH", 0, size, flags))


def blocks(least: int, preferred: int, most: int) -> bytes:
    return rep(GO, INFO, struct.pack(">HIII", 3, least, preferred, most))


def info(kind: int, text: bytes) -> bytes:
    return rep(GO, INFO, struct.pack(">H", kind) + text)


def context(number: int, name: bytes = b"base:allocation") -> bytes:
    return rep(SET_META, CONTEXT, struct.pack(">I", number) + name)


def talk(negotiation: Negotiation, data: bytes) -> tuple[bytes, bytes]:
    """Feed ``data`` as it is wanted: what the client said, and what it left."""
    said = negotiation.take()
    while negotiation.agreed is None:
        if negotiation.upgrade:
            said += b"<TLS>"
            negotiation.secured()
        elif len(data) < negotiation.wanted:
            break
        else:
            wanted = negotiation.wanted
            negotiation.received(data[:wanted])
            data = data[wanted:]
        said += negotiation.take()
    return said, data


def options(said: bytes) -> list[int | str]:
    """The options in what a client said behind its flags."""
    found: list[int | str] = []
    at = 4
    while at < len(said):
        if said.startswith(b"<TLS>", at):
            found.append("TLS")
            at += 5
            continue
        magic, option, length = struct.unpack_from(">QII", said, at)
        assert magic == OPT_MAGIC
        found.append(option)
        at += 16 + length
    return found


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", MAGICS["simple"], error, cookie) + data


def chunk(cookie: int, kind: int, body: bytes = b"", flags: int = DONE) -> bytes:
    head = (MAGICS["structured"], flags, kind, cookie, len(body))
    return struct.pack(">IHHQI", *head) + body


def wide(cookie: int, kind: int, body: bytes = b"", flags: int = DONE, offset: int = 0) -> bytes:
    head = (MAGICS["extended"], flags, kind, cookie, offset, len(body))
    return struct.pack(">IHHQQQ", *head) + body


def data(offset: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset) + content


def hole(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def error(number: int, text: bytes = b"", offset: int | None = None) -> bytes:
    tail = b"" if offset is None else struct.pack(">Q", offset)
    return struct.pack(">IH", number, len(text)) + text + tail


def status(number: int, *rows: tuple[int, int]) -> bytes:
    return struct.pack(">I", number) + b"".join(struct.pack(">II", *row) for row in rows)


def status_ext(number: int, *rows: tuple[int, int]) -> bytes:
    body = b"".join(struct.pack(">QQ", *row) for row in rows)
    return struct.pack(">II", number, len(rows)) + body


def agreed(form: str = "structured", **more: object) -> Agreement:
    found = Agreement(1 << 40, HAS_FLAGS, contexts={7: b"base:allocation"})
    return found._replace(
        structured=form != "simple",
        extended=form == "extended",
        **more,  # type: ignore[arg-type]
    )


def reads(*rows: tuple[int, int]) -> Flight:
    views = [memoryview(bytearray(b"?" * n)) for _, n in rows]
    return Flight(0, [o for o, _ in rows], [n for _, n in rows], views)


def cookies(flight: Flight) -> list[int]:
    return [flight.number << 16 | at for at in range(len(flight.offsets))]


def hear(machine: NbdClient, said: bytes, steps: Sequence[int] = ()) -> list[Flight]:
    """Let the machine receive ``said``, in pieces of ``steps`` bytes (as much as fits, behind
    those): the flights that were answered."""
    found: list[Flight] = []
    sizes = list(steps)
    while said:
        space = machine.space()
        assert space and all(len(view) for view in space)
        size = min(len(said), sum(map(len, space)), sizes.pop(0) if sizes else len(said))
        part, said = said[:size], said[size:]
        for view in space:
            view[: len(part)] = part[: len(view)]
            part = part[len(view) :]
        found += machine.received(size)
    return found
