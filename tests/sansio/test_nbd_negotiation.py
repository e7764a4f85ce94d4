"""The client's handshake by bytes alone: what it asks, what it falls back to, what it refuses."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.errors import PeerError
from diskwright.wire import nbd_const as const
from diskwright.wire import nbd_negotiation
from diskwright.wire.nbd_handshake import Export
from diskwright.wire.nbd_listing import Listing
from diskwright.wire.nbd_negotiation import Negotiation
from diskwright.wire.nbd_server import NbdServer

from . import nbd_script as s

BASE = b"base:allocation"


def test_everything_is_asked_for_and_taken() -> None:
    negotiation = Negotiation(b"disk", contexts=[BASE])
    said, left = s.talk(
        negotiation,
        s.greeting()
        + s.rep(s.EXTENDED, s.ACK)
        + s.context(5)
        + s.rep(s.SET_META, s.ACK)
        + s.info(1, b"the disk")
        + s.info(2, b"of a test")
        + s.info(99, b"of the future")
        + s.blocks(512, 4096, 1 << 20)
        + s.export(1 << 30, s.HAS_FLAGS | s.FLUSH)
        + s.rep(s.GO, s.ACK)
        + b"more",
    )
    assert left == b"more"
    assert said[:4] == struct.pack(">I", 3)
    assert s.options(said) == [s.EXTENDED, s.SET_META, s.GO]
    agreed = negotiation.agreed
    assert agreed is not None
    assert agreed.size == 1 << 30 and agreed.flags == s.HAS_FLAGS | s.FLUSH
    assert (agreed.min_block, agreed.preferred_block, agreed.max_payload) == (512, 4096, 1 << 20)
    assert agreed.structured and agreed.extended and agreed.contexts == {5: BASE}
    assert (agreed.name, agreed.description) == (b"the disk", b"of a test")


def test_a_server_that_knows_nothing_but_names() -> None:
    """Every newer option is refused; the export is asked for by the oldest one."""
    negotiation = Negotiation(b"x", contexts=[BASE])
    said, left = s.talk(
        negotiation,
        s.greeting(1)
        + b"".join(s.rep(option, s.UNSUP, b"what?") for option in (s.EXTENDED, s.STRUCTURED, s.GO))
        + struct.pack(">QH", 4096, s.HAS_FLAGS)
        + bytes(124),
    )
    assert (left, s.options(said)) == (b"", [s.EXTENDED, s.STRUCTURED, s.GO, s.EXPORT_NAME])
    agreed = negotiation.agreed
    assert agreed is not None and agreed.size == 4096 and not agreed.structured
    assert not agreed.contexts and agreed.max_payload == 32 << 20


@pytest.mark.parametrize("padding", [0, 124])
def test_plain_newstyle(padding: int) -> None:
    negotiation = Negotiation(b"x")
    flags = 0 if padding else 2
    said, left = s.talk(
        negotiation, s.greeting(flags) + struct.pack(">QH", 4096, 1) + bytes(padding)
    )
    assert said[:4] == struct.pack(">I", flags)
    assert (left, s.options(said)) == (b"", [s.EXPORT_NAME])
    assert negotiation.agreed is not None and negotiation.agreed.style == "newstyle"


OLD = b"NBDMAGIC" + struct.pack(">QQHH", 0x420281861253, 8192, 0, s.HAS_FLAGS) + bytes(124)


def test_oldstyle() -> None:
    negotiation = Negotiation()
    assert s.talk(negotiation, OLD) == (b"", b"")
    assert negotiation.agreed is not None
    assert (negotiation.agreed.size, negotiation.agreed.style) == (8192, "oldstyle")
    with pytest.raises(PeerError, match="one export without a name, not 'x'"):
        s.talk(Negotiation(b"x"), OLD)
    with pytest.raises(PeerError, match="oldstyle NBD without it"):
        s.talk(Negotiation(secure=True), OLD)


def test_tls_comes_before_everything() -> None:
    """Not one byte behind the answer is taken before the connection is secure."""
    negotiation = Negotiation(b"x", secure=True)
    negotiation.take()
    for size in (16, 2):
        assert negotiation.wanted == size
        data = s.greeting()
        negotiation.received(data[:16] if size == 16 else data[16:])
    said = negotiation.take()
    assert s.options(said) == [s.STARTTLS]
    assert negotiation.wanted == 20
    negotiation.received(s.rep(s.STARTTLS, s.ACK))
    assert negotiation.upgrade and negotiation.wanted == 0 and not negotiation.take()
    negotiation.secured()
    assert s.options(b"...." + negotiation.take()) == [s.EXTENDED]


@pytest.mark.parametrize(
    ("secure", "answers", "number", "words"),
    [
        (True, s.rep(s.STARTTLS, s.UNSUP), errno.EACCES, "does not offer it"),
        (True, s.rep(s.STARTTLS, s.POLICY, b"no\n\x1b[2J"), errno.EACCES, "reported: no��"),
        (False, s.rep(s.EXTENDED, s.TLS_REQD), errno.EACCES, "requires TLS"),
        (False, s.rep(s.EXTENDED, s.SHUTDOWN), errno.ESHUTDOWN, "shutting down"),
    ],
)
def test_refusals(secure: bool, answers: bytes, number: int, words: str) -> None:
    with pytest.raises(PeerError) as raised:
        s.talk(Negotiation(b"x", secure=secure), s.greeting() + answers)
    assert raised.value.errno == number
    assert words in str(raised.value)


START = s.greeting() + s.rep(s.EXTENDED, s.UNSUP) + s.rep(s.STRUCTURED, s.ACK)
READY = START + s.context(1) + s.rep(s.SET_META, s.ACK)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "no NBD server"),
        (b"NBDMAGIC" + bytes(8), "style of NBD that nobody knows"),
        (s.greeting() + s.rep(s.EXTENDED, s.ACK, b"x"), "acknowledgement has data"),
        (s.greeting() + s.rep(s.EXTENDED, s.ACK, magic=1), "begins with 0x1"),
        (s.greeting() + s.rep(s.GO, s.ACK), "answers option 7 where 11 was asked"),
        (s.greeting() + s.rep(s.EXTENDED, s.INFO, b"xx") + s.rep(s.EXTENDED, s.ACK), "with data"),
        (START + struct.pack(">QIII", s.REP_MAGIC, s.SET_META, s.INFO, 1 << 31), "bytes long"),
        (START + s.context(1) * 2 + s.rep(s.SET_META, s.ACK), "unasked"),
        (START + s.context(1, b"qemu:x") + s.rep(s.SET_META, s.ACK), "unasked"),
        (START + s.rep(s.SET_META, s.CONTEXT, b"1") + s.rep(s.SET_META, s.ACK), "no metadata"),
        (START + s.context(1) * 300, "more than 256 times"),
        (READY + s.rep(s.GO, s.ACK), "size of the export"),
        (READY + s.rep(s.GO, s.SERVER, b"xx") + s.rep(s.GO, s.ACK), "no information"),
        (READY + s.info(0, b"short") + s.rep(s.GO, s.ACK), "size of the export"),
        (READY + s.export(1 << 63) + s.rep(s.GO, s.ACK), "more than anything can have"),
        (READY + s.rep(s.GO, s.UNKNOWN, b"none"), "not available\nserver reported: none"),
        (READY + s.export() + s.info(3, b"x") + s.rep(s.GO, s.ACK), "not three numbers"),
        (READY + s.export() + s.blocks(0, 512, 512) + s.rep(s.GO, s.ACK), "minimum block size"),
        (READY + s.export() + s.blocks(3, 512, 512) + s.rep(s.GO, s.ACK), "minimum block size"),
        (READY + s.export() + s.blocks(1 << 17, 1 << 17, 1 << 20) + s.rep(s.GO, s.ACK), "minimum"),
        (READY + s.export() + s.blocks(512, 256, 1024) + s.rep(s.GO, s.ACK), "preferred"),
        (READY + s.export() + s.blocks(512, 512, 511) + s.rep(s.GO, s.ACK), "maximum"),
        (READY + s.export(513) + s.blocks(512, 512, 512) + s.rep(s.GO, s.ACK), "no multiple"),
    ],
)
def test_what_breaks_the_protocol(answers: bytes, words: str) -> None:
    with pytest.raises(PeerError, match=words):
        s.talk(Negotiation(b"x", contexts=[BASE]), answers)


def test_listing() -> None:
    """Against our own server, and against ones that break their word."""
    exports = {name: Export(name, 12288, description=b"d") for name in (b"a", b"b")}
    listing = Listing()
    served(NbdServer(exports), listing)
    assert [row.name for row in listing.exports] == [b"a", b"b"]
    row = listing.exports[1]
    assert (row.size, row.description, row.extended, row.problem) == (12288, b"d", True, "")
    assert row.contexts == (BASE,) and len(row.blocks) == 3 and row.flags & s.HAS_FLAGS
    begun = s.greeting() + s.rep(s.EXTENDED, s.ACK)
    wrong = s.rep(s.LIST, s.SERVER, b"\0\0\1\0x") + s.rep(s.LIST, s.ACK)
    with pytest.raises(PeerError, match="longer than its reply"):
        s.talk(Listing(), begun + wrong)
    one = s.rep(s.LIST, s.SERVER, b"\0\0\0\1x") + s.rep(s.LIST, s.ACK)
    with pytest.raises(PeerError, match="size of an export"):
        s.talk(Listing(), begun + one + s.rep(const.OPT_INFO, s.ACK))
    lost = Listing()
    s.talk(lost, begun + one + s.rep(const.OPT_INFO, s.UNKNOWN))
    assert [(row.name, row.problem) for row in lost.exports] == [
        (b"x", "Requested export not available")
    ]
    with pytest.raises(PeerError, match="cannot list"):
        s.talk(Listing(), s.greeting(0))


def served(server: NbdServer, client: Negotiation) -> None:
    """Both machines, byte by byte."""
    while client.agreed is None:
        for byte in client.take():
            space = server.space()
            assert space is not None
            space[0] = byte
            server.received(1)
        answer = b"".join(server.take())
        while answer:
            wanted = client.wanted
            client.received(answer[:wanted])
            answer = answer[wanted:]


def test_our_own_server() -> None:
    server = NbdServer({b"disk": Export(b"disk", 12288, description=b"d", min_block=1)})
    client = Negotiation(b"disk", contexts=[BASE, b"qemu:allocation-depth"])
    served(server, client)
    assert client.agreed is not None and client.agreed.size == 12288
    assert client.agreed.contexts == {1: BASE}
    assert server.export is not None and server.mode == const.EXTENDED
    assert server.contexts == {1: BASE} and client.agreed.extended


@given(st.data())
def test_whatever_a_server_says(data: st.DataObject) -> None:
    """It ends in an agreement or in an error that says why, and little is kept."""
    kinds = [s.ACK, s.SERVER, s.INFO, s.CONTEXT, s.UNSUP, s.UNKNOWN, s.ERR | 77, 55]
    negotiation = Negotiation(b"x", contexts=[BASE], secure=data.draw(st.booleans()))
    option: int | str = 0
    said = s.greeting(data.draw(st.sampled_from([3, 3, 3, 1, 0, 2])))
    try:
        for _ in range(12):
            heard, _ = s.talk(negotiation, said)
            if negotiation.agreed is not None:
                return
            asked = s.options(heard if option == 0 else b"...." + heard)
            option = [number for number in asked if number != "TLS"][-1] if asked else option
            assert isinstance(option, int)
            assert negotiation.wanted <= nbd_negotiation.REPLY_LIMIT
            said = s.rep(
                option, data.draw(st.sampled_from(kinds)), data.draw(st.binary(max_size=40))
            )
    except PeerError as error:
        assert error.strerror
