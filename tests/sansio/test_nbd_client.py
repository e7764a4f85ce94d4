"""The client's transmission by bytes alone: every form of reply, and everything that is none."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.errors import PeerError
from diskwright.wire.nbd_client import BUFFER_SIZE, NbdClient
from diskwright.wire.nbd_flight import Flight

from . import nbd_script as s

FORMS = ("simple", "structured", "extended")


def sent(machine: NbdClient, flight: Flight) -> bytes:
    return b"".join(machine.request(flight))


def content(flight: Flight) -> list[bytes]:
    return [bytes(view) for view in flight.buffers or ()]


def filled(*flight_rows: tuple[int, int], form: str = "structured") -> tuple[NbdClient, Flight]:
    machine = NbdClient(s.agreed(form))
    flight = s.reads(*flight_rows)
    machine.request(flight)
    return machine, flight


# -- requests
def test_requests_in_columns() -> None:
    machine = NbdClient(s.agreed())
    assert sent(machine, s.reads((512, 8), (4096, 16))) == (
        struct.pack(">IHHQQI", 0x25609513, 0, 0, 1 << 16, 512, 8)
        + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1 << 16 | 1, 4096, 16)
    )
    write = Flight(1, [0, 9], [2, 3], [b"ab", bytearray(b"cde")], flags=1)
    assert sent(machine, write) == (
        struct.pack(">IHHQQI", 0x25609513, 1, 1, 2 << 16, 0, 2)
        + b"ab"
        + struct.pack(">IHHQQI", 0x25609513, 1, 1, 2 << 16 | 1, 9, 3)
        + b"cde"
    )
    assert machine.leaving() == struct.pack(">IHHQQI", 0x25609513, 0, 2, 0, 0, 0)


def test_extended_requests() -> None:
    machine = NbdClient(s.agreed("extended"))
    write = sent(machine, Flight(1, [7], [2], [b"ab"]))
    assert write == struct.pack(">IHHQQQ", 0x21E41C71, 1 << 5, 1, 1 << 16, 7, 2) + b"ab"
    zero = sent(machine, Flight(6, [0], [1 << 40]))
    assert zero == struct.pack(">IHHQQQ", 0x21E41C71, 0, 6, 2 << 16, 0, 1 << 40)
    assert len(machine.leaving()) == 32


# -- replies
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [[], [1] * 400, [3, 30, 7, 50]], ids=["whole", "bytes", "torn"])
def test_reads_in_any_order(form: str, steps: list[int]) -> None:
    machine, flight = filled((0, 5), (100, 40), (50, 1), form=form)
    texts = [b"hello", bytes(range(40)), b"!"]
    said = b""
    for at in (2, 0, 1):
        cookie, offset = s.cookies(flight)[at], flight.offsets[at]
        if form == "simple":
            said += s.simple(cookie, data=texts[at])
        elif form == "structured":
            said += s.chunk(cookie, s.DATA, s.data(offset, texts[at]))
        else:
            said += s.wide(cookie, s.DATA, s.data(offset, texts[at]), offset=offset)
    assert s.hear(machine, said, steps) == [flight]
    assert content(flight) == texts
    assert flight.failure is None and not machine.flights


def test_a_read_in_parts() -> None:
    machine, flight = filled((1000, 100))
    (cookie,) = s.cookies(flight)
    said = s.chunk(cookie, s.DATA, s.data(1060, b"z" * 40), flags=0)
    said += s.chunk(cookie, s.HOLE, s.hole(1010, 50), flags=0)
    said += s.chunk(cookie, s.DATA, s.data(1000, b"a" * 10), flags=0)
    said += s.chunk(cookie, s.NONE)
    assert s.hear(machine, said) == [flight]
    assert content(flight) == [b"a" * 10 + bytes(50) + b"z" * 40]


@pytest.mark.parametrize("form", FORMS)
def test_large_reads_go_straight_into_their_buffer(form: str) -> None:
    """Only what came with the header is copied."""
    machine, flight = filled((0, 1 << 20), form=form)
    (cookie,) = s.cookies(flight)
    body = random.Random(1).randbytes(1 << 20)
    if form == "simple":
        head = s.simple(cookie, data=body)[:20]
    elif form == "structured":
        head = s.chunk(cookie, s.DATA, s.data(0, body))[:30]
    else:
        head = s.wide(cookie, s.DATA, s.data(0, body))[:44]
    assert not s.hear(machine, head)
    first = machine.space()[0]
    have = {"simple": 4, "structured": 2, "extended": 4}[form]
    assert len(first) == (1 << 20) - have
    assert first.obj is (flight.buffers or ())[0].obj
    assert s.hear(machine, body[have:] , [100000, 300000]) == [flight]
    assert content(flight) == [body]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_answered_without_data(form: str) -> None:
    machine = NbdClient(s.agreed(form))
    flight = Flight(1, [0, 8], [8, 8], [bytes(8), bytes(8)])
    machine.request(flight)
    one, two = s.cookies(flight)
    said = {
        "simple": s.simple(two) + s.simple(one),
        "structured": s.simple(two) + s.chunk(one, s.NONE),
        "extended": s.wide(two, s.NONE, offset=8) + s.wide(one, s.NONE),
    }[form]
    assert s.hear(machine, said) == [flight]


def test_errors() -> None:
    """The first one of a flight is told, with what the server says to it; others still come."""
    machine, flight = filled((0, 8), (8, 8), (16, 8))
    one, two, three = s.cookies(flight)
    assert not s.hear(machine, s.chunk(two, s.ERROR_OFFSET, s.error(28, b"fu\x1bll", 9)))
    assert not s.hear(machine, s.chunk(one, s.DATA, s.data(0, bytes(8))))
    assert s.hear(machine, s.chunk(three, 0x8099, s.error(5, b"later"))) == [flight]
    assert flight.failure is not None
    assert tuple(flight.failure) == (28, "fu\N{REPLACEMENT CHARACTER}ll")
    machine, flight = filled((0, 8), form="simple")
    assert s.hear(machine, s.simple(s.cookies(flight)[0], 22)) == [flight]
    assert flight.failure is not None and flight.failure.number == 22


@pytest.mark.parametrize("steps", [[], [5] * 40])
@pytest.mark.parametrize("wide", [False, True])
def test_block_status(wide: bool, steps: list[int]) -> None:
    machine = NbdClient(s.agreed("extended" if wide else "structured"))
    flight = Flight(7, [4096], [1 << 20])
    machine.request(flight)
    (cookie,) = s.cookies(flight)
    rows = [(512, 0), (512, 0), (1024, 3)]
    if wide:
        said = s.wide(cookie, s.STATUS_EXT, s.status_ext(7, *rows, (1 << 40, 2)), offset=4096)
    else:
        said = s.chunk(cookie, s.STATUS, s.status(7, *rows, (1 << 20, 2)))
    assert s.hear(machine, said, steps) == [flight]
    assert flight.status == {7: [(1024, 0), (1024, 3), (1 << (40 if wide else 20), 2)]}


def test_a_long_block_status_is_collected() -> None:
    machine = NbdClient(s.agreed())
    flight = Flight(7, [0], [1 << 30])
    machine.request(flight)
    rows = [(512, at & 1) for at in range(40000)]
    said = s.chunk(s.cookies(flight)[0], s.STATUS, s.status(7, *rows))
    assert len(said) > 4 * BUFFER_SIZE
    assert s.hear(machine, said, [20, 100, 100000]) == [flight]
    assert flight.status == {7: rows}


@pytest.mark.parametrize("begun", [0, 30, 1000])
def test_nobody_waits_any_more(begun: int) -> None:
    """From then on nothing is written into the buffers, and what follows is understood."""
    machine, flight = filled((0, 100000))
    (cookie,) = s.cookies(flight)
    said = s.chunk(cookie, s.DATA, s.data(0, b"x" * 100000))
    assert not s.hear(machine, said[:begun])
    before = content(flight)
    (view,) = flight.buffers or ()
    machine.detach(flight)
    other = s.reads((0, 3))
    machine.request(other)
    tail = s.chunk(s.cookies(other)[0], s.DATA, s.data(0, b"abc"))
    assert s.hear(machine, said[begun:] + tail) == [flight, other]
    assert [bytes(view)] == before
    assert content(other) == [b"abc"]


# -- what no server says
Said = Callable[[int], bytes]


@pytest.mark.parametrize(
    ("form", "said", "words"),
    [
        ("simple", lambda k: b"\1\2\3\4" + bytes(12), "begins with 0x1020304"),
        ("simple", lambda k: s.simple(k + 1), "was not asked"),
        ("simple", lambda k: s.simple(k + (1 << 16)), "was not asked"),
        ("simple", lambda k: s.chunk(k, s.DATA, s.data(0, bytes(64))), "not agreed on"),
        ("simple", lambda k: s.simple(k, data=bytes(64)) * 2, "was not asked"),
        ("structured", lambda k: s.simple(k, data=bytes(64)), "not agreed on"),
        ("structured", lambda k: s.wide(k, s.DATA, s.data(0, bytes(64))), "not agreed on"),
        ("extended", lambda k: s.chunk(k, s.DATA, s.data(0, bytes(64))), "not agreed on"),
        ("extended", lambda k: s.simple(k, 5), "not agreed on"),
        ("extended", lambda k: s.wide(k, s.NONE, offset=1), "another offset"),
        ("structured", lambda k: s.chunk(k, s.NONE), "before all bytes"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(0, bytes(63))), "before all bytes"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(0, bytes(65))), "outside"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(1 << 63, bytes(64))), "outside"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(0, b"")), "nobody asked for"),
        ("structured", lambda k: s.chunk(k, s.DATA, b"x"), "nobody asked for"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(0, bytes(9)), 0) * 2, "twice"),
        ("structured", lambda k: s.chunk(k, s.HOLE, s.hole(0, 64), 0)
         + s.chunk(k, s.HOLE, s.hole(63, 1)), "twice"),
        ("structured", lambda k: s.chunk(k, s.HOLE, s.hole(0, 0)), "outside"),
        ("structured", lambda k: s.chunk(k, s.HOLE, s.hole(1, 64)), "outside"),
        ("structured", lambda k: s.chunk(k, s.HOLE, bytes(11)), "hole"),
        ("structured", lambda k: s.chunk(k, s.HOLE, bytes(13)), "13 bytes long"),
        ("structured", lambda k: s.chunk(k, s.NONE, b"x"), "1 bytes long"),
        ("structured", lambda k: s.chunk(k, s.NONE, flags=0), "empty reply"),
        ("structured", lambda k: s.chunk(k, s.STATUS, s.status(7, (1, 0))), "status that nobody"),
        ("structured", lambda k: s.chunk(k, 9, b""), "unknown kind 9"),
        ("structured", lambda k: s.chunk(k, s.ERROR, b"short"), "no number"),
        ("structured", lambda k: s.chunk(k, s.ERROR, s.error(0)), "contradicts"),
        ("structured", lambda k: s.chunk(k, s.ERROR, struct.pack(">IH", 5, 9)), "contradicts"),
        ("structured", lambda k: s.chunk(k, s.ERROR, bytes(5000)), "5000 bytes long"),
        ("structured", lambda k: s.chunk(k, s.ERROR, s.error(5), 0) * 99, "again and again"),
    ],
)  # fmt: skip
def test_reads_that_break_the_protocol(form: str, said: Said, words: str) -> None:
    machine, flight = filled((0, 64), form=form)
    with pytest.raises(PeerError, match=words):
        s.hear(machine, said(s.cookies(flight)[0]))


@pytest.mark.parametrize(
    ("form", "said", "words"),
    [
        ("structured", s.simple, "not agreed on"),
        ("structured", lambda k: s.chunk(k, s.NONE), "with nothing"),
        ("structured", lambda k: s.chunk(k, s.STATUS, s.status(7)), "no whole extents"),
        ("structured", lambda k: s.chunk(k, s.STATUS, bytes(15)), "no whole extents"),
        ("structured", lambda k: s.chunk(k, s.STATUS, s.status(8, (1, 0))), "not selected"),
        ("structured", lambda k: s.chunk(k, s.STATUS, s.status(7, (1, 0)), 0) * 2, "not selected"),
        ("structured", lambda k: s.chunk(k, s.STATUS, s.status(7, (0, 0))), "empty extent"),
        ("structured", lambda k: s.chunk(k, s.STATUS_EXT, s.status_ext(7, (1, 0))), "nobody"),
        ("structured", lambda k: s.chunk(k, s.DATA, s.data(0, b"x")), "nobody asked for"),
        ("extended", lambda k: s.wide(k, s.STATUS, s.status(7, (1, 0))), "nobody asked"),
        ("extended", lambda k: s.wide(k, s.STATUS_EXT, struct.pack(">IIQQ", 7, 9, 1, 0)), "misc"),
        ("structured", lambda k: struct.pack(">IHHQI", 0x668E33EF, 1, 5, k, 1 << 31), "long"),
    ],
)  # fmt: skip
def test_statuses_that_break_the_protocol(form: str, said: Said, words: str) -> None:
    machine = NbdClient(s.agreed(form))
    flight = Flight(7, [0], [1 << 20])
    machine.request(flight)
    with pytest.raises(PeerError, match=words):
        s.hear(machine, said(s.cookies(flight)[0]))


def test_a_read_in_too_many_parts() -> None:
    machine, flight = filled((0, 1 << 20))
    (cookie,) = s.cookies(flight)
    with pytest.raises(PeerError, match="too many parts"):
        for at in range(0, 1 << 20, 2):
            s.hear(machine, s.chunk(cookie, s.DATA, s.data(at, b"x"), flags=0))
    assert at < 10000


@given(st.data())
def test_replies_that_were_changed(data: st.DataObject) -> None:
    """Whatever is changed in good replies: an error of the protocol, or an answer; bytes beside
    the buffers never, and no more memory than a reply may take."""
    form = data.draw(st.sampled_from(FORMS))
    machine = NbdClient(s.agreed(form))
    flights = [s.reads((0, 64), (64, 200)), Flight(1, [0], [4], [b"abcd"])]
    if form != "simple":
        flights.append(Flight(7, [0], [4096]))
    said = b""
    for flight in flights:
        machine.request(flight)
        for cookie, offset, length in zip(
            s.cookies(flight), flight.offsets, flight.lengths, strict=True
        ):
            kind, body = {
                0: (s.DATA, s.data(offset, b"d" * length)),
                1: (s.NONE, b""),
                7: (s.STATUS, s.status(7, (4096, 3)))
                if form == "structured"
                else (s.STATUS_EXT, s.status_ext(7, (4096, 3))),
            }[flight.command]
            if form == "simple":
                said += s.simple(cookie, data=body[8:])
            elif form == "structured":
                said += s.chunk(cookie, kind, body)
            else:
                said += s.wide(cookie, kind, body, offset=offset)
    changed = bytearray(said)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    steps = data.draw(st.lists(st.integers(1, 300), max_size=6))
    try:
        answered = s.hear(machine, bytes(changed), steps)
        assert len(answered) + len(machine.flights) == len(flights)
    except PeerError as error:
        assert "breaks the protocol" in str(error)
    assert sum(map(len, machine.space())) <= BUFFER_SIZE + (16 << 20)


def test_memory_is_bounded() -> None:
    """A megabyte of promises for every byte that was sent takes none."""
    machine = NbdClient(s.agreed())
    flight = Flight(7, [0], [1 << 30])
    machine.request(flight)
    (cookie,) = s.cookies(flight)
    tracemalloc.start()
    try:
        for _ in range(60):
            s.hear(machine, s.chunk(cookie, s.ERROR, s.error(5, b"x" * 4096), flags=0))
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
