"""The verbs over NBD beside the real qemu-img with the same server, names, and the gate."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours, real
from diskwright.errors import DiskError, Refused, UsageError
from diskwright.graph import names
from diskwright.wire.nbd_uri import uri
from protocols.nbd_servers import Server, nbdkit, qemu_nbd

MIB = 1 << 20
NAME = "nbd+unix:///disk?socket={}"


def raw(path: Path, size: int = 4 * MIB) -> Path:
    with open(path, "wb") as file:
        file.write(random.Random(5).randbytes(100000))
        file.seek(MIB)
        file.write(b"x" * 65536)
        file.truncate(size)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("nbd")
    with qemu_nbd(folder, "-f", "raw", str(raw(folder / "disk"))) as found:
        yield found


@pytest.fixture
def name(server: Server) -> str:
    return NAME.format(server.path)


@pytest.mark.parametrize(
    "words",
    [
        ("info", "{}"),
        ("info", "--output=json", "{}"),
        ("info", "nbd:unix:{s}:exportname=disk"),
        ("info", "--image-opts", "driver=nbd,path={s},export=disk"),
        ("info", "json:{{'driver': 'nbd', 'server': {{'type': 'unix', 'path': '{s}'}},"
                 " 'export': 'disk', 'reconnect-delay': 3, 'open-timeout': 2}}"),
        ("info", "nbd+unix:///other?socket={s}"),
        ("info", "nbd+unix:///disk?socket=/nowhere"),
        ("info", "--image-opts", "driver=nbd,export=disk"),
        ("info", "--image-opts", "driver=nbd,path=/a,host=b"),
        ("info", "--image-opts", "driver=nbd,server.type=unix,path=/a"),
        ("info", "--image-opts", "driver=nbd,server.type=inet,server.host=a"),
        ("info", "--image-opts", "driver=nbd,path=/a,tls-creds=foo"),
        ("info", "--image-opts", "driver=nbd,path=/a,reconnect-delay=x"),
        ("info", "nbd://127.0.0.1:1/x"),
        ("map", "--output=json", "{}"),
        ("map", "{}"),
        ("resize", "-f", "raw", "{}", "16M"),
        ("create", "-f", "raw", "{}", "16M"),
    ],
)  # fmt: skip
def test_like_qemu_img(server: Server, name: str, words: tuple[str, ...]) -> None:
    args = [word.format(name, s=server.path) for word in words]
    mine, theirs = ours(*args), real("qemu-img", *args)
    assert mine.status == theirs.status
    assert mine.out == theirs.out
    assert mine.err == theirs.err


def test_in_and_out(tmp_path: Path) -> None:
    """Into an export, out of it, compared, checked, and used as a disk of clusters."""
    source = raw(tmp_path / "source")
    target = tmp_path / "target"
    target.write_bytes(b"old" * MIB + b"x" * MIB)
    with nbdkit(tmp_path, "file", str(target)) as server:
        name = NAME.format(server.path)
        assert ours("convert", "-n", "-O", "raw", source, name).status == 0
        assert target.read_bytes() == source.read_bytes()
        assert ours("compare", name, source).out == b"Images are identical.\n"
        assert ours("convert", "-O", "qcow2", name, tmp_path / "copy").status == 0
        assert real("qemu-img", "compare", source, tmp_path / "copy").status == 0
        assert ours("create", "-f", "qcow2", name, "2M").status == 0
        script = ("-c", "write -P 7 1000 200000", "-c", "discard 64k 64k", "-c", "read -P 7 1000 9")
        done = ours("-f", "qcow2", *script, name, name="qemu-io")
        assert done.status == 0 and not done.err
        assert ours("check", "-f", "qcow2", name).status == 0
        with diskwright.open(name, format="qcow2") as disk:
            assert disk.read_at(1000, 5) == b"\7" * 5
    assert real("qemu-img", "check", "-f", "qcow2", target).status == 0


@pytest.mark.parametrize("policy", ["local", "untrusted"])
def test_an_image_names_an_export(
    tmp_path: Path, server: Server, name: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is called because an image says so, unless the caller allows it."""
    image = tmp_path / "overlay"
    options = ["-b", name, "-F", "raw"]
    assert ours("create", "-f", "qcow2", *options, str(image)).status == 0
    assert real("qemu-img", "info", image).status == 0
    calls: list[Any] = []
    from diskwright.protocols import nbd_connect

    with monkeypatch.context() as patched:
        patched.setattr(nbd_connect, "_connect", lambda *args: calls.append(args))
        for again in (name, "json:" + json.dumps(names.from_filename(name))):
            given = ["rebase", "-u", "-f", "qcow2", "-b", again, "-F", "raw", str(image)]
            assert ours(*given).status == 0
            with pytest.raises(Refused) as raised, diskwright.open(image, policy=policy):
                pass
            assert "--policy trusted" in str(raised.value)
    assert not calls
    assert ours("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image).status == 0
    with pytest.raises(Refused) as raised, diskwright.open(image, policy=policy):
        pass
    assert f"'--allow {name}'" in str(raised.value)
    for given in (("--allow", name), ("--policy", "trusted")):
        words = ("map", "--output=json", *given, str(image))
        done = ours(*words, policy=policy, name="diskwright")
        assert (done.status, done.err) == (0, b"")
        assert done.out == real("qemu-img", "map", "--output=json", image).out
    done = ours("map", "--allow", name + "x", str(image), policy=policy, name="diskwright")
    assert done.status == 1 and b"is not opened" in done.err


def test_contexts_of_qemu(tmp_path: Path) -> None:
    """Which clusters are dirty, and which are in which layer, as qemu-img tells it."""
    layers = [tmp_path / name for name in "012"]
    for below, image in zip([None, *layers], layers, strict=False):
        backing = [] if below is None else ["-F", "qcow2", "-b", below]
        words = ("create", "-q", "-f", "qcow2", *backing, image, "1M")
        subprocess.run(("qemu-img", *words), check=True)
    image = layers[2]
    for words in (
        ("qemu-img", "bitmap", "--add", image, "bm"),
        ("qemu-io", "-c", "write -P 1 512k 64k", layers[0]),
        ("qemu-io", "-c", "write -P 2 640k 64k", layers[1]),
        ("qemu-io", "-c", "write -P 3 64k 128k", image),
        ("qemu-img", "bitmap", "--disable", image, "bm"),
    ):
        subprocess.run(words, check=True, capture_output=True)
    with qemu_nbd(tmp_path, "-f", "qcow2", "-r", "-A", "-B", "bm", str(image)) as server:
        for context in ("qemu:dirty-bitmap:bm", "qemu:allocation-depth", "base:allocation"):
            given = {**server.options("disk"), "driver": "nbd", "x-dirty-bitmap": context}
            raw = {"driver": "raw", "file": given}
            for how in ("--output=json", "--output=human"):
                words = ("map", how, "json:" + json.dumps(given))
                mine, theirs = ours(*words), real("qemu-img", *words)
                assert (mine.status, mine.err) == (0, b"")
                assert mine.out == theirs.out
                assert ours("map", how, "json:" + json.dumps(raw)).out == theirs.out
            # Nobody takes it for what the disk holds.
            assert ours("compare", "json:" + json.dumps(given), image).status == 0
        given["x-dirty-bitmap"] = "qemu:dirty-bitmap:none"
        done = ours("map", "json:" + json.dumps(given))
        assert done.status == 1
        assert b"the server does not offer 'qemu:dirty-bitmap:none'" in done.err


UNIX = {"type": "unix", "path": "/a b"}


@pytest.mark.parametrize(
    ("given", "options", "back"),
    [
        ("nbd://h", {"server": {"type": "inet", "host": "h", "port": "10809"}, "export": ""},
         "nbd://h:10809"),
        ("nbd+tcp://[::1]:1/a/b", {"server": {"type": "inet", "host": "::1", "port": "1"},
         "export": "a/b"}, "nbd://[::1]:1/a/b"),
        ("nbd+unix:///x%20y?socket=/a%20b", {"server": UNIX, "export": "x y"},
         "nbd+unix:///x%20y?socket=/a%20b"),
        ("nbd+unix://?socket=/a%20b", {"server": UNIX, "export": ""},
         "nbd+unix://?socket=/a%20b"),
        ("nbd:unix:/a b", {"server": UNIX, "export": ""}, "nbd+unix://?socket=/a%20b"),
        ("nbd+unix:///%FF?socket=/a%20b", {"server": UNIX, "export": "\udcff"},
         "nbd+unix:///%FF?socket=/a%20b"),
        ("nbd:unix:/a b:exportname=x:y", {"server": UNIX, "export": "x:y"},
         "nbd+unix:///x%3Ay?socket=/a%20b"),
        ("nbd:[::1]:7", {"server": {"type": "inet", "host": "::1", "port": "7"}, "export": ""},
         "nbd://[::1]:7"),
        ("nbd+vsock://3:9/x", {"server": {"type": "vsock", "cid": "3", "port": "9"},
         "export": "x"}, "nbd+vsock://3:9/x"),
        ("nbds://me@h/x?tls-certificates=/c", {"server": {"type": "inet", "host": "h",
         "port": "10809"}, "export": "x", "tls": True, "tls-username": "me",
         "tls-certificates": "/c"},
         "nbds://h:10809/x?tls-certificates=/c&tls-username=me"),
    ],
)  # fmt: skip
def test_names(given: str, options: dict[str, Any], back: str) -> None:
    found = names.from_filename(given)
    assert found == {"driver": "nbd", **options}
    assert uri(names.flatten(found)) == back
    again = names.from_filename(back)
    assert again == found


@pytest.mark.parametrize(
    "given",
    ["nbd:", "nbd:h", "nbd:h:", "nbd::1", "nbd:unix:", "nbd://", "nbd:///x", "nbd://h:99999",
     "nbd+unix:///x", "nbd+unix://h/x?socket=/s", "nbd+unix:///x?socket=/s&more=1", "nbds:h:1",
     "nbd://h/x#y", "nbd+vsock://h/x", "nbd://[::1", "nbd://h/x?socket=/s"],
)  # fmt: skip
def test_what_is_no_name(given: str) -> None:
    with pytest.raises(UsageError, match="names no NBD export"):
        names.from_filename(given)


def test_no_descriptor_is_left(server: Server, name: str) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with diskwright.open(name) as disk:
            disk.read_at(0, 10)
    with pytest.raises(DiskError):
        diskwright.open(name.replace("disk", "none"))
    assert len(os.listdir("/proc/self/fd")) == len(before)
