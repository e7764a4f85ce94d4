"""The server over TLS: by bytes alone, and with clients that others wrote."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import PeerError
from diskwright.wire import nbd_const as c
from nbd import peer
from nbd.serving import Serve
from nbd.test_machine import EXPORT, Fed, replies
from nbd.test_serve import need, run


def secure() -> Fed:
    fed = Fed()
    fed.machine = type(fed.machine)({EXPORT.name: EXPORT}, secure=True)
    fed.out = b"".join(fed.machine.take())
    return fed


def test_nothing_before_tls() -> None:
    fed = secure().feed(struct.pack(">I", 3))
    for number in (3, 6, 7, 8, 9, 10, 11, 77):
        fed.feed(peer.option(number, b"x"))
    fed.feed(peer.option(77, b"x" * 20_000) + peer.option(peer.STARTTLS, b"x"))
    answers = [kind for _, kind, _ in replies(fed.out)]
    assert answers == [c.REP_ERR_TLS_REQD] * 9 + [c.REP_ERR_INVALID]
    fed.out = fed.out[:18]
    fed.feed(peer.option(peer.STARTTLS))
    assert fed.machine.upgrade and not fed.machine.closed
    assert [kind for _, kind, _ in replies(fed.out)] == [c.REP_ACK]
    fed.machine.secured()
    fed.out = fed.out[:18]
    fed.feed(peer.option(peer.STARTTLS) + peer.opening()[4:])
    assert [kind for _, kind, _ in replies(fed.out)] == [c.REP_ERR_INVALID, 1, 3, 1]
    assert fed.machine.export is EXPORT


@pytest.mark.parametrize(
    "clear", [peer.option(peer.STARTTLS) + b"x", peer.option(peer.EXPORT_NAME)]
)
def test_what_comes_in_the_clear_is_not_believed(clear: bytes) -> None:
    fed = secure().feed(struct.pack(">I", 3) + clear)
    assert fed.machine.closed and fed.machine.export is None


def test_certificates(tmp_path: Path, certificates: Path) -> None:
    """Large transfers in both directions; strangers, plain clients and wrong names stay out."""
    need("qemu-io", "nbdinfo", "nbdcopy")
    image = tmp_path / "disk"
    image.write_bytes(bytes(8 << 20))
    objects = [f"--object=tls-creds-x509,id=t,dir={certificates},endpoint=server"]
    objects += ["--object", r"authz-simple,id=a,identity=C=GB,,O=A\,, B,,CN=me"]
    words = ("--tls-creds=t", "--tls-authz", "a")
    server = Serve(image, "-t", "-e", "4", *objects, *words)
    try:
        mine = f"tls-creds-x509,id=c,dir={certificates},endpoint=client"
        where = f"driver=nbd,path={server.socket},tls-creds=c,tls-hostname=localhost"
        commands = ("-c", "aio_write -P 7 1M 3M", "-c", "aio_write -P 8 4M 3M", "-c", "aio_flush")
        reads = ("-c", "read -P 7 1M 3M", "-c", "read -P 8 4M 3M")
        told = run("qemu-io", "--object", mine, *commands, *reads, "--image-opts", where)
        assert "failed" not in told
        uri = f"nbds+unix:///?socket={server.socket}"
        with diskwright.open(f"{uri}&tls-certificates={certificates}") as disk:
            assert disk.read_at(1 << 20, 6 << 20) == b"\7" * (3 << 20) + b"\10" * (3 << 20)
        mine = f"{uri}&tls-certificates={certificates}"
        run("nbdcopy", "--connections=4", "--request-size=65536", mine, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == image.read_bytes()
        (tmp_path / "new").write_bytes(random.Random(2).randbytes(8 << 20))
        run("nbdcopy", "--connections=4", "--flush", tmp_path / "new", mine)
        assert (tmp_path / "new").read_bytes() == image.read_bytes()
        for name in (f"nbd+unix:///?socket={server.socket}", f"{uri}&tls-verify-peer=false"):
            done = subprocess.run(["nbdinfo", name], capture_output=True, timeout=30)
            assert done.returncode, name
    finally:
        assert server.end() == (0, "")
    rules = "rules.0.match=*CN=you,rules.0.policy=allow,rules.0.format=glob"
    server = Serve(image, "-t", objects[0], f"--object=authz-list,id=a,{rules}", *words)
    try:
        with pytest.raises(PeerError, match=r"closed the connection|TLS handshake failed"):
            diskwright.open(f"{uri}&tls-certificates={certificates}")
    finally:
        assert server.end() == (0, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tls-creds=x",), "No TLS credentials with id 'x'"),
        (("--tls-authz=x",), "not permitted without --tls-creds"),
        (("--object=tls-creds-x509,id=x,dir=/", "--tls-creds=x"), "with a server endpoint"),
    ],
)
def test_what_cannot_be(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(512))
    status, text = Serve(image, *words).ended()
    assert status == 1 and said in text
