"""``serve`` as a process, and clients that others wrote."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

import diskwright
from nbd import peer
from nbd.peer import Client
from nbd.serving import Serve, serving, wait_for

SIZE = 16 << 20


def need(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def run(*command: str | Path, timeout: float = 60) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, zeroes that are stored, and holes."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.write(random.Random(1).randbytes(3 << 20))
        file.seek(8 << 20)
        file.write(bytes(1 << 20) + random.Random(2).randbytes(100000))
    return path


def as_qcow2(image: Path) -> Path:
    need("qemu-img")
    path = image.with_suffix(".qcow2")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, path)
    return path


def test_ends_with_its_client_and_says_nothing(image: Path) -> None:
    server = Serve(image)
    client = Client(str(server.socket))
    assert client.read(0, 1 << 20) == image.read_bytes()[: 1 << 20]
    client.close()
    assert server.ended() == (0, "")
    assert not server.socket.exists()


def test_an_internal_snapshot(tmp_path: Path) -> None:
    """As `qemu-nbd -l`: the disk as it was, for reading alone."""
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=1 << 20)
    with diskwright.open(path, writable=True) as disk:
        disk.write_at(0, b"before")
        disk.snapshots.create("one")
        disk.write_at(0, b"behind")
    for name in ("one", "snapshot.name=one", "snapshot.id=1"):
        server = Serve(path, "-l", name, format="qcow2")
        client = Client(str(server.socket))
        assert client.read(0, 6) == b"before"
        assert client.flags & 2  # read-only
        client.close()
        assert server.ended() == (0, "")
    status, said = Serve(path, "-l", "two", format="qcow2").ended()
    assert status == 1 and "Failed to load snapshot: Can't find snapshot" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_well(image: Path, number: int) -> None:
    with serving(image, "-t") as server:
        client = Client(str(server.socket))
        client.write(5 << 20, b"z" * 8192)
        assert server.end(number) == (0, "")
        client.sock.close()
    assert image.read_bytes()[5 << 20 : (5 << 20) + 8192] == b"z" * 8192


def test_background_and_pid_file(image: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    server = Serve(image, "--fork", f"--pid-file={pid_file}")
    assert server.ended() == (0, "")  # as soon as clients can connect
    pid = int(pid_file.read_text())
    Client(str(server.socket)).close()
    wait_for(lambda: not pid_file.exists(), "the server to end")
    wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), "the server to be gone")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_nbdinfo_and_nbdcopy(image: Path, tmp_path: Path, format: str) -> None:
    need("nbdinfo", "nbdcopy")
    source = image if format == "raw" else as_qcow2(image)
    with serving(source, "-t", "-e", "8", format=format) as server:
        told = run("nbdinfo", server.uri)
        assert f"export-size: {SIZE}" in told and "can_multi_conn: true" in told
        holes = run("nbdinfo", "--map", server.uri)
        assert "hole,zero" in holes
        copy = tmp_path / "copy.raw"
        run("nbdcopy", server.uri, copy)
        assert copy.read_bytes() == image.read_bytes()
        new = random.Random(3).randbytes(2 << 20) + bytes(SIZE - (2 << 20))
        copy.write_bytes(new)
        run("nbdcopy", "--flush", copy, server.uri)
        run("nbdcopy", server.uri, tmp_path / "back.raw")
        assert (tmp_path / "back.raw").read_bytes() == new


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_tools(image: Path, tmp_path: Path, format: str) -> None:
    need("qemu-img", "qemu-io")
    source = image if format == "raw" else as_qcow2(image)
    with serving(source, "-t", format=format) as server:
        run("qemu-img", "convert", "-O", "raw", server.uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == image.read_bytes()
        commands = [
            "write -P 0x5a 1M 64k",
            "write -z -u 2M 1M",
            "discard 9M 64k",
            "write -f -P 7 3M 512",
            "aio_write -P 8 4M 1M",
            "aio_flush",
            "flush",
            "read -P 0x5a 1M 64k",
            "read -P 0 2M 1M",
            "read -P 7 3M 512",
            "read -P 8 4M 1M",
        ]
        words = [word for command in commands for word in ("-c", command)]
        told = run("qemu-io", "-f", "raw", *words, server.uri)
        assert "failed" not in told and "error" not in told
        run("qemu-img", "convert", "-n", "-O", "raw", tmp_path / "copy.raw", server.uri)
        assert "identical" in run("qemu-img", "compare", image, server.uri)
    if format == "qcow2":
        run("qemu-img", "check", source)


def test_fio_verifies(image: Path) -> None:
    need("fio")
    if "nbd" not in run("fio", "--enghelp"):
        pytest.skip("fio was built without its nbd engine")
    with serving(as_qcow2(image), "-t", format="qcow2") as server:
        told = run(
            *("fio", "--name=v", "--ioengine=nbd", f"--uri={server.uri}", f"--size={SIZE}"),
            *("--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", "--verify=crc32c"),
            *("--do_verify=1", "--verify_fatal=1", "--verify_backlog=64", "--verify_state_save=0"),
        )
        assert "err= 0" in told
    run("qemu-img", "check", image.with_suffix(".qcow2"))


LIBNBD = """
import sys, nbd
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_size() == 16 << 20 and h.can_multi_conn() and h.can_df() and not h.is_read_only()
h.pwrite(b"a" * 4096, 0, nbd.CMD_FLAG_FUA)
h.zero(4096, 8192)
h.trim(65536, 1 << 20)
h.cache(1 << 20, 0)
h.flush()
assert h.pread(4096, 0) == b"a" * 4096
assert h.pread(4096, 8192) == bytes(4096)
rows = []
h.block_status(1 << 20, 12 << 20, lambda name, offset, entries, error: rows.append(entries))
assert rows == [[1 << 20, 3]], rows
h.block_status(1 << 20, 0, lambda *a: rows.append(a[2]), nbd.CMD_FLAG_REQ_ONE)
assert len(rows[1]) == 2, rows
buffers = [nbd.Buffer(1 << 20) for _ in range(8)]
cookies = [h.aio_pread(b, i << 20) for i, b in enumerate(buffers)]
while h.aio_in_flight():
    h.poll(-1)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
h.set_strict_mode(0)
for call in (lambda: h.pread(512, 16 << 20), lambda: h.pwrite(b"x" * 512, 16 << 20)):
    try:
        call()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error.errno
    else:
        raise SystemExit("not refused")
assert h.pread(1, 0) == b"a"
h.shutdown()
"""


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_libnbd(image: Path, format: str) -> None:
    python = "/usr/bin/python3"
    probe = subprocess.run(
        [python, "-c", "import nbd; nbd.NBD()"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("libnbd's Python binding is not installed")
    source = image if format == "raw" else as_qcow2(image)
    with serving(source, "-t", "-e", "0", format=format) as server:
        run(python, "-c", LIBNBD, server.uri)


@pytest.mark.parametrize("turn", range(3))
def test_killed_at_random_moments(tmp_path: Path, turn: int) -> None:
    """What was flushed is there, and the image checks clean."""
    need("qemu-img")
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    chance = random.Random(turn)
    model: dict[int, bytes] = {}
    for _ in range(3):
        server = Serve(image, "-t", format="qcow2")
        client = Client(str(server.socket))
        killer = threading.Timer(chance.uniform(0.05, 0.8), server.process.kill)
        killer.start()
        maybe: dict[int, list[bytes]] = {}
        try:
            while True:
                block = chance.randrange(1024)
                data = chance.randbytes(4096)
                maybe.setdefault(block, []).append(data)
                client.write(block << 16, data)
                if chance.random() < 0.05:
                    client.flush()
                    model.update({known: versions[-1] for known, versions in maybe.items()})
                    maybe.clear()
        except (ConnectionError, TimeoutError):
            pass
        killer.join()
        server.process.communicate()
        client.sock.close()
        done = subprocess.run(
            ["qemu-img", "check", str(image)], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: leaks
        server = Serve(image, "-t", format="qcow2")  # in place of the socket left behind
        client = Client(str(server.socket))
        for block in model.keys() | maybe.keys():
            allowed = [model.get(block, bytes(4096)), *maybe.get(block, [])]
            found = client.read(block << 16, 4096)
            assert found in allowed
            model[block] = found
        client.flush()
        client.close()
        assert server.end() == (0, "")


def test_memory_stays_inside_the_budget(tmp_path: Path) -> None:
    """24 clients, each with a write of 32 MiB at once: 768 MiB wanted, 512 MiB allowed."""
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    payload = bytes(32 << 20)
    failures: list[BaseException] = []
    with serving(image, "-t", "-e", "0") as server:
        clients = [Client(str(server.socket), timeout=300) for _ in range(24)]

        def write(client: Client, number: int) -> None:
            try:
                client.sock.sendall(peer.request(peer.WRITE, 1, (number & 1) << 25, data=payload))
                assert client.reply() == (1, 0, b"")
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=write, args=(client, number))
            for number, client in enumerate(clients)
        ]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        peak = server.peak_bytes()
        assert peak < (512 << 20) + (96 << 20), f"{peak >> 20} MiB"
        assert time.monotonic() - start < 240
        for client in clients:
            client.close()


def test_contexts(tmp_path: Path) -> None:
    """Dirty bitmaps, also of a backing file, and the depth of the allocation."""
    need("qemu-img", "qemu-io", "nbdinfo")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-img", "bitmap", "--add", base, "below")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, "6M")
    run("qemu-img", "bitmap", "--add", "-g", "512k", top, "above")
    options = ("-t", "-A", "-B", "above", "--bitmap=below")
    with serving(top, *options, format="qcow2") as server:
        run("qemu-io", "-f", "raw", "-c", "write 1M 64k", server.uri)

        def told(context: str) -> list[tuple[int, int, int]]:
            lines = run("nbdinfo", f"--map={context}", server.uri).splitlines()
            rows = [line.split()[:3] for line in lines]
            return [(int(offset), int(length), int(flags)) for offset, length, flags in rows]

        unit = 64 << 10
        assert told("qemu:allocation-depth") == [
            (0, unit, 2),
            (unit, 15 * unit, 0),
            (16 * unit, unit, 1),
            (17 * unit, 79 * unit, 0),
        ]
        assert told("qemu:dirty-bitmap:below") == [(0, unit, 1), (unit, 95 * unit, 0)]
        assert told("qemu:dirty-bitmap:above") == [
            (0, 1 << 20, 0),
            (1 << 20, 512 << 10, 1),
            (3 << 19, 9 << 19, 0),
        ]
        where = f"driver=nbd,path={server.socket},x-dirty-bitmap=qemu:dirty-bitmap:above"
        found = run("qemu-img", "map", "--output=json", "--image-opts", where)
        assert [row["data"] for row in json.loads(found)] == [True, False, True]
    lost = Serve(top, "-B", "nothing", format="qcow2")
    assert lost.ended() == (1, "diskwright: Bitmap 'nothing' is not found\n")


def test_more_than_4_gib_at_once(tmp_path: Path) -> None:
    """What extended headers are for: with them qemu's client sends requests of 64 bits."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1T")
    with serving(image, "-t", format="qcow2") as server:
        words = ("-c", "write -P 5 900G 1M", "-c", "read -P 5 900G 1M", "-c", "flush")
        run("qemu-io", "-f", "raw", *words, server.uri)
        found = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", server.uri))
        assert [row["length"] for row in found] == [900 << 30, 1 << 20, (124 << 30) - (1 << 20)]
        run("qemu-io", "-f", "raw", "-c", "write -z -u -n 890G 20G", server.uri)
        with diskwright.open(server.uri) as disk:
            assert disk.read_at(900 << 30, 512) == bytes(512)
