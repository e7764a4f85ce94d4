"""The server machine by bytes alone."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.wire import nbd_const as c
from diskwright.wire import nbd_reply
from diskwright.wire.nbd_batch import ReceiveBuffer, Refusal
from diskwright.wire.nbd_handshake import OPTION_LIMIT, OPTIONS_LIMIT, Export
from diskwright.wire.nbd_server import BUFFER_SIZE, NbdServer
from nbd import peer

SIZE = 1 << 30
EXPORT = Export(b"", SIZE, description=b"a disk")


class Fed:
    """What a machine made of a stream, in a form that does not depend on how it was cut."""

    def __init__(self, export: Export = EXPORT, hold: bool = False, small: bool = False) -> None:
        self.machine = NbdServer({export.name: export}, ReceiveBuffer(64 << 10) if small else None)
        self.reads: list[Any] = []
        self.writes: list[Any] = []
        self.others: list[Any] = []
        self.refusals: list[Any] = []
        self.batches: list[Any] = []
        self.out = b"".join(self.machine.take())
        self.hold = hold
        self.largest = 0
        self.fua = 0

    def feed(self, data: bytes) -> Fed:
        machine = self.machine
        at = 0
        while at < len(data) and not machine.closed:
            space = machine.space()
            if space is None:
                self.largest = max(self.largest, machine.wanted)
                machine.replace(ReceiveBuffer(machine.wanted))
                continue
            assert len(space)
            part = data[at : at + len(space)]
            space[: len(part)] = part
            at += len(part)
            batch = machine.received(len(part))
            self.out += b"".join(machine.take())
            if batch is None:
                continue
            self.batches.append(batch)
            self.reads += zip(
                batch.read_cookies, batch.read_offsets, batch.read_lengths, strict=True
            )
            self.others += batch.others
            self.refusals += batch.refusals
            self.fua += batch.fua
            writes = zip(batch.write_cookies, batch.write_offsets, batch.payloads, strict=True)
            if self.hold:  # nothing may write over the payloads of a batch that is in use
                self.writes += writes
            else:
                self.writes += [(k, o, bytes(p)) for k, o, p in writes]
                batch.release()
        return self

    def result(self) -> Any:
        writes = [(k, o, bytes(p)) for k, o, p in self.writes]
        return self.reads, writes, self.others, self.refusals, self.out, self.machine.closed


def pack(cookie: int) -> bytes:
    return struct.pack(">Q", cookie)


def replies(out: bytes) -> list[tuple[int, int, bytes]]:
    """(option, kind, data) of the handshake replies behind the greeting."""
    found = []
    at = 18
    while at < len(out):
        magic, number, kind, length = struct.unpack_from(">QIII", out, at)
        assert magic == 0x3E889045565A9
        found.append((number, kind, out[at + 20 : at + 20 + length]))
        at += 20 + length
    return found


def test_handshake_go() -> None:
    fed = Fed().feed(peer.opening(allocation=True))
    assert fed.out.startswith(peer.GREETING)
    assert fed.machine.export is EXPORT and fed.machine.mode == c.STRUCTURED
    assert fed.machine.contexts == {1: b"base:allocation"}
    kinds = [(number, kind) for number, kind, _ in replies(fed.out)]
    assert kinds == [(8, 1), (10, 4), (10, 1), (7, 3), (7, 1)]
    size, flags = struct.unpack(">QH", replies(fed.out)[3][2][2:])
    assert size == SIZE
    assert flags & c.SEND_DF and flags & c.CAN_MULTI_CONN and flags & c.SEND_FAST_ZERO


@pytest.mark.parametrize(("no_zeroes", "extra"), [(True, 0), (False, 124)])
def test_handshake_export_name(no_zeroes: bool, extra: int) -> None:
    head = struct.pack(">I", 3 if no_zeroes else 1)
    fed = Fed().feed(head + peer.option(peer.EXPORT_NAME) + peer.request(peer.READ, 1, 0, 512))
    assert len(fed.out) == 18 + 10 + extra
    assert fed.reads == [(pack(1), 0, 512)]
    assert not struct.unpack_from(">QH", fed.out, 18)[1] & c.SEND_DF


def test_unknown_names_and_options() -> None:
    stream = struct.pack(">I", 3)
    stream += peer.option(peer.GO, peer.info(b"other"))
    stream += peer.option(5)  # STARTTLS
    stream += peer.option(12345, b"x" * 100)
    stream += peer.option(peer.SET_META, peer.meta(b"", b"base:allocation"))  # not structured yet
    stream += peer.option(peer.LIST, b"x")
    stream += peer.option(peer.GO, b"\xff\xff\xff\xff")
    stream += peer.option(12345, b"x" * (OPTION_LIMIT + 1))
    stream += peer.option(peer.LIST)
    stream += peer.option(peer.INFO, peer.info(b"", [0, 1, 2, 3, 77]))
    stream += peer.option(peer.ABORT)
    fed = Fed().feed(stream)
    answers = [(number, kind) for number, kind, _ in replies(fed.out)]
    assert answers == [
        (7, c.REP_ERR_UNKNOWN),
        (5, c.REP_ERR_UNSUP),
        (12345, c.REP_ERR_UNSUP),
        (10, c.REP_ERR_INVALID),
        (3, c.REP_ERR_INVALID),
        (7, c.REP_ERR_INVALID),
        (12345, c.REP_ERR_TOO_BIG),
        (3, c.REP_SERVER),
        (3, c.REP_ACK),
        (6, c.REP_INFO),
        (6, c.REP_INFO),
        (6, c.REP_INFO),
        (6, c.REP_INFO),
        (6, c.REP_ACK),
        (2, c.REP_ACK),
    ]
    assert fed.machine.closed and fed.machine.clean


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">I", 4),  # a client flag that nobody offered
        struct.pack(">I", 3) + b"IHAVEOPX" + bytes(8),
        struct.pack(">I", 3) + peer.option(peer.EXPORT_NAME, b"other"),
        struct.pack(">I", 3) + peer.option(peer.EXPORT_NAME, b"x" * 5000)[:16] + b"x" * 20000,
        struct.pack(">I", 3) + peer.option(99) * (OPTIONS_LIMIT + 1),
        peer.opening() + b"\0" * 28,
    ],
)
def test_dropped(stream: bytes) -> None:
    fed = Fed().feed(stream)
    assert fed.machine.closed and not fed.machine.clean


def test_contexts_belong_to_the_export_that_was_asked_for() -> None:
    stream = struct.pack(">I", 3) + peer.option(peer.STRUCTURED)
    stream += peer.option(peer.SET_META, peer.meta(b"", b"base:allocation"))
    stream += peer.option(peer.SET_META, peer.meta(b"", b"qemu:dirty-bitmap:x"))
    fed = Fed().feed(stream + peer.option(peer.GO, peer.info()))
    assert not fed.machine.contexts
    for queries, found in (((), 1), ((b"base:",), 1), ((b"other:",), 0)):
        stream = struct.pack(">I", 3) + peer.option(peer.STRUCTURED)
        fed = Fed().feed(stream + peer.option(peer.LIST_META, peer.meta(b"", *queries)))
        assert sum(kind == c.REP_META_CONTEXT for _, kind, _ in replies(fed.out)) == found


def test_one_batch_in_columns() -> None:
    fed = Fed()
    fed.feed(peer.opening())
    fed.feed(b"".join(peer.request(peer.READ, i, i * 4096, 4096) for i in range(32)))
    (batch,) = fed.batches
    assert list(batch.read_cookies) == [pack(i) for i in range(32)]
    assert list(batch.read_offsets) == [i * 4096 for i in range(32)]
    assert list(batch.read_lengths) == [4096] * 32
    payload = [bytes([i]) * 4096 for i in range(32)]
    fed.feed(b"".join(peer.request(peer.WRITE, i, i << 20, data=payload[i]) for i in range(32)))
    assert len(fed.batches) == 2
    assert fed.writes == [(pack(i), i << 20, payload[i]) for i in range(32)]


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "answer"),
    [
        (peer.READ, SIZE, 1, 0, c.EINVAL),
        (peer.READ, SIZE - 511, 512, 0, c.EINVAL),
        (peer.READ, 1 << 63, 512, 0, c.EINVAL),
        (peer.READ, 0, (32 << 20) + 1, 0, c.EINVAL),
        (peer.READ, 0, 0, 0, 0),
        (peer.READ, 0, 512, 2, c.EINVAL),
        (peer.TRIM, SIZE, 1, 0, c.EINVAL),
        (peer.ZERO, SIZE, 1, 0, c.ENOSPC),
        (peer.TRIM, 0, 512, peer.FAST, c.EINVAL),
        (peer.ZERO, 0, 512, peer.PAYLOAD, c.EINVAL),  # requests are not extended
        (peer.WRITE, 0, 0, 0, 0),
        (peer.CACHE, SIZE, 1, 0, c.EINVAL),
        (peer.STATUS, 0, 512, 0, c.EINVAL),  # no context was selected
        (17, 0, 0, 0, c.EINVAL),
    ],
)
def test_refused(command: int, offset: int, length: int, flags: int, answer: int) -> None:
    stream = peer.opening() + peer.request(command, 5, offset, length, flags)
    fed = Fed().feed(stream + peer.request(peer.READ, 6, 0, 512))
    assert fed.refusals == [(command, pack(5), answer, offset)]
    assert fed.reads == [(pack(6), 0, 512)]


def test_refused_writes_are_drained_without_being_kept() -> None:
    fed = Fed(Export(b"", SIZE, read_only=True)).feed(peer.opening())
    fed.feed(peer.request(peer.WRITE, 1, 0, data=b"x" * 5000) + peer.request(peer.READ, 2, 0, 1))
    assert fed.refusals == [(1, pack(1), c.EPERM, 0)] and fed.reads == [(pack(2), 0, 1)]
    fed = Fed().feed(peer.opening())
    fed.feed(peer.request(peer.WRITE, 1, SIZE - 1, data=b"xx"))
    fed.feed(peer.request(peer.WRITE, 2, 0, length=100 << 20))
    assert fed.refusals == [(1, pack(1), c.ENOSPC, SIZE - 1)]
    for _ in range(100):
        fed.feed(bytes(1 << 20))
    assert fed.refusals[1:] == [(1, pack(2), c.EINVAL, 0)]
    assert fed.largest == 0


def test_largest_write_and_its_neighbours() -> None:
    data = bytes(32 << 20)
    fed = Fed(hold=True).feed(peer.opening() + peer.request(peer.READ, 1, 0, 1))
    fed.feed(peer.request(peer.WRITE, 2, 0, data=data, flags=peer.FUA))
    fed.feed(peer.request(peer.WRITE, 3, 9, data=b"end") + peer.request(peer.DISC, 0) + b"junk")
    assert [(k, o, len(p)) for k, o, p in fed.writes] == [(pack(2), 0, 32 << 20), (pack(3), 9, 3)]
    assert bytes(fed.writes[1][2]) == b"end"
    assert fed.fua == 1 and fed.machine.clean
    assert BUFFER_SIZE < fed.largest <= (32 << 20) + (128 << 10)


command = st.one_of(
    st.builds(
        lambda k, n, o: (peer.READ, n, o, k, b""),
        st.sampled_from([0, 0, 0, peer.FUA, peer.DF, 64]),
        st.sampled_from([4096, 4096, 512, 0, 1 << 20, 33 << 20]),
        st.sampled_from([0, 4096, SIZE - 512, SIZE]),
    ),
    st.builds(
        lambda k, n, o, b: (peer.WRITE, 0, o, k, bytes([b]) * n),
        st.sampled_from([0, 0, 0, peer.FUA, 64]),
        st.sampled_from([4096, 4096, 4096, 512, 1, 70000, 300000]),
        st.sampled_from([0, 4096, SIZE - 512, SIZE]),
        st.integers(0, 255),
    ),
    st.builds(
        lambda t, k, n, o: (t, n, o, k, b""),
        st.sampled_from([peer.FLUSH, peer.TRIM, peer.CACHE, peer.ZERO, peer.STATUS, 9]),
        st.sampled_from([0, peer.FUA, peer.REQ_ONE, peer.NO_HOLE]),
        st.sampled_from([0, 512, 1 << 31]),
        st.sampled_from([0, 4096, SIZE]),
    ),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    extended = draw(st.booleans())
    stream = peer.opening(draw(st.booleans()), draw(st.booleans()), extended=extended)
    request = peer.wide if extended else peer.request
    for cookie, (kind, length, offset, flags, data) in enumerate(
        draw(st.lists(command, max_size=25))
    ):
        repeat = draw(st.sampled_from([1, 1, 1, 4, 40])) if len(data) <= 4096 else 1
        for i in range(repeat):
            stream += request(kind, cookie << 8 | i, offset, length, flags, data)
    if draw(st.booleans()):
        stream += request(peer.DISC, 0)
    cuts = draw(st.lists(st.integers(0, len(stream)), max_size=30))
    return stream, sorted(cuts)


@settings(max_examples=150, deadline=None)
@given(streams(), st.booleans(), st.booleans())
def test_how_the_stream_is_cut_does_not_matter(
    case: tuple[bytes, list[int]], hold: bool, small: bool
) -> None:
    stream, cuts = case
    whole = Fed().feed(stream)
    parts = Fed(hold=hold, small=small)
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        parts.feed(stream[start:end])
    assert parts.result() == whole.result()
    if not hold:
        assert not parts.machine.buffer.users


@settings(max_examples=60, deadline=None)
@given(streams())
def test_byte_by_byte(case: tuple[bytes, list[int]]) -> None:
    stream = case[0][:3000]
    parts = Fed()
    for i in range(len(stream)):
        parts.feed(stream[i : i + 1])
    assert parts.result() == Fed().feed(stream).result()


@settings(max_examples=300, deadline=None)
@given(streams(), st.data())
def test_hostile_bytes(case: tuple[bytes, list[int]], data: st.DataObject) -> None:
    """Whatever comes: a clean drop or an answer, and never more memory than a write may take."""
    stream, cuts = case
    hostile = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(hostile) - 1))
        hostile[at] = data.draw(st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]))
    fed = Fed()
    for start, end in zip([0, *cuts], [*cuts, len(hostile)], strict=True):
        fed.feed(bytes(hostile[start:end]))
    assert fed.largest <= (32 << 20) + (128 << 10)
    assert len(fed.out) < 1 << 20
    for _, offset, length in fed.reads:
        assert 0 < length <= 32 << 20 and offset + length <= SIZE


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_noise(noise: bytes) -> None:
    Fed().feed(noise)
    Fed().feed(peer.opening() + noise)


def test_replies() -> None:
    headers = nbd_reply.ReadHeaders(c.STRUCTURED).fill([pack(1), pack(2)], [0, 8192], [4096, 512])
    assert [bytes(h) for h in headers] == [
        nbd_reply.read_header(1, pack(1), 0, 4096),
        nbd_reply.read_header(1, pack(2), 8192, 512),
    ]
    assert bytes(headers[1]) == struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 2, 520, 8192)
    headers = nbd_reply.ReadHeaders(c.SIMPLE).fill([pack(1)], [0], [4096])
    assert bytes(headers[0]) == struct.pack(">IIQ", 0x67446698, 0, 1)
    assert nbd_reply.read_header(0, pack(1), 0, 4096) == bytes(headers[0])
    many = [pack(i) for i in range(600)]
    assert nbd_reply.done(many) == b"".join(nbd_reply.done([k]) for k in many)
    failed = nbd_reply.failed(1, c.CMD_READ, pack(1), c.EIO)
    assert failed == struct.pack(">IHHQIIH", 0x668E33EF, 1, 0x8001, 1, 6, 5, 0)
    status = nbd_reply.block_status(1, pack(3), 0, {1: [(512, 3), (1024, 0)]})
    assert status == struct.pack(">IHHQIIIIII", 0x668E33EF, 1, 5, 3, 20, 1, 512, 3, 1024, 0)


def test_extended_headers() -> None:
    """Lengths of 64 bits; payloads only where they belong, the others go by."""
    size = 1 << 50
    fed = Fed(Export(b"", size)).feed(peer.opening(extended=True, allocation=True))
    assert fed.machine.mode == c.EXTENDED
    fed.feed(b"".join(peer.wide(peer.READ, i, i * 4096, 4096) for i in range(3)))
    fed.feed(b"".join(peer.wide(peer.WRITE, i, i << 40, data=bytes([i]) * 9) for i in range(3)))
    assert fed.reads == [(pack(i), i * 4096, 4096) for i in range(3)]
    assert fed.writes == [(pack(i), i << 40, bytes([i]) * 9) for i in range(3)]
    assert len(fed.batches) == 2
    fed.feed(peer.wide(peer.ZERO, 4, 0, size) + peer.wide(peer.STATUS, 5, 1, size - 1))
    assert [other[:1] + other[3:5] for other in fed.others] == [
        (peer.ZERO, 0, size),
        (peer.STATUS, 1, size - 1),
    ]
    fed.feed(peer.wide(peer.STATUS, 6, 7, data=bytes(12)))
    fed.feed(peer.wide(peer.READ, 7, 0, data=bytes(512)))
    fed.feed(peer.wide(peer.TRIM, 9, size, 1) + peer.wide(peer.READ, 10, 0, 1 << 40))
    fed.feed(peer.wide(peer.WRITE, 11, 3, flags=peer.PAYLOAD))
    assert fed.refusals == [
        (peer.STATUS, pack(6), c.EINVAL, 7),
        (peer.READ, pack(7), c.EINVAL, 0),
        (peer.TRIM, pack(9), c.EINVAL, size),
        (peer.READ, pack(10), c.EINVAL, 0),
        (peer.WRITE, pack(11), 0, 3),
    ]
    unmarked = [peer.wide(peer.WRITE, i, i, 512) + bytes([i]) * 512 for i in range(9)]
    for _ in range(2):
        fed.feed(b"".join(unmarked))
        assert [bytes(data[2][:1]) for data in fed.writes[-9:]] == [bytes([i]) for i in range(9)]
    fed.feed(peer.wide(peer.WRITE, 12, 0, (32 << 20) + 1, peer.PAYLOAD))
    assert "longer than allowed" in fed.machine.closed
    for stream in (
        peer.request(peer.READ, 1, 0, 512) + bytes(4),  # a compact one
        peer.option(peer.EXPORT_NAME),
    ):
        head = struct.pack(">I", 3) + peer.option(peer.EXTENDED)
        head += peer.option(peer.GO, peer.info()) if stream[0] == 0x25 else b""
        assert Fed().feed(head + stream).machine.closed
    fed = Fed().feed(
        struct.pack(">I", 3)
        + peer.option(peer.EXTENDED, b"x")
        + peer.option(peer.STRUCTURED)
        + peer.option(peer.EXTENDED)
        + peer.option(peer.STRUCTURED)
    )
    assert [kind for _, kind, _ in replies(fed.out)] == [
        c.REP_ERR_INVALID,
        c.REP_ACK,
        c.REP_ACK,
        c.REP_ERR_EXT_HEADER_REQD,
    ]


def test_extended_replies() -> None:
    """Each repeats the offset of its request; there are no simple ones."""
    wide = c.EXTENDED
    headers = nbd_reply.ReadHeaders(wide).fill([pack(1), pack(2)], [0, 8192], [4096, 512])
    assert [bytes(h) for h in headers] == [
        nbd_reply.read_header(wide, pack(1), 0, 4096),
        nbd_reply.read_header(wide, pack(2), 8192, 512),
    ]
    head = struct.pack(">IHHQQQQ", 0x6E8A278C, 1, 1, 2, 8192, 520, 8192)
    assert bytes(headers[1]) == head
    many = [pack(i) for i in range(600)]
    assert nbd_reply.done(many, wide, range(600)) == b"".join(
        struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, i, i, 0) for i in range(600)
    )
    failed = nbd_reply.failed(wide, c.CMD_WRITE, pack(1), c.EIO, 77)
    assert failed == struct.pack(">IHHQQQIH", 0x6E8A278C, 1, 0x8001, 1, 77, 6, 5, 0)
    nothing = nbd_reply.refused(wide, Refusal(c.CMD_READ, pack(1), 0, 5))
    assert nothing == struct.pack(">IHHQQQ", 0x6E8A278C, 1, 0, 1, 5, 0)
    status = nbd_reply.block_status(wide, pack(3), 9, {1: [(1 << 40, 3)], 2: [(5, 0), (6, 1)]})
    assert status == struct.pack(
        ">IHHQQQIIQQ", 0x6E8A278C, 0, 6, 3, 9, 24, 1, 1, 1 << 40, 3
    ) + struct.pack(">IHHQQQIIQQQQ", 0x6E8A278C, 1, 6, 3, 9, 40, 2, 2, 5, 0, 6, 1)


CONTEXTS = (
    b"base:allocation",
    b"qemu:allocation-depth",
    b"qemu:dirty-bitmap:a",
    b"qemu:dirty-bitmap:b",
)


@pytest.mark.parametrize(
    ("queries", "listed", "selected"),
    [
        ((), (1, 2, 3, 4), ()),
        ((b"base:",), (1,), ()),
        ((b"qemu:",), (2, 3, 4), ()),
        ((b"qemu:dirty-bitmap:",), (3, 4), ()),
        ((b"qemu:dirty-bitmap:b", b"x-y:", b"base:allocation"), (1, 4), (1, 4)),
        ((b"qemu:allocation-depth", b"qemu:allocation-depth"), (2,), (2,)),
        ((b"qemu", b"", b":", b"base:alloc", b"qemu:dirty-bitmap:c"), (), ()),
    ],
)
def test_queries_of_contexts(
    queries: tuple[bytes, ...], listed: tuple[int, ...], selected: tuple[int, ...]
) -> None:
    export = Export(b"x", SIZE, contexts=CONTEXTS)
    for option, numbers in ((peer.LIST_META, listed), (peer.SET_META, selected)):
        stream = struct.pack(">I", 3) + peer.option(peer.STRUCTURED)
        stream += peer.option(option, peer.meta(b"x", *queries))
        fed = Fed(export).feed(stream + peer.option(peer.GO, peer.info(b"x")))
        found = [data for _, kind, data in replies(fed.out) if kind == c.REP_META_CONTEXT]
        assert [data[4:] for data in found] == [CONTEXTS[number - 1] for number in numbers]
        told = [int.from_bytes(data[:4], "big") for data in found]
        assert told == (list(numbers) if option == peer.SET_META else [0] * len(numbers))
        assert list(fed.machine.contexts) == list(selected if option == peer.SET_META else ())


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(1, ""), 1),
        (OSError(13, ""), 1),
        (OSError(30, ""), 1),
        (OSError(122, ""), 28),
        (OSError(27, ""), 28),
        (OSError(28, ""), 28),
        (OSError(95, ""), 95),
        (OSError(116, ""), 5),
        (ValueError(), 5),
    ],
)
def test_errors_on_the_wire(error: Exception, number: int) -> None:
    assert c.wire_errno(error) == number
