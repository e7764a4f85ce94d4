"""TLS by pre-shared keys, on an interpreter that has them, with programs of others at one end."""

from __future__ import annotations

import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monitor.running import OURS, daemon
from nbd.serving import ENVIRONMENT, Serve
from nbd.test_serve import need
from protocols.nbd_servers import qemu_nbd

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
KEYS = "alice:c0ffee00c0ffee00c0ffee00c0ffee00\nqemu:0123456789abcdef0123456789abcdef\n"
WRONG = "alice:c0ffee00c0ffee00c0ffee00c0ffee01\nbob:c0ffee00c0ffee00c0ffee00c0ffee00\n"
ANOTHER = "another key"
UNKNOWN = "no key of this user"


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that has them: this one, or another one of this machine."""
    found = subprocess.run([ROOT / "tools/interpreters"], capture_output=True, text=True).stdout
    for path in (sys.executable, *reversed(found.split())):
        probe = "import ssl, sys; sys.exit(not getattr(ssl, 'HAS_PSK', False))"
        if subprocess.run([path, "-c", probe]).returncode == 0:
            return path
    pytest.skip("no Python with pre-shared keys (3.13 or later)")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder of keys, one of others, and a disk beside them."""
    for name, text in (("keys", KEYS), ("wrong", WRONG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.psk").write_text(text)
    (tmp_path / "disk").write_bytes(b"\7" * MIB)
    return tmp_path / "keys"


def told(*words: object, fails: bool = False) -> str:
    """What a program says."""
    done = subprocess.run(
        [str(word) for word in words], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def theirs(path: object, keys: Path, user: str) -> str:
    return f"nbds+unix://{user}@/?socket={path}&tls-psk-file={keys}/keys.psk"


def ours(path: object, keys: Path, user: str) -> str:
    return f"nbds+unix:///?socket={path}&tls-psk-file={keys}/keys.psk&tls-username={user}"


def test_a_server(python: str, keys: Path) -> None:
    need("qemu-io", "nbdinfo")
    wrong, image = keys.with_name("wrong"), keys.with_name("disk")
    words = (f"--object=tls-creds-psk,id=t,dir={keys},endpoint=server", "--tls-creds=t")
    server = Serve(image, "-t", *words, python=python)
    try:
        mine = f"tls-creds-psk,id=c,dir={keys},username=alice,endpoint=client"
        where = f"driver=nbd,path={server.socket},tls-creds=c"
        commands = ("-c", "write -P 8 64k 512k", "-c", "read -P 8 64k 512k", "-c", "flush")
        assert "failed" not in told("qemu-io", "--object", mine, *commands, "--image-opts", where)
        assert image.read_bytes()[65536:589824] == b"\10" * 524288
        assert told("nbdinfo", "--size", theirs(server.socket, keys, "alice")) == f"{MIB}\n"
        for user in ("alice", "bob"):
            told("nbdinfo", theirs(server.socket, wrong, user), fails=True)
        told("nbdinfo", f"nbd+unix:///?socket={server.socket}", fails=True)
        # Both ends are ours.
        command = (python, "-m", "diskwright", "map", "-f", "raw")
        assert told(*command, ours(server.socket, keys, "qemu"))
        for user, reason in (("alice", ANOTHER), ("bob", UNKNOWN), ("carl", "no key of 'carl'")):
            assert reason in told(*command, ours(server.socket, wrong, user), fails=True)
    finally:
        assert server.end() == (0, "")


def test_nobody_else_is_kept_out(python: str, keys: Path) -> None:
    """What would not be asked is refused."""
    words = (f"--object=tls-creds-psk,id=t,dir={keys},endpoint=server", "--tls-creds=t")
    authz = ("--object=authz-simple,id=a,identity=alice", "--tls-authz=a")
    status, text = Serve(keys.with_name("disk"), *words, *authz, python=python).ended()
    assert status == 1 and "'tls-authz' is for certificates" in text


def test_a_daemon(python: str, keys: Path) -> None:
    need("qemu-img")
    folder = keys.parent
    with daemon([python, *OURS[1:]], folder) as (_, (qmp,)):
        creds = {"qom_type": "tls-creds-psk", "id": "t", "dir": "wrong", "endpoint": "server"}
        qmp.do("object-add", **creds)
        qmp.do("object-del", id="t")
        qmp.do("object-add", **{**creds, "dir": "keys"})
        address = {"type": "unix", "data": {"path": "n.sock"}}
        qmp.do("nbd-server-start", addr=address, tls_creds="t")
        qmp.do("blockdev-add", driver="file", node_name="disk", filename="disk")
        qmp.do("block-export-add", type="nbd", id="e", node_name="disk")
        for words, fails in (
            (f"dir={keys}", False),
            (f"dir={folder}/wrong,username=alice", True),
        ):
            mine = f"tls-creds-psk,id=c,{words},endpoint=client"
            where = f"driver=nbd,path={folder}/n.sock,export=disk,tls-creds=c"
            text = told("qemu-img", "info", "--object", mine, "--image-opts", where, fails=fails)
            assert fails or "1 MiB" in text


def test_a_client(python: str, keys: Path) -> None:
    wrong, image = keys.with_name("wrong"), keys.with_name("disk")
    creds = f"tls-creds-psk,id=t,dir={keys},endpoint=server"
    words = ("-f", "raw", "--object", creds, "--tls-creds=t", str(image))
    with qemu_nbd(keys.parent, *words) as server:
        command = (python, "-m", "diskwright", "io", "-r")
        reads: tuple[Any, ...] = ("-c", "read -P 7 0 1M")
        where = f"driver=nbd,path={server.path},export=disk,tls-creds=c"
        mine = f"tls-creds-psk,id=c,dir={keys},username=alice,endpoint=client"
        text = told(*command, *reads, "--object", mine, "--image-opts", where)
        assert "read 1048576/1048576" in text and "failed" not in text
        for user in ("alice", "bob"):  # whom it tells nothing
            uri = ours(server.path, wrong, user).replace("///?", "///disk?")
            said = told(*command, "-f", "raw", *reads, uri, fails=True)
            assert "the other side ended the connection" in said


@pytest.mark.skipif(getattr(ssl, "HAS_PSK", False), reason="this Python has pre-shared keys")
def test_without(keys: Path) -> None:
    """Both ends say what is wanting."""
    wanting = "Python has it from 3.13 on"
    words = f"tls-creds-psk,id=t,dir={keys},endpoint="
    image = keys.with_name("disk")
    status, text = Serve(image, f"--object={words}server", "--tls-creds=t").ended()
    assert status == 1 and wanting in text
    where = ("--image-opts", "driver=nbd,path=nowhere,tls-creds=t")
    said = told(*OURS[:3], "info", "--object", f"{words}client", *where, fails=True)
    assert wanting in said
    with daemon(OURS, keys.parent) as (_, (qmp,)):
        creds = {"qom-type": "tls-creds-psk", "id": "t", "dir": "keys", "endpoint": "server"}
        assert wanting in qmp.send("object-add", creds)["error"]["desc"]
