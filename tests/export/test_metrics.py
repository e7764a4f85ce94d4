"""Metrics: read by a strict parser of the text format 0.0.4; HTTP, among hostile clients."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from console.serving import served
from diskwright.engine.kernel import Driver
from diskwright.errors import UsageError
from diskwright.export import metrics_server
from diskwright.export.metrics import TYPE, Family, process, text
from diskwright.export.metrics_server import CLIENTS, MetricsServer
from diskwright.wire.http import HEAD_LIMIT, HttpServer, Request, response
from monitor.running import OURS, SOURCE, needs_unix

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
SAMPLE = re.compile(rf"({NAME})(?:{{((?:{LABEL},)*(?:{LABEL})?)}})? (\S+)")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?([eE][+-]?\d+)?|Inf)|NaN")

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(exposition: bytes) -> Values:
    """Samples by name and labels; held to what the format asks for and the conventions say."""
    lines = exposition.decode("utf-8").split("\n")
    assert lines.pop() == "", "the last line has no end"
    found: Values = {}
    seen: set[str] = set()
    name = kind = ""
    while lines:
        line = lines.pop(0)
        if line.startswith("# HELP "):
            name, _, help = line[7:].partition(" ")
            assert re.fullmatch(NAME, name) and name not in seen, name
            assert help and not re.search(r"\\[^\\n]", help.replace("\\\\", ""))
            seen.add(name)
            typed = lines.pop(0)
            assert typed.startswith(f"# TYPE {name} "), typed
            kind = typed.rpartition(" ")[2]
            assert kind in ("counter", "gauge")
            assert name.endswith("_total") == (kind == "counter"), name
            assert lines and lines[0].startswith(name), "a metric without samples"
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None and match[1] == name, line
        assert NUMBER.fullmatch(match[7]), line
        labels = [(m[1], unescaped(m[2])) for m in re.finditer(LABEL, match[2] or "")]
        assert len(dict(labels)) == len(labels), line
        key = name, frozenset(labels)
        assert key not in found, "twice the same"
        found[key] = float(match[7])
        assert kind == "gauge" or found[key] >= 0
    return found


def unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], value)


def value(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset(labels.items())]


def test_labels_and_help_are_escaped() -> None:
    odd = 'a"b\\c\nd\x07é\udcff,x="y"}'
    families = [Family("x_bytes", "gauge", "a\\b\nc", [({"n": odd}, 1), ({"n": ""}, 1e-9)]),
                Family("none_total", "counter", "No samples.", [])]  # fmt: skip
    found = parsed(text(families))
    assert value(found, "x_bytes", n=odd.replace("\udcff", "?")) == 1 and len(found) == 2
    assert b'\\"b\\\\c\\nd' in text(families)
    names = {name for name, _ in parsed(text(process()))}
    assert {"diskwright_build_info", "process_cpu_seconds_total"} <= names


# -- HTTP
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Request(200, "GET", "/metrics")),
        (b"HEAD /metrics?x=1 HTTP/1.0\n\n", Request(200, "HEAD", "/metrics")),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", Request(405, "POST")),
        (b"GET / HTTP/2.0\r\n\r\n", Request(400)),
        (b"GET  / HTTP/1.1\r\n\r\n", Request(400)),
        (b"\x16\x03\x01\r\n\r\n", Request(400)),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", Request(400)),
        (b"\r\n\r\n", Request(400)),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2000, Request(431)),
        (b"a" * (HEAD_LIMIT + 1), Request(431)),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", None),
    ],
)
def test_requests(data: bytes, expected: Request | None) -> None:
    assert HttpServer().receive(data) == expected
    machine, found = HttpServer(), None
    for i in range(0, len(data), 7):
        found = found or machine.receive(data[i : i + 7])
    assert found == expected


def test_responses() -> None:
    head, _, body = response(Request(200), b"x\n", TYPE).partition(b"\r\n\r\n")
    assert body == b"x\n" and b"Content-Length: 2" in head and TYPE.encode() in head
    assert response(Request(200, "HEAD"), b"x\n").endswith(b"\r\n\r\n")
    assert b"Allow: GET, HEAD" in response(Request(405), b"")


def run(scenario: Callable[[Driver, MetricsServer, str], Coroutine[Any, Any, None]]) -> None:
    driver = Driver()
    server = MetricsServer(driver, process)

    async def whole() -> None:
        (listener, *_) = server.listen("0")
        try:
            await scenario(driver, server, listener.getsockname()[:2])
        finally:
            await server.close()

    try:
        driver.run(whole())
    finally:
        driver.close()
    assert not server._inside


async def talked(driver: Driver, where: Any, data: bytes) -> bytes:
    """What comes back for ``data``, until the connection is closed."""
    with socket.create_connection(where) as sock:
        sock.sendall(data)
        sock.setblocking(False)
        found = b""
        while True:
            await driver.readable(sock.fileno())
            try:
                piece = sock.recv(65536)
            except ConnectionResetError:
                piece = b""
            if not piece:
                driver.forget(sock.fileno())
                return found
            found += piece


def test_a_server_among_hostile_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(driver: Driver, server: MetricsServer, where: Any) -> None:
        monkeypatch.setattr(metrics_server, "REQUEST_SECONDS", 0.05)
        idle = [socket.create_connection(where) for _ in range(2 * CLIENTS)]
        for sock in idle[::2]:
            sock.sendall(b"GET /metr")
        found = await talked(driver, where, b"GET /metrics HTTP/1.1\r\n\r\n")
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and TYPE.encode() in head
        assert parsed(body)
        monkeypatch.setattr(metrics_server, "REQUEST_SECONDS", 20)
        for data, status in (
            (b"\x00" * 100_000, b"431"), (b"PUT / HTTP/1.1\r\n\r\n" + b"x" * 9999, b"405"),
            (b"GET /x HTTP/1.1\r\n\r\n", b"404"), (b"GET / HTTP/1.1\r\n\r\n", b"200"),
            (b"\r\n\r\n", b"400"),
        ):  # fmt: skip
            assert (await talked(driver, where, data))[9:12] in (status, b"")
        assert server.admitted == 2 * CLIENTS + 6
        late = socket.create_connection(where)  # the server ends although it says nothing
        while server.admitted < 2 * CLIENTS + 7:
            await driver.turn()
        for sock in (*idle, late):
            sock.close()

    run(scenario)


def test_addresses(tmp_path: Path) -> None:
    server = MetricsServer(Driver(), process)
    for bad in ("x", "host:", "1:2:3", "70000", "[::1:80", "localhost:http", "unix:/nowhere/x"):
        with pytest.raises(UsageError):
            server.listen(bad)
    done = ours("daemon", "--metrics", "x:y", name="diskwright")
    assert done.status == 1 and b"--metrics x:y" in done.err


# -- daemon and serve
def scraped(path: Path) -> Values:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        found = b""
        while piece := sock.recv(65536):
            found += piece
    return parsed(found.partition(b"\r\n\r\n")[2])


def used(uri: str) -> None:
    with diskwright.open(uri, format="raw", writable=True) as disk:
        disk.write_at(4096, b"x" * 8192)
        disk.flush()
        assert disk.read_at(4096, 4096) == b"x" * 4096


@needs_unix
def test_of_a_daemon(tmp_path: Path) -> None:
    with served([*OURS, "--metrics", "unix:metrics"], tmp_path) as (_, client):
        used(f"nbd+unix:///disk?socket={tmp_path}/nbd.sock")
        of = {"export": "e", "node": "disk"}
        found = scraped(tmp_path / "metrics")
        assert value(found, "diskwright_export_bytes_total", operation="write", **of) == 8192
        assert value(found, "diskwright_export_bytes_total", operation="read", **of) >= 4096
        assert value(found, "diskwright_export_operations_total", operation="flush", **of) >= 1
        assert value(found, "diskwright_export_errors_total", operation="write", **of) == 0
        took = value(found, "diskwright_export_duration_seconds_total", operation="write", **of)
        assert 0 < took < 60
        assert value(found, "diskwright_nbd_accepted_total") >= 1
        assert value(found, "diskwright_nbd_buffer_limit_bytes") == 512 << 20
        assert value(found, "diskwright_nbd_buffer_peak_bytes") > 0
        assert value(found, "diskwright_node_size_bytes", node="disk", driver="qcow2") == 64 << 20
        # What an export asked is remembered by its node.
        client.do("block-export-del", id="e", mode="hard")
        found = scraped(tmp_path / "metrics")
        on = {"node": "disk", "driver": "qcow2"}
        assert value(found, "diskwright_node_bytes_total", operation="write", **on) == 8192
        assert not any(name.startswith("diskwright_export_") for name, _ in found)
        client.do("blockdev-create", job_id="j",
                  options={"driver": "file", "filename": "new", "size": 65536})  # fmt: skip
        while client.do("query-jobs")[0]["status"] != "concluded":
            time.sleep(0.01)
        found = scraped(tmp_path / "metrics")
        for name in ("progress", "progress_end"):
            assert value(found, f"diskwright_job_{name}", job="j", type="create") >= 1
    assert not (tmp_path / "metrics").exists()


@needs_unix
def test_of_serve(tmp_path: Path) -> None:
    diskwright.create(tmp_path / "disk.qcow2", format="qcow2", size=1 << 20)
    command = [sys.executable, "-m", "diskwright", "serve", "-t", "-k", "nbd", "-x", "a b"]
    command += ["--metrics", "unix:metrics", "disk.qcow2"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process_:
        try:
            end = time.monotonic() + 30
            while not ((tmp_path / "metrics").exists() and (tmp_path / "nbd").exists()):
                assert process_.poll() is None and time.monotonic() < end
                time.sleep(0.02)
            used(f"nbd+unix:///a%20b?socket={tmp_path}/nbd")
            found = scraped(tmp_path / "metrics")
        finally:
            process_.terminate()
        assert process_.wait(20) == 0
    (written,) = (
        one for (name, labels), one in found.items()
        if name == "diskwright_export_bytes_total" and ("operation", "write") in labels
        and ("export", "a b") in labels
    )  # fmt: skip
    assert written == 8192
    assert not (tmp_path / "metrics").exists()
