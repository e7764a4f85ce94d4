"""``serve`` of several images, in one process and in several."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

import diskwright
from diskwright.engine.kernel import Driver
from diskwright.errors import PeerError
from diskwright.export import metrics_workers
from diskwright.export.metrics_workers import WorkersMetrics
from diskwright.export.nbd_front import Front, Worker
from export.test_metrics import scraped, value
from nbd.peer import Client
from nbd.serving import Serve, wait_for
from nbd.test_serve import need, run
from nbd.test_serve_modes import MIB, disk


def several(folder: Path, *options: str) -> tuple[Serve, list[Path]]:
    """A server of three images, in one process or several."""
    images = [disk(folder / name, name.encode()) for name in "abc"]
    return Serve(images[2], "-t", *options, *map(str, images[:2])), images


def children(server: Serve) -> list[int]:
    """The processes of the workers, in their order."""
    pid = server.process.pid
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_several_images(tmp_path: Path, workers: str) -> None:
    need("nbdinfo", "qemu-io")
    server, images = several(tmp_path, "--workers", workers)
    listed = run("nbdinfo", "--list", server.uri)
    assert listed.count('export="') == 3
    clients = [Client(str(server.socket), name=name.encode()) for name in "abc"]
    for client, image in zip(clients, images, strict=True):
        assert client.read(0, 8) == image.name.encode() * 8
        client.write(0, b"x" * 8192)
    for name in "abc":  # extended headers, contexts
        uri = server.uri.replace("///", f"///{name}")
        run("qemu-io", "-f", "raw", "-c", "read -P 120 0 8k", "-c", "write -z 0 4k", uri)
    for client in clients:
        assert client.read(0, 4097) == bytes(4096) + b"x"
        client.close()
    assert server.end() == (0, "")
    for image in images:
        assert image.read_bytes()[4096:8193] == b"x" * 4096 + image.name.encode()


def test_a_worker_dies(tmp_path: Path) -> None:
    """Its exports are gone, the others go on, and the status tells."""
    server, _ = several(tmp_path, "--workers=3")
    clients = {name: Client(str(server.socket), name=name.encode()) for name in "abc"}
    workers = children(server)
    assert len(workers) == 3
    os.kill(workers[1], signal.SIGKILL)
    with pytest.raises(ConnectionError):
        clients["b"].read(0, 8)
    assert clients["c"].read(0, 8) == b"c" * 8
    with pytest.raises(OSError, match="not available"):
        diskwright.open(server.uri.replace("///", "///b"))
    status, said = server.end()
    assert status == 1 and "ended with status -9" in said
    for client in clients.values():
        client.sock.close()


def test_a_worker_that_cannot_begin(tmp_path: Path) -> None:
    server = Serve(disk(tmp_path / "a"), "--workers=2", str(tmp_path / "nothing"))
    status, said = server.ended()
    assert status == 1 and "nothing': No such file" in said and said.count("\n") == 1
    assert not server.socket.exists()


def test_the_last_client_ends_all_workers(tmp_path: Path) -> None:
    images = [disk(tmp_path / name) for name in "ab"]
    server = Serve(images[0], "--workers=2", str(images[1]))
    one, two = (Client(str(server.socket), name=name) for name in (b"a", b"b"))
    one.close()
    assert two.read(0, 1) == b"b"
    two.close()
    assert server.ended() == (0, "")


# -- TLS
def secure(folder: Path, certificates: Path, *options: str) -> tuple[Serve, str]:
    """A server of three images in as many workers, and the URI of ``NAME``."""
    server, _ = several(
        folder,
        "--workers=3",
        f"--object=tls-creds-x509,id=t,dir={certificates},endpoint=server",
        "--tls-creds=t",
        *options,
    )
    return server, f"nbds+unix:///NAME?socket={server.socket}&tls-certificates={certificates}"


def test_tls_in_every_worker(tmp_path: Path, certificates: Path) -> None:
    """A client is greeted by any worker, and served by the one that has the disk; large and small
    requests of several connections go both ways."""
    need("nbdinfo", "nbdcopy")
    who = r"--object=authz-simple,id=a,identity=C=GB,,O=A\,, B,,CN=me"
    server, uri = secure(tmp_path, certificates, who, "--tls-authz=a")
    try:
        disks = [
            diskwright.open(uri.replace("NAME", name), format="raw", writable=True)
            for name in "abc" * 2
        ]
        for name, found in zip("abc" * 2, disks, strict=True):
            assert found.read_at(MIB - 9, 9) == name.encode() * 9
        for found in disks[:3]:
            found.write_at(5, bytes(range(256)) * 2048)
            found.flush()
        for found in disks[3:]:
            assert found.read_at(5, MIB // 2) == bytes(range(256)) * 2048
        for found in disks:
            found.close()
        assert run("nbdinfo", "--list", uri.replace("NAME", "")).count('export="') == 3
        copy = tmp_path / "copy"
        run("nbdcopy", "--connections=4", "--request-size=65536", uri.replace("NAME", "b"), copy)
        assert copy.read_bytes() == (tmp_path / "b").read_bytes()
        for bad in (f"nbd+unix:///a?socket={server.socket}", uri.replace("NAME", "nothing")):
            with pytest.raises((PeerError, OSError)):
                diskwright.open(bad, format="raw")
    finally:
        assert server.end() == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are not looked into elsewhere")
def test_the_next_connection_of_a_client_needs_no_relay(tmp_path: Path, certificates: Path) -> None:
    server, uri = secure(tmp_path, certificates)

    def descriptors() -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in children(server))

    disks, counts = [], []
    for name in "cabccc":  # the first four are greeted by others, the last two are not
        disks.append(diskwright.open(uri.replace("NAME", name), format="raw"))
        assert disks[-1].read_at(0, 1) == name.encode()
        counts.append(descriptors())
    for found in disks:
        found.close()
    assert [counts[4] - counts[3], counts[5] - counts[4]] == [1, 1]
    wait_for(lambda: descriptors() == counts[3] - 4 * 3, "the end of the relays")
    assert server.end() == (0, "")


def test_strangers_do_not_end_the_server(tmp_path: Path, certificates: Path) -> None:
    """Neither their coming without -t, nor their being refused."""
    who = "--object=authz-simple,id=a,identity=CN=you"
    server, uri = secure(tmp_path, certificates, who, "--tls-authz=a", "-v")
    with pytest.raises(PeerError, match=r"closed the connection|TLS handshake failed"):
        diskwright.open(uri.replace("NAME", "a"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.socket))
        sock.sendall(b"x" * 100)
    status, said = server.end()
    assert status == 0 and "a client left: TLS x509 authz check failed" in said


def test_a_worker_dies_under_tls(tmp_path: Path, certificates: Path) -> None:
    """Its exports are gone; clients that it greeted come again and find theirs."""
    server, uri = secure(tmp_path, certificates)
    os.kill(children(server)[1], signal.SIGKILL)
    wait_for(lambda: len(children(server)) == 2, "the worker's end")
    left = []
    for name in "abc":
        for _ in range(3):  # whoever greets it
            try:
                with diskwright.open(uri.replace("NAME", name), format="raw") as found:
                    left.append(found.read_at(0, 1))
            except (PeerError, OSError):
                pass
    assert sorted(left) == sorted([b"a"] * 3 + [b"c"] * 3)
    status, said = server.end()
    assert status == 1 and "ended with status -9" in said


# -- metrics, trace
def test_metrics_of_all_workers(tmp_path: Path) -> None:
    """One answer tells of all; of a worker that is gone it tells that."""
    where = tmp_path / "metrics"
    server, _ = several(tmp_path, "--workers=2", f"--metrics=unix:{where}")
    try:
        for name in "ab":
            with diskwright.open(server.uri.replace("///", f"///{name}"), format="raw") as found:
                found.read_at(0, 4096)
        found = scraped(where)
        reads = {
            dict(labels)["worker"]: done
            for (name, labels), done in found.items()
            if name == "diskwright_export_operations_total"
            and {("operation", "read")} < labels
            and dict(labels)["export"] in "ab"
        }
        assert len(reads) == 2 and min(reads.values()) >= 1
        assert value(found, "diskwright_nbd_accepted_total") == 2
        assert [value(found, "diskwright_worker_up", worker=n) for n in "12"] == [1, 1]
        assert value(found, "process_open_fds") and value(found, "process_open_fds", worker="2")
        os.kill(children(server)[0], signal.SIGKILL)
        wait_for(lambda: len(children(server)) == 1, "the worker's end")
        found = scraped(where)
        assert [value(found, "diskwright_worker_up", worker=n) for n in "12"] == [0, 1]
        assert not any(("worker", "1") in labels and "export" in name for name, labels in found)
    finally:
        assert server.end()[0] == 1


def test_metrics_do_not_wait_for_who_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that answers nothing is asked once, and left out, as often as it is looked for."""
    monkeypatch.setattr(metrics_workers, "WORKER_SECONDS", 0.01)
    driver = Driver()
    ours, theirs = socket.socketpair()

    async def scenario() -> None:
        metrics = WorkersMetrics(Front(driver, [Worker(0, ours)]))
        for _ in range(3):
            (up,) = [one for one in await metrics._gathered() if one.name.endswith("_up")]
            assert up.samples == [({"worker": "1"}, 0)]
        assert len(theirs.recv(4096)) < 60

    with theirs:
        driver.run(scenario())
        driver.close()
    ours.close()


def test_trace_of_all_workers(tmp_path: Path) -> None:
    """One signal, and one file; the server goes on."""
    path = tmp_path / "trace"
    server, _ = several(tmp_path, "--workers=2", f"--trace=file={path}")
    clients = [Client(str(server.socket), name=name) for name in (b"a", b"b")]
    for client in clients:
        assert len(client.read(0, 512)) == 512
    server.process.send_signal(signal.SIGUSR2)
    told = b""
    assert server.process.stderr is not None
    deadline = time.monotonic() + 60
    while told.count(b"running:") < 3:
        assert time.monotonic() < deadline
        told += os.read(server.process.stderr.fileno(), 65536)
    for who in ("front", "worker 1", "worker 2"):
        assert f"{who}: no requests waiting\n".encode() in told
    for client in clients:
        assert len(client.read(0, 512)) == 512
        client.close()
    assert server.end() == (0, "")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {one["worker"] for one in lines if one["event"] == "trace"} == {0, 1, 2}
    begun = [(one["worker"], one["id"]) for one in lines if one.get("request") == "read"]
    assert {worker for worker, _ in begun} == {1, 2} and len(set(begun)) == len(begun)
