"""The NBD client over TLS, with nbdkit and qemu-nbd."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from diskwright.engine.kernel import BaseDriver
from diskwright.errors import PeerError, UnsupportedFeature, UsageError
from diskwright.protocols.nbd import open_nbd
from diskwright.secrets import Secrets

from .nbd_servers import nbdkit, qemu_nbd
from .test_nbd import PLAIN, run


def test_nbdkit(driver: BaseDriver, tmp_path: Path, certificates: Path) -> None:
    """Large reads and writes in both directions at once; what is not trusted is refused."""
    words = ("--tls=require", f"--tls-certificates={certificates}", "memory", "4M")
    with nbdkit(tmp_path, *words) as server:
        secure = server.options(tls=True, tls_certificates=str(certificates))
        node = run(driver, open_nbd(driver, secure))
        assert node.agreed.tls
        content = random.Random(1).randbytes(3 << 20)

        async def work() -> None:
            await node.write([1000], [content])
            await node.write([5, 9], [b"ab", b"c"])
            one = driver.start(node.read([1000], [len(content)]))
            await node.write([0], [b"x"])
            await one
            assert bytes(one.value[0]) == content  # type: ignore[index]
            assert bytes((await node.read([0], [12]))[0]) == b"x\0\0\0\0ab\0\0c\0\0"

        run(driver, work())
        run(driver, node.close())
        for options, words_of in [
            ({**secure, "tls-hostname": "example.org"}, "certificate is not accepted"),
            ({**secure, "tls-certificates": ""}, "certificate is not accepted"),
            (server.options(), "requires TLS"),
        ]:
            with pytest.raises(PeerError, match=words_of):
                run(driver, open_nbd(driver, options))
        del secure["tls-certificates"]
        node = run(driver, open_nbd(driver, {**secure, "tls-verify-peer": False}))
        run(driver, node.close())


@PLAIN
def test_qemu_nbd(driver: BaseDriver, tmp_path: Path, certificates: Path) -> None:
    """Credentials by their id; a server that wants to know who we are."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    words = ("-f", "raw", "--tls-creds", "t", str(image))
    named = f"tls-creds-x509,id=t,dir={certificates},endpoint=server,verify-peer=on"
    with qemu_nbd(tmp_path, "--object", named, *words) as server:
        secrets = Secrets()
        secrets.define(f"tls-creds-x509,id=mine,dir={certificates},endpoint=client")
        secrets.define("tls-creds-x509,id=theirs,endpoint=server")
        options = {**server.options("disk", tls_creds="mine"), "secrets": secrets}
        node = run(driver, open_nbd(driver, options))
        run(driver, node.write([0], [b"x" * 100000]))
        run(driver, node.close())
        with pytest.raises(UsageError, match="No TLS credentials with id 'other'"):
            run(driver, open_nbd(driver, {**options, "tls-creds": "other"}))
        with pytest.raises(UsageError, match="client endpoint"):
            run(driver, open_nbd(driver, {**options, "tls-creds": "theirs"}))
    assert image.read_bytes()[:100001] == b"x" * 100000 + b"\0"


@PLAIN
def test_a_server_without(driver: BaseDriver, tmp_path: Path) -> None:
    with (
        nbdkit(tmp_path, "memory", "1M") as server,
        pytest.raises(PeerError, match="does not offer it"),
    ):
        run(driver, open_nbd(driver, server.options(tls=True, tls_verify_peer=False)))


@PLAIN
def test_pre_shared_keys(driver: BaseDriver, tmp_path: Path) -> None:
    keys = tmp_path / "keys.psk"
    keys.write_text("alice:c0ffee00c0ffee00c0ffee00c0ffee00\nqemu:00\n")
    words = ("--tls=require", f"--tls-psk={keys}", "memory", "1M")
    with nbdkit(tmp_path, *words) as server:
        options = server.options(tls=True, tls_psk_file=str(keys), tls_username="alice")
        if sys.version_info < (3, 13):
            with pytest.raises(UnsupportedFeature, match="Python has it from"):
                run(driver, open_nbd(driver, options))
            return
        node = run(driver, open_nbd(driver, options))
        run(driver, node.write([0], [b"x"]))
        run(driver, node.close())
        with pytest.raises(UsageError, match="no key of 'bob'"):
            run(driver, open_nbd(driver, {**options, "tls-username": "bob"}))
