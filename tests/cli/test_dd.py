"""``dd`` beside the real one: what it copies, what it says, how it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.support import Pair, ours, real

Peer = Callable[[str], str]
BYTES = os.urandom(10_000)


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Path:
    folder = tmp_path_factory.mktemp("origin")
    (folder / "a").write_bytes(BYTES)
    (folder / "e").write_bytes(b"")
    img = peer("qemu-img")
    assert real(img, "convert", "-O", "qcow2", "a", "a.qcow2", cwd=folder).status == 0
    assert real(img, "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "over.qcow2",
                "1M", cwd=folder).status == 0  # fmt: skip
    return folder


@pytest.fixture
def pair(tmp_path: Path, peer: Peer, origin: Path) -> Pair:
    return Pair(tmp_path, peer("qemu-img"), origin)


DONE = """
if=a of=o
-- if=a of=o
if=a of=o bs=512 count=3
if=a of=o bs=1000
if=a of=o bs=1000 count=3 skip=2
if=a of=o bs=1000 skip=2
if=a of=o bs=1000 skip=10
if=a of=o bs=1000 count=3 skip=3
if=a of=o bs=1000 count=3 skip=5
if=a of=o bs=1000 skip=11
if=a of=o bs=512 skip=20
if=e of=o
if=e of=o skip=1
if=a of=o count=0
if=a of=o bs=1G count=1
if=a of=o bs=1.5k count=1
if=a of=o bs=0x10 count=0x1
if=a of=o count=999999999999999999 bs=1M
if=a of=o skip=999999999999999999 bs=1M
skip=2 skip=1 if=e if=a of=o
-f raw --output-format=raw -U if=a of=o bs=64k
--image-opts if=driver=raw,file.filename=a of=o
if=over.qcow2 of=o bs=3000 skip=1 count=40
-f qcow2 -O qcow2 if=a.qcow2 of=o bs=1000 skip=1 count=7
-f qcow2 -O vmdk if=over.qcow2 of=o bs=4k
--object secret,id=x,data=y if=a of=o
""".strip().splitlines()

REFUSED = """
if=a of=o bs=0
if=a of=o bs=-1
if=a of=o bs=3G count=1
if=a of=o bs=8E
if=a of=o bs=abc
if=a of=o bs=
if=a of=o count=-1
if=a of=o count=1k
if=a of=o count=1.5
if=a of=o skip=x
if=a of=o skip=9999999999999999999
if=a of=o seek=1
if=a of=o bs
if=a of=o =3
if=a
of=o
if=nope of=o bs=x
if=nope of=o -O nope
if=nope foo=x
if=a of=o -O nope
if=a of=o -O luks
if=a of=/nonexistent/o
if=a of=o -f raw --image-opts
if=a of=o -q
if=a of=o -f
""".strip().splitlines()


@pytest.mark.parametrize("line", DONE)
def test_the_same_image(pair: Pair, line: str) -> None:
    assert pair.same("dd", *line.split()).status == 0
    if "-O" not in line:
        assert (pair.mine / "o").read_bytes() == (pair.theirs / "o").read_bytes()
        return
    told = real(pair.tool, "compare", "-s", str(pair.mine / "o"), str(pair.theirs / "o"))
    # Of what is not written where it reads as zeroes they may differ, not of size and content.
    assert told.status == 0 or b"block status mismatch" in told.out, told


@pytest.mark.parametrize("line", REFUSED)
def test_refused_in_the_same_words(pair: Pair, line: str) -> None:
    assert pair.same("dd", *line.split()).status == 1
    assert not (pair.mine / "o").exists()


def test_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    assert ours("dd", "if=a", "of=o", "bs=1000", "skip=2", "count=9", cwd=tmp_path).status == 0
    expected = BYTES[2000:9000]
    assert (tmp_path / "o").read_bytes() == expected + bytes(-len(expected) % 512)


def test_never_into_its_own_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    (tmp_path / "b").symlink_to("a")
    for target in ("a", "b"):
        told = ours("dd", "-U", "if=a", f"of={target}", cwd=tmp_path)
        assert told.status == 1 and b"error while creating output image" in told.err
    assert (tmp_path / "a").read_bytes() == BYTES


def test_a_source_that_cannot_be_read_leaves_no_image(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BYTES)
    (tmp_path / "rules").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
    told = ours("dd", "if=blkdebug:rules:a", "of=o", cwd=tmp_path)
    assert told.status == 1
    assert told.err == b"qemu-img: error while reading from input image file: Input/output error\n"
    assert not (tmp_path / "o").exists()
