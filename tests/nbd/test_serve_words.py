"""What ``serve`` says: in the words of qemu-nbd 10.0 under its name, and the banner of our own."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from cli.support import ours
from diskwright.errors import UsageError
from diskwright.export.listening import listen_vsock
from nbd.serving import ENVIRONMENT, Serve
from nbd.test_serve import need, run

WORDS = [  # each measured with qemu-nbd 10.0.2, which ends with status 1
    ("a b", "Invalid number of arguments\nTry `qemu-nbd --help' for more information."),
    (
        "--foo a",
        "unrecognized option '--foo'\nqemu-nbd: Try `qemu-nbd --help' for more information.",
    ),
    ("-e -1 a", "Invalid shared device number '-1'"),
    ("-k s a", "socket path must be absolute"),
    ("-o x a", "Invalid offset 'x'"),
    ("-o -1 -f raw a", "Value '-1' is out of range for parameter 'offset'"),
    (
        "-o 5000000 -f raw a",
        "Offset (5000000) cannot be greater than size of the containing file (512)",
    ),
    ("--cache=foo a", "Invalid cache mode `foo'"),
    ("--cache=none -n a", "-n and --cache can only be specified once"),
    ("--aio=foo a", "Invalid aio mode 'foo'"),
    ("--aio=threads --aio=threads a", "--aio can only be specified once"),
    ("--discard=foo a", "Invalid discard mode `foo'"),
    ("--discard=unmap --discard=unmap a", "--discard can only be specified once"),
    ("--handshake-limit=x a", "Invalid handshake limit 'x'"),
    ("-f nope a", "Failed to blk_new_open 'a': Unknown driver 'nope'"),
    ("-f raw b", "Failed to blk_new_open 'b': Could not open 'b': No such file or directory"),
    ("-f raw -B foo a", "Bitmap 'foo' is not found"),
    (
        "-f raw -p x a",
        "address resolution failed for 0.0.0.0:x: Servname not supported for ai_socktype",
    ),
    ("-f raw --image-opts a", "--image-opts and -f are mutually exclusive"),
    ("--tls-authz=x a", "--tls-authz is not permitted without --tls-creds"),
    ("-f raw --tls-creds=x a", "Failed to get TLS creds: No TLS credentials with id 'x'"),
    (
        "-f raw --object secret,id=t,data=x --tls-creds=t a",
        "Failed to get TLS creds: Object with id 't' is not TLS credentials",
    ),
    ("--tls-creds=x --tls-hostname=y a", "TLS hostname is only supported with export list"),
    ("-L a", "List mode is incompatible with a file name"),
    ("-L -A", "List mode is incompatible with per-device settings"),
    ("-L --fork", "List mode is incompatible with forking"),
    ("-L -b 127.0.0.1 -p 1", "Failed to connect to '127.0.0.1:1': Connection refused"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), WORDS)
def test_words_of_qemu_nbd(tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "a").write_bytes(bytes(512))
    result = ours(*words.split(), cwd=tmp_path, name="qemu-nbd")
    assert (result.status, result.err.decode()) == (1, f"qemu-nbd: {said}\n")


def test_the_list_is_qemu_nbds(tmp_path: Path) -> None:
    need("qemu-nbd", "qemu-img")
    image = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    options = ("-x", "na me", "-D", "what it is", "-A", "-r", "-t")
    server = Serve(image, *options, format="qcow2")
    try:
        mine = ours("-L", "-k", str(server.socket), name="qemu-nbd")
        assert mine.status == 0
        assert mine.out.decode() == run("qemu-nbd", "-L", "-k", server.socket)
    finally:
        assert server.end() == (0, "")


def test_the_banner_and_both_families(tmp_path: Path) -> None:
    """Only with -v where nobody sits at a terminal; a name is listened to on all its addresses."""
    (tmp_path / "a").write_bytes(b"a" * 512)
    process = subprocess.Popen(
        [sys.executable, "-m", "diskwright", "serve", "-vt", "-p", "0", "-f", "raw", "a"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "a (writable) is\n"
        uris = []
        while line := process.stdout.readline().strip():
            uris.append(line)
        addresses = socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)
        assert 1 <= len(uris) <= len(addresses)
        for uri in uris:
            with diskwright.open(uri, format="raw") as disk:
                assert disk.read_at(0, 4) == b"aaaa"
        process.terminate()
        rest = process.stdout.read()
        assert f"nbdcopy {uris[0]} copy.raw" in rest.replace("'", "")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_vsock_addresses() -> None:
    for cid, port in (("x", "1"), ("", "-1"), ("4294967296", "1"), ("1", "4294967296")):
        with pytest.raises(UsageError, match="Failed to parse vsock"):
            listen_vsock(cid, port)
    try:
        listener = listen_vsock("", "10809")
    except OSError:
        pytest.skip("there is no vsock here")
    with listener:
        assert listener.getsockname() == (0xFFFFFFFF, 10809)
