"""The shell of ``qmp``: its language, its scripts, at a terminal, and servers that mean no good."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from cli.support import ours
from console.serving import GREETING, both, line, says, served
from diskwright.console.connection import Connection, TimedOut, connect
from diskwright.console.language import complete, parse, words
from diskwright.console.schema import Schema
from diskwright.console.shell import Shell, history_path, secret
from diskwright.errors import PeerError, UsageError
from diskwright.monitor import all_commands, introspect
from diskwright.wire.qmp_client import QmpClient
from monitor.running import OURS, SOURCE, needs_unix

pytestmark = needs_unix


@pytest.fixture(scope="module")
def schema() -> Schema:
    all_commands()
    return Schema(json.loads(json.dumps(introspect.schema())))


# -- messages
def test_messages_in_any_pieces_and_indented() -> None:
    value = {"return": [{"a": "}\n{"}, {}], "id": 3}
    data = line(GREETING) + b"\r\n" + json.dumps(value, indent=4).encode() + b"\r\n" + line(value)
    for size in (1, 7, len(data)):
        machine = QmpClient()
        found = []
        for at in range(0, len(data), size):
            found += machine.receive(data[at : at + size])
        assert found == [GREETING, value, value]


def test_messages_are_bounded() -> None:
    deep = b'{"a":' + b"[" * 300 + b"]" * 300 + b"}\n"
    deeper = b'{"a":' + b"[" * 100_000 + b"\n"
    for bad in (deep, deeper, b"SSH-2.0-x\n", b"[1]\n", b"\xff\n", b"{" + b"\n" * 99):
        with pytest.raises(PeerError):
            list(QmpClient(limit=90).receive(bad))
    flat = {"return": [{"a": [1]}] * 200}
    assert list(QmpClient().receive(line(flat))) == [flat]


# -- the language
@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ("query-block-exports", "query-block-exports", None),
        ("block_resize node-name=disk size=64M", "block_resize",
         {"node-name": "disk", "size": 64 << 20}),
        ("block_resize node-name=0x size=0x10", "block_resize", {"node-name": "0x", "size": 16}),
        ('blockdev-del node-name="a \\"b\\""', "blockdev-del", {"node-name": 'a "b"'}),
        ("blockdev-del node-name='a b'", "blockdev-del", {"node-name": "a b"}),
        ('blockdev-del {"node-name": "a b"}', "blockdev-del", {"node-name": "a b"}),
        ("blockdev-add driver=qcow2 node-name=n read-only=on file.driver=file file.filename=1",
         "blockdev-add",
         {"driver": "qcow2", "node-name": "n", "read-only": True,
          "file": {"driver": "file", "filename": "1"}}),
        ("blockdev-add driver=qcow2 file=below backing=null", "blockdev-add",
         {"driver": "qcow2", "file": "below", "backing": None}),
        ('blockdev-add driver=qcow2 file={"driver": "file", "filename": "x y"}', "blockdev-add",
         {"driver": "qcow2", "file": {"driver": "file", "filename": "x y"}}),
        ("block-dirty-bitmap-merge node=n target=t bitmaps=a,b", "block-dirty-bitmap-merge",
         {"node": "n", "target": "t", "bitmaps": ["a", "b"]}),
        ("block-dirty-bitmap-merge node=n target=t bitmaps.1=b bitmaps.0.node=m bitmaps.0.name=a",
         "block-dirty-bitmap-merge",
         {"node": "n", "target": "t", "bitmaps": [{"node": "m", "name": "a"}, "b"]}),
        ("unheard-of a=1 b=x c=true d.e=[1, 2]", "unheard-of",
         {"a": 1, "b": "x", "c": True, "d": {"e": [1, 2]}}),
        ('block_resize more=3 size=1', "block_resize", {"more": 3, "size": 1}),
    ],
)  # fmt: skip
def test_lines(schema: Schema, text: str, name: str, arguments: Any) -> None:
    found = parse(text, schema)
    assert found.pop("execute") == name
    assert found == ({} if arguments is None else {"arguments": arguments})


@pytest.mark.parametrize(
    "text",
    [
        "block_resize size=1.5", "block_resize 3", "block_resize size=", "block_resize =3",
        "blockdev-add read-only=perhaps", "blockdev-del node-name=a node-name=b",
        "blockdev-add file=x file.driver=y", "blockdev-add {", "{", "{3}",
        "blockdev-add " + "a." * 50 + "b=1", "block-dirty-bitmap-merge bitmaps.1=a",
        "block_resize size=" + "9" * 5000, 'x a={"b": ' + "[" * 100_000,
    ],
)  # fmt: skip
def test_lines_that_mean_nothing(schema: Schema, text: str) -> None:
    with pytest.raises(UsageError):
        parse(text, schema)


def test_a_whole_message_goes_as_it_is(schema: Schema) -> None:
    assert parse(' {"exec-oob": "x", "id": [3]} ', schema) == {"exec-oob": "x", "id": [3]}
    assert words("a 'b c") == ["a", "'b c"]


def test_completion(schema: Schema) -> None:
    def known(command: str, member: str) -> list[str]:
        return ["disk"] if member == "node-name" else []

    def ends(text: str) -> list[str]:
        return complete(text, schema, ["exit", "help"], known)

    assert ends("block-export-a") == ["block-export-add"]
    assert {"exit", "help", "quit"} <= set(ends(""))
    assert "exit" not in ends("help ") and "quit" in ends("help ")
    assert ends("block-export-add type=") == ["type=fuse", "type=nbd"]
    assert "mountpoint=" not in ends("block-export-add ")
    assert "mountpoint=" in ends("block-export-add type=fuse ")
    assert ends("block-export-add writab") == ["writable="]
    assert ends("block-export-add writable=") == ["writable=off", "writable=on"]
    assert ends("block-export-add node-name=d") == ["node-name=disk"]
    assert ends("blockdev-add driver=qcow2 fi") == ["file.", "file="]
    assert ends("blockdev-add driver=qcow2 file.driver=fi") == ["file.driver=file"]
    assert ends("blockdev-add driver=qcow2 file.driver=file file.fi") == ["file.filename="]
    assert ends("blockdev-add cache.") == ["cache.direct=", "cache.no-flush="]
    assert ends("wait JOB") == ["JOB_STATUS_CHANGE"]
    assert "status=aborting" in ends("wait JOB_STATUS_CHANGE status=a")
    assert ends("nothing x=") == ends("block-export-add x y") == ends("blockdev-add a.b.c=") == []


def test_schemas_that_make_no_sense() -> None:
    for entries in (None, 3, [3, {}, {"name": 3}], [{"name": "a", "meta-type": "command"}]):
        assert not Schema(entries).members("a") and Schema(entries).kind("a") == "value"
    endless = Schema(
        [
            {"name": "c", "meta-type": "command", "arg-type": "o", "ret-type": "l", "features": 3},
            {"name": "l", "meta-type": "array", "element-type": "l"},
            {"name": "o", "meta-type": "object", "tag": "t", "members": [
                {"name": "o", "type": "o"}, {"name": "a", "type": "a"}, {"name": "l", "type": "l"},
                {"name": "t", "type": "o"}, {"name": 3}, 3],
             "variants": [{"case": "x", "type": "o"}, {"case": 3}]},
            {"name": "a", "meta-type": "alternate", "members": [{"type": "a"}, {"type": "o"}]},
        ]
    )  # fmt: skip
    assert endless.help("c", {"o": {"o": {"o": {"t": {}}}}})
    assert parse("c o.o.o.t=x a=y", endless)
    with pytest.raises(UsageError):
        parse("c l=x", endless)
    assert complete("c o.o.o.", endless) and not complete("c a=", endless)


# -- scripts
@both
def test_scripts(argv: list[str], tmp_path: Path) -> None:
    with served(argv, tmp_path) as (path, _):
        done = ours("qmp", path, "-c", "query-block-exports", "-c",
                    '{"execute": "query-version", "id": "x"}', name="diskwright")  # fmt: skip
        first, second = map(json.loads, done.out.splitlines())
        assert not done.status and first["return"][0]["node-name"] == "disk"
        assert second["id"] == "x"

        failing = ["-c", "block-export-del id=none", "-c", "query-jobs"]
        done = ours("qmp", path, *failing, name="diskwright")
        assert done.status == 1 and b'"class": "GenericError"' in done.out
        assert done.out.count(b"\n") == 1
        done = ours("qmp", path, "--keep-going", *failing, name="diskwright")
        assert done.status == 1 and json.loads(done.out.splitlines()[1]) == {"return": []}

        script = b"block-export-del id=e\nwait BLOCK_EXPORT_DELETED id=e\n\n# a remark\nexit\nx\n"
        command = [sys.executable, "-m", "diskwright", "qmp", path, "--timeout", "20"]
        run = subprocess.run(
            command, input=script, capture_output=True, env={**os.environ, "PYTHONPATH": SOURCE}
        )
        found = [json.loads(one) for one in run.stdout.splitlines()]
        assert run.returncode == 0 and found[0] == {"return": {}}
        assert found[1]["event"] == "BLOCK_EXPORT_DELETED" and len(found) == 2

        done = ours("qmp", path, "-p", "-c", "help", "-c", "help blockdev-add driver=qcow2",
                    "-c", "help query-block-exports", "-c", "help wait", "-c", "query-jobs",
                    name="diskwright")  # fmt: skip
        text = done.out.decode()
        assert "lazy-refcounts" in text and "Returns (a list):" in text and text.endswith("[]\n")


def test_no_server_and_servers_that_are_busy(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    done = ours("qmp", path, "-c", "x", name="diskwright")
    assert done.status == 1 and b"Could not connect" in done.err and done.err.count(b"\n") == 1
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diskwright.console.connection.GREETING_SECONDS", 0.05)
            done = ours("qmp", path, "-c", "x", name="diskwright")
    assert done.status == 1 and b"another client" in done.err
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        connect(f"localhost:{port}").close()
    for address in (f"127.0.0.1:{port}", f"[::1]:{port}", "x:99999", f"unix:{path}2"):
        with pytest.raises(PeerError):
            connect(address)
    for words_ in (["qmp"], ["qmp", "a", "b"], ["qmp", "--timeout", "x", "a"]):
        assert ours(*words_, name="diskwright").status == 1


def test_servers_that_mean_no_good() -> None:
    def run(*answers: bytes) -> str:
        out: list[str] = []
        with says(*answers) as sock:
            shell = Shell(sock, out.append, pretty=True, timeout=20)
            try:
                shell.script(["query-x"], False)
            finally:
                shell.close()
        return "".join(out)

    error = {"error": {"class": "\x1b[2J", "desc": "no\x1b]0;x\x07"}}
    assert run(line(error)) == "\\x1b[2J: no\\x1b]0;x\\x07\n"
    assert run(line({"return": "\x1b[2J", "id": 2})) == '"\\u001b[2J"\n'
    assert "unknown error" in run(line({"error": 3}))
    for bad in (b"", b"{\n", line({"return": 1, "id": 9}), line([]), b"\x00\n",
                line({"return": {}, "id": 77}) * 200):  # fmt: skip
        with pytest.raises(PeerError):
            run(bad)
    with says() as sock, pytest.raises(TimedOut):
        connection = Connection(sock, timeout=0.05)
        try:
            connection.wait(lambda event: True)
        except PeerError as ended:  # the server may be faster
            raise TimedOut(str(ended)) from ended
        finally:
            connection.close()


def test_events_are_shown_as_they_come() -> None:
    event = {"event": "E\x07", "data": {"a": "\x1b"}, "timestamp": {"seconds": "x"}}
    shown = threading.Event()
    out: list[str] = []

    def hear(text: str) -> None:
        out.append(text)
        shown.set()

    with says(line(event) + line({"return": {}, "id": 2})) as sock:
        shell = Shell(sock, hear, pretty=True, events=True, timeout=20)
        shell.script(["x"], False)
        assert shown.wait(20)
        shell.close()
    assert '[--:--:--] E\\x07 {"a": "\\u001b"}\n' in out


def test_at_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    state = tmp_path / "state"
    with served(OURS, tmp_path) as (path, _):
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "XDG_STATE_HOME": str(state)}
        environment |= {"TERM": "xterm", "COLUMNS": "80"}
        command = [sys.executable, "-m", "diskwright", "qmp", path]
        master, slave = pty.openpty()
        process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        text = b""

        def until(mark: bytes) -> None:
            nonlocal text
            while mark not in text:
                text += os.read(master, 4096)
            text = text[text.index(mark) + len(mark) :]

        try:
            until(b"qmp> ")
            os.write(master, b"block-export-d\tid=\thard\t\x15")  # ^U: it was only tried
            os.write(master, b" object-add secret\n")
            until(b"expecting key=value")
            os.write(master, b"block-export-del id=\t\n")
            until(b"BLOCK_EXPORT_DELETED")
            until(b"{}")
            until(b"qmp> ")
            os.write(master, b"\x04")
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
            os.close(master)
    kept = (state / "diskwright" / "qmp_history").read_text()
    assert "block-export-del id=e" in kept and "object-add" not in kept
    assert (state / "diskwright" / "qmp_history").stat().st_mode & 0o777 == 0o600


def test_what_history_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert secret(" x") and secret("object-add qom-type=secret data=x") and not secret("query-jobs")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_path() == Path("/state/diskwright/qmp_history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_path() is None
