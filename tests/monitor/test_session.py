"""The QMP session by bytes alone.  Texts were measured with qemu-storage-daemon 10.0."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diskwright.wire.qjson import DEPTH_LIMIT, JsonError, Messages, loads
from diskwright.wire.qmp import QmpSession, Request

VALUE = "JSON parse error, expecting value"

REFUSED = {
    b'{"execute":"a","x":3}': ["QMP input member 'x' is unexpected"],
    b'{"execute":"a","arguments":3}': ["QMP input member 'arguments' must be an object"],
    b'{"execute":3}': ["QMP input member 'execute' must be a string"],
    b'{"execute":"a","exec-oob":"b"}': ["QMP input member 'execute' clashes with 'exec-oob'"],
    b'{"id":3}': ["QMP input lacks member 'execute'"],
    b"3 ": ["QMP input must be a JSON object"],
    b'"x"': ["QMP input must be a JSON object"],
    b"[1]": ["QMP input must be a JSON object"],
    b"null\n": ["QMP input must be a JSON object"],
    b'{"execute" "x"}': ["JSON parse error, missing : in object pair"],
    b"}": [VALUE],
    b"]}": [VALUE, VALUE],
    b"foo\n": ["JSON parse error, invalid keyword 'foo'"],
    b'{"execute":foo}': ["JSON parse error, invalid keyword 'foo'"],
    b"\xff ": ["JSON parse error, stray '\ufffd'"],
    b'{"execute":"a"\xff\n': ["JSON parse error, stray '\ufffd'"],
    b'{"execute":"a","id":"\xff"}': ["JSON parse error, stray '\"\ufffd'", VALUE],
    b'{"execute":"a","id":"a\nb"}': ["JSON parse error, stray '\"a\n'", VALUE],
    b"@@@ ": ["JSON parse error, stray '@'"],
    b'{"execute":"a",}': [VALUE],
    b"[1,,]": [VALUE],
    b'{"a":1 2}': ["JSON parse error, expected separator in dict"],
    b"[1 2]": ["JSON parse error, expected separator in list"],
    b'{"execute":"a","execute":"b"}': ["JSON parse error, duplicate key"],
    b'{"id":"a\\qb"}': ["JSON parse error, invalid escape sequence in string"],
    b'{"id":1e400}': ["JSON parse error, number out of range"],
    b'{"id":NaN}': ["JSON parse error, invalid keyword 'NaN'"],
}


def session() -> QmpSession:
    made = QmpSession({"qemu": {}, "package": ""})
    made.negotiated = frozenset({"oob"})
    return made


def texts(requests: list[Request]) -> list[str]:
    return [one.fault.text if one.fault else f"<{one.command}>" for one in requests]


@pytest.mark.parametrize("sent", REFUSED, ids=repr)
def test_refused_in_qemus_words_and_goes_on(sent: bytes) -> None:
    follow = b'{"execute":"next","id":[1]}\n'
    found = list(session().receive(sent + follow))
    assert texts(found) == [*REFUSED[sent], "<next>"]
    one = session()
    by_byte = [request for byte in sent + follow for request in one.receive(bytes([byte]))]
    assert by_byte == found


def test_ids_of_any_kind_come_back() -> None:
    for id in (None, 0, "a", {"a": [1, None]}, [], False, 1.5):
        one = session()
        (request,) = one.receive(json.dumps({"execute": "a", "id": id}).encode())
        assert json.loads(one.reply(request, {})) == {"return": {}, "id": id}
    (request,) = session().receive(b"{'execute':'a', 'id':'it\\'s \"x\"'}")
    assert request.id == ('it\'s "x"',)
    (request,) = session().receive(b'{"execute":"a"}')
    assert b"id" not in session().reply(request, {})


def test_before_and_after_the_negotiation() -> None:
    one = QmpSession({"qemu": {}, "package": ""})
    assert json.loads(one.greeting())["QMP"]["capabilities"] == ["oob"]
    (request,) = one.receive(b'{"execute":"quit"}')
    refusal = one.refusal(request)
    assert refusal is not None and refusal.kind == "CommandNotFound"
    (request,) = one.receive(b'{"exec-oob":"a"}')
    assert request.fault is not None and "'exec-oob' is unexpected" in request.fault.text
    assert one.event("X", {}, 0) == b""
    (request,) = one.receive(b'{"execute":"qmp_capabilities"}')
    assert one.refusal(request) is None
    one.negotiated = frozenset()
    refusal = one.refusal(request)
    assert refusal is not None and "already complete" in refusal.text
    assert json.loads(one.event("X", {"a": 1}, 1_500_000)) == {
        "timestamp": {"seconds": 1, "microseconds": 500_000},
        "event": "X",
        "data": {"a": 1},
    }


def test_bounds() -> None:
    one = Messages(limit=100)
    assert texts_of(one, b'{"a":"' + b"x" * 200) == ["JSON token size limit exceeded"]
    assert one.held == 0
    assert texts_of(one, b'\xff{"a":1}')[-1] == "{'a': 1}"
    deep = b"[" * (DEPTH_LIMIT + 1)
    assert texts_of(Messages(), deep) == ["JSON token nesting depth limit exceeded"]
    with pytest.raises(JsonError):
        loads("[" * 100_000)
    assert loads("18446744073709551615") == (1 << 64) - 1
    assert isinstance(loads("18446744073709551616"), float)
    with pytest.raises(JsonError):
        loads("1" * 5000)


def texts_of(messages: Messages, data: bytes) -> list[str]:
    return [str(found) for found in messages.feed(data)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*b"{}[]:,\"'\\ \n1ea\x00\xff\x80"]), max_size=60), st.integers())
def test_hostile_bytes(data: list[int], seed: int) -> None:
    """Whatever comes, however it is cut: no exception, the same result, and after the byte that
    no JSON has, a command is understood."""
    chance = random.Random(seed)
    sent = bytes(data)
    whole, pieces = session(), session()
    found = texts(list(whole.receive(sent)))
    cut: list[str] = []
    at = 0
    while at < len(sent):
        end = at + chance.randint(1, 9)
        cut += texts(list(pieces.receive(sent[at:end])))
        at = end
    assert cut == found
    assert texts(list(whole.receive(b'\xff{"execute":"next"}')))[-1] == "<next>"
