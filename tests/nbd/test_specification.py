"""The corner cases of the specification (NetworkBlockDevice/nbd, doc/proto.md), one by one, by
bytes alone.  What breaks the protocol, and what clients make of it, is in tests/sansio."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

import pytest

from diskwright.errors import PeerError
from diskwright.wire import nbd_const as c
from diskwright.wire import nbd_reply
from diskwright.wire.nbd_batch import Refusal
from diskwright.wire.nbd_handshake import OPTION_LIMIT, Export
from diskwright.wire.nbd_negotiation import Negotiation
from diskwright.wire.nbd_server import NbdServer
from nbd import peer
from nbd.peer import (
    ABORT,
    CACHE,
    DF,
    DISC,
    EXPORT_NAME,
    EXTENDED,
    FAST,
    FLUSH,
    FUA,
    GO,
    INFO,
    LIST,
    LIST_META,
    NO_HOLE,
    PAYLOAD,
    READ,
    REQ_ONE,
    SET_META,
    STARTTLS,
    STATUS,
    STRUCTURED,
    TRIM,
    WRITE,
    ZERO,
    info,
    meta,
    option,
    request,
    wide,
)
from sansio import nbd_script as s

from .test_machine import Fed, pack, replies

BASE, DEPTH = b"base:allocation", b"qemu:allocation-depth"
SIZE = 1 << 40
DISK = Export(b"disk", SIZE, description=b"a disk", contexts=(BASE, DEPTH))
EMPTY = Export(b"", 512)
ACK, SERVER, INFORM, CONTEXT = 1, 2, 3, 4
UNSUP, INVALID, TLS_REQD, UNKNOWN, SHUTDOWN, TOO_BIG, EXT_REQD = (
    1 << 31 | number for number in (1, 3, 5, 6, 7, 9, 10)
)
MEANT = option(SET_META, meta(b"disk", BASE))
Ask = tuple[int, bytes]


# -- the handshake, server
@pytest.mark.parametrize(
    ("flags", "asked", "kinds", "ends"),
    [
        # client flags
        (4, [], [], "closed"),
        (1, [option(LIST)], [SERVER, SERVER, ACK], ""),
        # EXPORT_NAME
        (3, [option(EXPORT_NAME, b"none")], [], "closed"),
        (3, [option(EXTENDED), option(EXPORT_NAME, b"disk")], [ACK], "closed"),
        # ABORT: data is ignored
        (3, [option(ABORT)], [ACK], "clean"),
        (3, [option(ABORT, b"because")], [ACK], "clean"),
        # LIST
        (3, [option(LIST, b"x")], [INVALID], ""),
        # what is withdrawn, not offered, or unknown
        (3, [option(4)], [UNSUP], ""),
        (3, [option(STARTTLS)], [UNSUP], ""),
        (3, [option(99, b"x" * OPTION_LIMIT)], [UNSUP], ""),
        (3, [option(99, b"x" * (OPTION_LIMIT + 1)), option(LIST)],
         [TOO_BIG, SERVER, SERVER, ACK], ""),
        # INFO and GO
        (3, [option(INFO, info(b"none"))], [UNKNOWN], ""),
        (3, [option(GO, info(b"none")), option(GO, info(b"disk"))], [UNKNOWN, INFORM, ACK], "go"),
        (3, [option(INFO, info(b"disk", [77, 3, 3])), option(GO, info())],
         [INFORM, INFORM, ACK, INFORM, ACK], "go"),
        (3, [option(INFO, info(b"disk")[:-1])], [INVALID], ""),
        (3, [option(INFO, info(b"disk", [1]) + b"x")], [INVALID], ""),
        (3, [option(INFO, struct.pack(">I", 1 << 20) + b"disk\0\0")], [INVALID], ""),
        (3, [option(INFO, info(b"x" * 4097))], [INVALID], ""),
        (3, [option(INFO, info(b"x" * 4096))], [UNKNOWN], ""),
        # forms of replies
        (3, [option(STRUCTURED, b"x")], [INVALID], ""),
        (3, [option(EXTENDED, b"x")], [INVALID], ""),
        (3, [option(STRUCTURED)] * 2, [ACK, ACK], ""),
        (3, [option(STRUCTURED), option(EXTENDED)], [ACK, ACK], ""),
        (3, [option(EXTENDED), option(STRUCTURED)], [ACK, EXT_REQD], ""),
        # metadata contexts
        (3, [option(LIST_META, meta(b"disk"))], [INVALID], ""),
        (3, [MEANT], [INVALID], ""),
        (3, [option(STRUCTURED), option(LIST_META, meta(b"disk"))],
         [ACK, CONTEXT, CONTEXT, ACK], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk"))], [ACK, ACK], ""),
        (3, [option(STRUCTURED), option(LIST_META, meta(b"disk", b"base:"))],
         [ACK, CONTEXT, ACK], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk", b"base:", b"qemu:"))],
         [ACK, ACK], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk", b"base:other", b"x-y:z", b"no"))],
         [ACK, ACK], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk", BASE, BASE, DEPTH))],
         [ACK, CONTEXT, CONTEXT, ACK], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"none", BASE))], [ACK, UNKNOWN], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk", BASE)[:-1])], [ACK, INVALID], ""),
        (3, [option(STRUCTURED), option(SET_META, meta(b"disk", BASE) + b"x")],
         [ACK, INVALID], ""),
    ],
)  # fmt: skip
def test_options(flags: int, asked: Sequence[bytes], kinds: Sequence[int], ends: str) -> None:
    fed = Fed(DISK)
    fed.machine.handshake.exports = {b"disk": DISK, b"": EMPTY}  # type: ignore[union-attr]
    fed.feed(struct.pack(">I", flags) + b"".join(asked))
    assert [kind for _, kind, _ in replies(fed.out)] == kinds
    assert bool(fed.machine.closed) == (ends in ("closed", "clean"))
    assert fed.machine.clean == (ends == "clean")
    assert (fed.machine.export is not None) == (ends == "go")


@pytest.mark.parametrize(
    ("before", "contexts"),
    [
        ([MEANT], {1: BASE}),
        ([MEANT, option(LIST_META, meta(b"disk", b"qemu:"))], {1: BASE}),
        ([MEANT, option(SET_META, meta(b"disk"))], {}),
        ([MEANT, option(SET_META, b"broken")], {}),
        ([MEANT, option(SET_META, meta(b"none", BASE))], {}),
        ([MEANT, option(SET_META, meta(b"", BASE))], {}),
        ([option(SET_META, meta(b"disk", DEPTH)), MEANT], {1: BASE}),
    ],
)  # fmt: skip
def test_the_last_selection_counts(before: Sequence[bytes], contexts: dict[int, bytes]) -> None:
    for last in (option(GO, info(b"disk")), option(EXPORT_NAME, b"disk")):
        fed = Fed(DISK)
        fed.machine.handshake.exports = {b"disk": DISK, b"": EMPTY}  # type: ignore[union-attr]
        fed.feed(struct.pack(">I", 3) + option(STRUCTURED) + b"".join(before) + last)
        assert fed.machine.contexts == contexts
        fed.feed(request(STATUS, 1, 0, 512))
        assert len(fed.others) == bool(contexts)


def test_tls_comes_first_and_forgets() -> None:
    machine = NbdServer({b"disk": DISK}, secure=True)

    def said(*asked: bytes) -> list[int]:
        for data in asked:
            space = machine.space()
            assert space is not None
            space[: len(data)] = data
            machine.received(len(data))
        return [kind for _, kind, _ in replies(bytes(18) + b"".join(machine.take()))]

    machine.take()
    asked = [option(number) for number in (LIST, INFO, GO, STRUCTURED, SET_META, 99)]
    assert said(struct.pack(">I", 3), *asked) == [TLS_REQD] * 6
    assert said(option(STARTTLS, b"x")) == [INVALID]
    assert said(option(STARTTLS)) == [ACK] and machine.upgrade
    machine.secured()
    assert said(option(STARTTLS)) == [INVALID]
    assert said(MEANT) == [INVALID]  # structured replies would have to be agreed on again
    assert said(option(LIST)) == [SERVER, ACK]
    plain = NbdServer({b"disk": DISK}, secure=True)
    data = struct.pack(">I", 3) + option(EXPORT_NAME, b"disk")
    space = plain.space()
    assert space is not None
    space[: len(data)] = data
    plain.received(len(data))
    assert plain.closed


def test_information() -> None:
    """Lengths, sizes, and the same answer to INFO and to GO; block sizes keep their rules."""
    wanted = [c.INFO_NAME, c.INFO_DESCRIPTION, c.INFO_BLOCK_SIZE]
    head = struct.pack(">I", 3) + option(EXTENDED) + MEANT
    fed = Fed(DISK).feed(head + option(INFO, info(b"disk", wanted)))
    told = [data for _, kind, data in replies(fed.out) if kind == INFORM]
    fed.feed(option(GO, info(b"disk", wanted)))
    assert [data for _, kind, data in replies(fed.out) if kind == INFORM] == told * 2
    found = {int.from_bytes(data[:2], "big"): data[2:] for data in told}
    assert found[c.INFO_NAME] == b"disk" and found[c.INFO_DESCRIPTION] == b"a disk"
    size, flags = struct.unpack(">QH", found[c.INFO_EXPORT])
    assert size == SIZE and flags & c.HAS_FLAGS
    least, preferred, most = struct.unpack(">III", found[c.INFO_BLOCK_SIZE])
    assert least.bit_count() == preferred.bit_count() == 1 and least <= 1 << 16
    assert preferred >= max(least, 512) and most % least == 0 and most >= max(preferred, 1 << 20)
    (listed,) = (
        data for _, kind, data in replies(Fed(DISK).feed(head + option(LIST)).out) if kind == SERVER
    )
    assert listed == struct.pack(">I", 4) + b"disk" + b"a disk"


@pytest.mark.parametrize(
    ("asked", "flag", "there"),
    [
        ([], c.SEND_DF, False),
        ([option(STRUCTURED)], c.SEND_DF, True),
        ([option(EXTENDED)], c.SEND_DF, True),
        ([option(STRUCTURED), MEANT], c.BLOCK_STATUS_PAYLOAD, False),
        ([option(EXTENDED)], c.BLOCK_STATUS_PAYLOAD, False),
        ([option(EXTENDED), MEANT], c.BLOCK_STATUS_PAYLOAD, True),
        ([option(EXTENDED)], 1 << 9, False),  # RESIZE is an experiment that no server has
    ],
)
def test_flags_depend_on_what_was_agreed(asked: list[bytes], flag: int, there: bool) -> None:
    fed = Fed(DISK).feed(struct.pack(">I", 3) + b"".join(asked) + option(GO, info(b"disk")))
    (told,) = (data for _, kind, data in replies(fed.out) if kind == INFORM)
    flags = int.from_bytes(told[-2:], "big")
    assert bool(flags & flag) == there
    read_only = DISK._replace(read_only=True).flags(c.EXTENDED)
    assert not read_only & (c.SEND_TRIM | c.SEND_WRITE_ZEROES | c.SEND_FAST_ZERO)


def test_a_new_size_is_told_to_new_clients() -> None:
    """Who is connected keeps the size that it was told."""
    exports = {b"": EMPTY}
    old = Fed(EMPTY).feed(peer.opening())
    exports[b""] = EMPTY._replace(size=4096)
    new = Fed(exports[b""]).feed(peer.opening())
    for fed, size in ((old, 512), (new, 4096)):
        (told,) = (data for _, kind, data in replies(fed.out) if kind == INFORM)
        assert int.from_bytes(told[2:10], "big") == size
        fed.feed(request(READ, 1, 512, 512))
        assert len(fed.reads) == (size > 512)


# -- requests, server
SIMPLE, STRUCT, WIDE = range(3)


@pytest.mark.parametrize(
    ("mode", "asked", "answer"),
    [
        # None: it is carried out; a number: it is refused so (0: nothing is to be done)
        (STRUCT, (200, 0, 0, 0), c.EINVAL),
        (STRUCT, (8, 0, 1 << 20, 0), c.EINVAL),  # RESIZE
        # flags: FUA with every command, all others where they are documented
        *((STRUCT, (command, 0, 512, FUA), None)
          for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS)),
        *((STRUCT, (command, 0, 512, 0x8000), c.EINVAL)
          for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS)),
        (SIMPLE, (READ, 0, 512, DF), c.EINVAL),
        (STRUCT, (READ, 0, 512, DF), None),
        (WIDE, (READ, 0, 512, DF), None),
        (STRUCT, (READ, 0, 32 << 20, DF), None),
        (STRUCT, (WRITE, 0, 512, DF), c.EINVAL),
        (STRUCT, (ZERO, 0, 512, NO_HOLE), None),
        (STRUCT, (TRIM, 0, 512, NO_HOLE), c.EINVAL),
        (STRUCT, (ZERO, 0, 512, FAST), None),
        (STRUCT, (ZERO, 0, 512, FAST | NO_HOLE | FUA), None),
        (STRUCT, (WRITE, 0, 512, FAST), c.EINVAL),
        (STRUCT, (STATUS, 0, 512, REQ_ONE), None),
        (STRUCT, (READ, 0, 512, REQ_ONE), c.EINVAL),
        (STRUCT, (WRITE, 0, 512, PAYLOAD), c.EINVAL),
        (WIDE, (READ, 0, 512, PAYLOAD), c.EINVAL),
        # the end of the export
        (STRUCT, (READ, SIZE - 1, 1, 0), None),
        (STRUCT, (READ, SIZE - 1, 2, 0), c.EINVAL),
        (STRUCT, (READ, (1 << 64) - 1, 2, 0), c.EINVAL),
        (STRUCT, (TRIM, SIZE, 1, 0), c.EINVAL),
        (STRUCT, (CACHE, SIZE, 1, 0), c.EINVAL),
        (STRUCT, (STATUS, SIZE, 1, 0), c.EINVAL),
        (STRUCT, (WRITE, SIZE - 1, 2, 0), c.ENOSPC),
        (STRUCT, (ZERO, SIZE - 1, 2, 0), c.ENOSPC),
        (WIDE, (ZERO, 1, SIZE, 0), c.ENOSPC),
        # lengths: of payloads and of what takes none
        (STRUCT, (READ, 0, (32 << 20) + 1, 0), c.EINVAL),
        (WIDE, (READ, 0, 1 << 33, 0), c.EINVAL),
        (STRUCT, (TRIM, 0, (1 << 32) - 1, 0), None),
        (STRUCT, (CACHE, 0, (1 << 32) - 1, 0), None),
        (WIDE, (TRIM, 0, SIZE, 0), None),
        (WIDE, (ZERO, 0, SIZE, FAST), None),
        (WIDE, (STATUS, 0, SIZE, 0), None),
        # nothing at all: no error, no disconnection
        *((STRUCT, (command, 0, 0, 0), 0) for command in (READ, WRITE, TRIM, CACHE, ZERO)),
        (STRUCT, (STATUS, 0, 0, 0), c.EINVAL),
        (STRUCT, (FLUSH, 0, 0, 0), None),
        (STRUCT, (FLUSH, SIZE, 1, 0), None),
    ],
)  # fmt: skip
def test_requests(mode: int, asked: tuple[int, int, int, int], answer: int | None) -> None:
    command, offset, length, flags = asked
    opening = peer.opening(mode > SIMPLE, mode > SIMPLE, b"disk", mode == WIDE)
    fed = Fed(DISK).feed(opening)
    payload = bytes(length) if command == WRITE or (mode == WIDE and flags & PAYLOAD) else b""
    if mode == WIDE:
        fed.feed(wide(command, 5, offset, length, flags) + payload)
    else:
        fed.feed(request(command, 5, offset, length, flags) + payload)
    fed.feed((wide if mode == WIDE else request)(FLUSH, 6))  # it goes on behind it
    carried = len(fed.reads) + len(fed.writes) + len(fed.others) - 1
    assert not fed.machine.closed
    if answer is None:
        assert carried == 1 and not fed.refusals
    else:
        assert carried == 0 and fed.refusals == [(command, pack(5), answer, offset)]


@pytest.mark.parametrize("command", [WRITE, TRIM, ZERO])
def test_read_only_exports(command: int) -> None:
    fed = Fed(DISK._replace(read_only=True)).feed(peer.opening(name=b"disk"))
    fed.feed(request(command, 5, 0, 9) + (bytes(9) if command == WRITE else b""))
    assert fed.refusals == [(command, pack(5), c.EPERM, 0)]


@pytest.mark.parametrize(
    ("mode", "data"),
    [
        (STRUCT, struct.pack(">I", 0x12560953) + bytes(24)),  # until Linux 2.1.116
        (STRUCT, wide(READ, 1, 0, 512)),
        (WIDE, request(READ, 1, 0, 512) + bytes(4)),
        (WIDE, wide(WRITE, 1, 0, (32 << 20) + 1, PAYLOAD)),
    ],
)
def test_what_ends_the_connection(mode: int, data: bytes) -> None:
    fed = Fed(DISK).feed(peer.opening(name=b"disk", extended=mode == WIDE) + data)
    assert fed.machine.closed and not fed.machine.clean
    assert not fed.reads and not fed.refusals


def test_a_disconnection_has_no_reply() -> None:
    fed = Fed(DISK).feed(peer.opening(name=b"disk") + request(READ, 1, 0, 9) + request(DISC, 2))
    assert fed.machine.clean and len(fed.reads) == 1 and not fed.refusals


@pytest.mark.parametrize(
    ("payload", "chosen"),
    [
        (struct.pack(">QI", 512, 1), (1,)),
        (struct.pack(">QII", 1 << 39, 2, 1), (2, 1)),
        (struct.pack(">QII", 512, 1, 1), None),
        (struct.pack(">QI", 512, 3), None),  # was not selected
        (struct.pack(">Q", 512), None),
        (struct.pack(">QI", 0, 1), None),
        (struct.pack(">QI", SIZE + 1, 1), None),
        (struct.pack(">QIH", 512, 1, 0), None),
        (struct.pack(">QIII", 512, 1, 2, 1), None),
        (bytes(1 << 20), None),
    ],
)
def test_a_choice_among_contexts(payload: bytes, chosen: tuple[int, ...] | None) -> None:
    head = struct.pack(">I", 3) + option(EXTENDED) + option(SET_META, meta(b"disk", BASE, DEPTH))
    fed = Fed(DISK).feed(head + option(GO, info(b"disk")))
    fed.feed(wide(STATUS, 5, 0, flags=REQ_ONE, data=payload) + wide(FLUSH, 6))
    assert fed.others[-1][0] == FLUSH and not fed.machine.closed
    if chosen is None:
        assert fed.refusals == [(STATUS, pack(5), c.EINVAL, 0)]
    else:
        length = int.from_bytes(payload[:8], "big")
        assert fed.others[0] == (STATUS, REQ_ONE, pack(5), 0, length, chosen)


# -- replies, server
@pytest.mark.parametrize(
    ("mode", "command", "magic"),
    [
        (SIMPLE, READ, "simple"),
        (SIMPLE, WRITE, "simple"),
        (STRUCT, READ, "structured"),
        (STRUCT, STATUS, "structured"),
        (WIDE, READ, "extended"),
        (WIDE, WRITE, "extended"),
        (WIDE, 200, "extended"),
    ],
)
def test_the_form_of_errors(mode: int, command: int, magic: str) -> None:
    """Of reads they are never simple beside structured replies; extended ones name the offset."""
    said = nbd_reply.refused(mode, Refusal(command, pack(5), c.EINVAL, 4096))
    assert int.from_bytes(said[:4], "big") == s.MAGICS[magic]
    if mode == WIDE:
        assert struct.unpack_from(">HHQQQ", said, 4) == (1, s.ERROR, 5, 4096, 6)


# -- the handshake, client
GONE = s.rep(s.GO, s.ACK)
START = s.greeting() + s.rep(s.EXTENDED, s.UNSUP) + s.rep(s.STRUCTURED, s.UNSUP)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        # unknown handshake flags are ignored, and not given back
        (s.greeting(0xFF03) + START[18:] + s.export(8192) + GONE, {"size": 8192}),
        # flags without HAS_FLAGS mean nothing; unknown ones are ignored
        (START + s.export(8192, c.SEND_TRIM) + GONE, {"flags": 0}),
        (START + s.export(8192, 0x8001) + GONE, {"size": 8192}),
        # information in any order, twice, and unknown
        (START + s.info(77, b"x") + s.export(1) + s.export(2) + s.info(1, b"n") + GONE,
         {"size": 2, "name": b"n"}),
        # block sizes: none told, no limit told, a limit that is no multiple
        (START + s.export(8192) + GONE, {"min_block": 1, "max_payload": 32 << 20}),
        (START + s.export(8192) + s.blocks(512, 4096, 0xFFFFFFFF) + GONE,
         {"min_block": 512, "max_payload": 32 << 20}),
        (START + s.export(8192) + s.blocks(512, 4096, 1000) + GONE, {"max_payload": 512}),
        (START + s.export(1 << 16) + s.blocks(1 << 16, 1 << 20, 1 << 20) + GONE,
         {"min_block": 1 << 16, "preferred_block": 1 << 20}),
        # errors of what is optional
        (s.greeting() + s.rep(s.EXTENDED, s.POLICY) + s.rep(s.STRUCTURED, s.ERR | 77)
         + s.export(8192) + GONE, {"structured": False, "extended": False}),
    ],
)  # fmt: skip
def test_what_a_client_takes(said: bytes, found: dict[str, object]) -> None:
    negotiation = Negotiation(b"x")
    heard, left = s.talk(negotiation, said)
    assert heard[:4] == struct.pack(">I", 3) and not left
    agreed = negotiation.agreed
    assert agreed is not None
    assert {key: getattr(agreed, key) for key in found} == found


@pytest.mark.parametrize(
    ("said", "number"),
    [
        (s.greeting() + s.rep(s.EXTENDED, s.SHUTDOWN), errno.ESHUTDOWN),
        (START + s.rep(s.GO, s.UNKNOWN), errno.ENOENT),
        (START + s.rep(s.GO, s.POLICY), errno.EACCES),
        (START + s.export() + s.rep(s.GO, s.ERR | 8), errno.EPROTO),
    ],
)
def test_a_client_that_is_refused_says_farewell(said: bytes, number: int) -> None:
    negotiation = Negotiation(b"x")
    with pytest.raises(PeerError) as raised:
        s.talk(negotiation, said)
    assert raised.value.errno == number
    assert s.options(b"...." + negotiation.take()) == [ABORT]


@pytest.mark.parametrize(
    ("number", "meant"),
    [(1, errno.EPERM), (5, errno.EIO), (12, errno.ENOMEM), (22, errno.EINVAL),
     (28, errno.ENOSPC), (75, errno.EOVERFLOW), (95, errno.ENOTSUP), (108, errno.ESHUTDOWN),
     (2, errno.EINVAL), (1 << 31, errno.EINVAL)],
)  # fmt: skip
def test_errors_that_a_client_is_told(number: int, meant: int) -> None:
    """Those that the specification does not have are taken for an invalid argument."""
    assert c.host_errno(number) == meant
