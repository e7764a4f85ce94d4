"""Addresses of sockets: what is listened on, connected to and refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.errors import DiskError, UsageError
from diskwright.export.listening import descriptor_of
from diskwright.monitor.addresses import listen
from diskwright.monitor.chardev import chardev
from monitor.running import OURS, SOURCE, THEIRS, Client, daemon, needs_qsd, needs_unix
from nbd.serving import wait_for

pytestmark = needs_unix
linux = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
REACHED = "127.0.0.1", "::1"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def reachable(port: int) -> list[str]:
    """Where on this machine somebody listens on ``port``."""
    found = []
    for host in REACHED:
        try:
            socket.create_connection((host, port), 5).close()
        except OSError:
            continue
        found.append(host)
    return found


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that is in use, on both families."""
    with ExitStack() as stack:
        first = stack.enter_context(socket.socket())
        first.bind(("127.0.0.1", 0))
        first.listen()
        port: int = first.getsockname()[1]
        if has_ipv6():
            other = stack.enter_context(socket.socket(socket.AF_INET6))
            other.bind(("::1", port))
            other.listen()
        yield port


def inet(port: int | str = 0, host: str = "127.0.0.1", **more: Any) -> dict[str, Any]:
    return {"type": "inet", "host": host, "port": str(port), **more}


def ports(where: dict[str, Any]) -> list[int]:
    """Where that is listened, for a moment."""
    with ExitStack() as stack:
        found = [stack.enter_context(one) for one in listen(where).listeners]
        assert all(reachable(one.getsockname()[1]) for one in found)
        return [one.getsockname()[1] for one in found]


# -- listening
def test_the_first_free_port_of_a_range(taken: int) -> None:
    (found,) = ports(inet(taken, to=min(taken + 50, 65535)))
    assert taken < found <= taken + 50
    for last in (taken, 0):
        with pytest.raises(UsageError, match=r"available port: Address already|no port from"):
            listen(inet(taken, to=last))
    assert ports(inet(0, to=5))[0] > 5  # any
    if has_ipv6():  # a port must be free on all addresses
        low = {"host": "", "to": min(taken + 50, 65535)}
        assert {taken < one <= taken + 50 for one in ports(inet(taken, **low))} == {True}


@pytest.mark.skipif(not has_ipv6(), reason="IPv6 is switched off here")
@pytest.mark.parametrize(
    ("host", "wanted", "where"),
    [
        ("", {}, REACHED), ("", {"ipv4": True, "ipv6": True}, REACHED),
        ("", {"ipv4": True}, REACHED[:1]), ("", {"ipv6": False}, REACHED[:1]),
        ("", {"ipv6": True}, REACHED[1:]), ("", {"ipv4": False}, REACHED[1:]),
        ("::", {}, REACHED[1:]), ("::1", {"ipv6": True}, REACHED[1:]),
        ("0.0.0.0", {}, REACHED[:1]), ("127.0.0.1", {"numeric": True}, REACHED[:1]),
    ],
)  # fmt: skip
def test_families(host: str, wanted: dict[str, bool], where: tuple[str, ...]) -> None:
    with ExitStack() as stack:
        found = [stack.enter_context(one) for one in listen(inet(host=host, **wanted)).listeners]
        (port,) = {one.getsockname()[1] for one in found}
        assert reachable(port) == list(where)


@linux
def test_abstract_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"diskwright-test-{os.getpid()}"
    for tight, address in ((True, name), (False, name.ljust(107, "\0"))):
        with ExitStack() as stack:
            where = {"type": "unix", "path": name, "abstract": True, "tight": tight}
            found = listen(where)
            for one in found.listeners:
                stack.enter_context(one)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(b"\0" + address.encode())
            with pytest.raises(UsageError, match="Address already in use"):
                listen(where)
    assert found.path == "" and not list(tmp_path.iterdir())


SAME: list[dict[str, Any]] = [
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "keep-alive": True}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "numeric": True, "to": 9}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "ipv4": False, "ipv6": False}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "ipv6": True}},
    {"type": "inet", "data": {"host": "::1", "port": "0", "ipv6": False}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "to": 65536}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "to": -1}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "to": "5"}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "ipv4": "on"}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "more": 1}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "no-service"}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "-1"}},
    {"type": "inet", "data": {"host": "localhost", "port": "0", "numeric": True}},
    {"type": "inet", "data": {"host": "192.0.2.1", "port": "0"}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "TAKEN"}},
    {"type": "inet", "data": {"host": "127.0.0.1", "port": "TAKEN", "to": "TAKEN"}},
    {"type": "inet", "data": {"host": "127.0.0.1"}},
    {"type": "unix", "data": {"path": "here", "tight": False}},
    {"type": "unix", "data": {"path": "here", "abstract": False}},
    {"type": "unix", "data": {"path": "ABSTRACT", "abstract": True}},
    {"type": "unix", "data": {"path": "ABSTRACT", "abstract": True, "tight": False}},
    {"type": "unix", "data": {"path": "x" * 108, "abstract": True}},
    {"type": "unix", "data": {"path": "/no/where/at all"}},
]


@needs_qsd
@linux
def test_the_same_as_qemu_storage_daemon(tmp_path: Path, taken: int) -> None:
    abstract = f"diskwright-same-{os.getpid()}"
    words = {"TAKEN": str(taken), "ABSTRACT": abstract}

    def told(client: Client) -> list[Any]:
        found = []
        for addr in SAME:
            data = {key: words.get(one, one) for key, one in addr["data"].items()}
            if addr["data"].get("to") == "TAKEN":
                data["to"] = taken
            found.append(client.send("nbd-server-start", {"addr": {**addr, "data": data}}))
            if "return" in found[-1]:
                client.do("nbd-server-stop")
        return found

    with daemon(OURS, tmp_path) as (_, (ours,)), daemon(THEIRS, tmp_path) as (_, (theirs,)):
        assert told(ours) == told(theirs)
    assert not list(tmp_path.iterdir())


# -- what others left open
NAMED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.dup2(int(sys.argv[1]), 4)
os.execv(sys.executable, [sys.executable, "-m", "diskwright", *sys.argv[2:]])
"""


def test_sockets_by_number_and_by_name(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "LISTEN_FDNAMES": "first:second"}
    for name in ("4", "second"):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))  # who gets it listens
            disk = tmp_path / "disk"
            disk.write_bytes(bytes(512))
            words = [f"--blockdev=file,filename={disk},node-name=n"]
            words += [f"--nbd-server=addr.type=fd,addr.str={name}"]
            words += ["--export=nbd,id=e,node-name=n", "--pidfile", str(tmp_path / name)]
            process = subprocess.Popen(
                [sys.executable, "-c", NAMED, str(sock.fileno()), "daemon", *words],
                env=environment,
                pass_fds=[sock.fileno()],
            )  # fmt: skip
            port = sock.getsockname()[1]
        try:
            wait_for((tmp_path / name).exists, "the daemon")
            with diskwright.open(f"nbd://127.0.0.1:{port}/n", format="raw") as found:
                assert found.size == 512
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_what_is_no_inherited_socket(tmp_path: Path) -> None:
    with socket.socket() as own, open(tmp_path / "file", "w") as file, socket.socket() as used:
        os.set_inheritable(file.fileno(), True)
        used.bind(("127.0.0.1", 0))
        used.listen()
        with closing(socket.create_connection(used.getsockname())) as connected:
            os.set_inheritable(connected.fileno(), True)
            for number, why in (
                (own.fileno(), "was not inherited"), (file.fileno(), "is not a socket"),
                (4000, "is not a socket"), (connected.fileno(), "Failed to listen on fd socket"),
            ):  # fmt: skip
                with pytest.raises(UsageError, match=why):
                    listen({"type": "fd", "str": str(number)})
    for text in ("", "-1", "name", "1x"):
        with pytest.raises(UsageError, match="Unable to parse FD number"):
            listen({"type": "fd", "str": text})
    environment = {"LISTEN_PID": "7", "LISTEN_FDNAMES": "a:b"}
    assert descriptor_of("b", environment, 7) == 4
    with pytest.raises(UsageError):
        descriptor_of("b", environment, 8)


# -- monitors
def test_where_monitors_listen(taken: int) -> None:
    device = chardev(f"socket,id=a,host=127.0.0.1,port={taken},to={taken + 50},ipv4=on,server=on")
    assert device.listener is not None and device.listener.getsockname()[1] > taken
    device.close()
    for words, why in (
        ("path=a,host=b,port=1", "None or one of 'path', 'fd' or 'host'"),
        ("path=a,fd=1", "None or one of"), ("host=a", "no port given"), ("port=1", "is required"),
        (f"host=127.0.0.1,port={taken}", "Failed to find an available port"),
        ("path=a,ipv4=on", "Invalid parameter 'ipv4'"),
        ("host=localhost,port=0,keep-alive=on", "Invalid parameter 'keep-alive'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            chardev(f"socket,id=a,{words},server=on")


# -- connecting
@linux
def test_clients_of_all_kinds(tmp_path: Path) -> None:
    name = f"diskwright-client-{os.getpid()}"
    with daemon(OURS, tmp_path) as (_, (client,)):
        client.do("blockdev-add", driver="null-co", node_name="n", size=4096, read_zeroes=True)

        def offered(kind: str, **data: Any) -> None:
            client.do("nbd-server-start", addr={"type": kind, "data": data})
            client.do("block-export-add", type="nbd", id="e", node_name="n")

        def opened(**server: Any) -> None:
            with diskwright.open({"driver": "nbd", "export": "n", "server": server}) as found:
                assert found.read_at(0, 4096) == bytes(4096)

        def named(**server: Any) -> str:
            opened(**server)
            found = diskwright.info({"driver": "nbd", "export": "n", "server": server})
            return found.filename

        for tight in (True, False):
            offered("unix", path=name, abstract=True, tight=tight)
            told = named(type="unix", path=name, abstract=True, tight=tight)
            assert told.startswith("json:") and '"server.abstract": true' in told
            for other in ({}, {"abstract": True, "tight": not tight}):
                with pytest.raises(DiskError, match="Failed to connect"):
                    opened(type="unix", path=name, **other)
            client.do("nbd-server-stop")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        offered("inet", host="localhost", port=str(port), ipv4=True, **{"keep-alive": False})
        where = {"type": "inet", "host": "localhost", "port": str(port)}
        assert (
            named(**where, **{"keep-alive": False, "mptcp": False}) == f"nbd://localhost:{port}/n"
        )
        assert '"server.port": "' in named(**where, ipv4=True, to=65535)
        for wrong in ({"ipv4": False}, {"numeric": True}):
            with pytest.raises(DiskError, match=r"address resolution failed|Failed to connect"):
                opened(**where, **wrong)
        for wrong in ({"ipv4": False, "ipv6": False}, {"to": 1 << 16}, {"path": "x"}):
            with pytest.raises(UsageError):
                opened(**where, **wrong)
        sock = socket.create_connection(("127.0.0.1", port))
        number = sock.detach()
        with pytest.raises(UsageError, match="was not inherited"):
            opened(type="fd", str=str(number))
        os.set_inheritable(number, True)
        opened(type="fd", str=str(number))
        with pytest.raises(UsageError, match=r"is not a socket|was not inherited"):
            opened(type="fd", str=str(number))
