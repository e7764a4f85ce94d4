"""Which files are taken for VMDK descriptors, beside qemu-img."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diskwright
from diskwright.errors import ImageError
from diskwright.graph.probe import PROBE_BYTES, guess, matches

from .tools import shell

TITLE = b"# Disk DescriptorFile\n"
# (content, qemu-img finds it, we find it)
HEADS = [
    (TITLE + b"version=1\n", True, True),
    (b"version=1\n", True, True),
    (b"version=2\n", True, True),
    (b"version=3\r\n", True, True),
    (b"# a comment\r\nversion=1\r\n", True, True),
    (b"# a\n   \n#\nversion=2\n", True, True),
    (b"# disk descriptorfile\nversion=1\n", True, True),
    (b"#\0\nversion=1\n", True, True),
    (b"#" + b"x" * 480 + b"\nversion=1\n", True, True),
    (TITLE, False, True),
    (TITLE + b'\nencoding="UTF-8"\nversion=1\n', False, True),
    (TITLE + b"CID=12345678\nversion=1\n", False, True),
    (b"\xef\xbb\xbf" + TITLE + b"version=1\n", False, True),
    (b"\xef\xbb\xbfversion=1\n", False, True),
    (b"\n\nversion=1\n", False, True),
    (b"\r\n\t\r\nversion=1\r\n", False, True),
    (b"  # comment\n  version = 1 \n", False, True),
    (b"Version=1\n", False, True),
    (b"version=1", False, True),
    (b"#" + b"x" * 600 + b"\nversion=1\n", False, False),
    (b"version=4\n", False, False),
    (b"version=10\n", False, False),
    (b"version=1x\n", False, False),
    (b"version\n", False, False),
    (b"# comment\nCID=1\nversion=1\n", False, False),
    (b"#" * 512, False, False),
    (b"\n" * 512, False, False),
    (b"#\r\n" * 170, False, False),
    (bytes(512), False, False),
    (b"#!/bin/sh\nversion=1 foo\n", False, False),
    (b"KDMV", True, True),
    (b"COWD\1\0\0\0", True, True),
    (b"\xbe\xba\xfe\xca\0\0\0\0", False, True),
    (b"\xca\xfe\xba\xbe\0\0\0\0", False, False),
    (b"KDM", False, False),
    (b"vhdxfil", False, False),
]


@pytest.mark.parametrize("head", HEADS)
def test_vmdk_is_found_where_qemu_finds_it_and_more(head: Any, tmp_path: Path, peer: Any) -> None:
    content, theirs, ours = head
    assert ("vmdk" in matches(content[:PROBE_BYTES])) is ours
    padded = content[:PROBE_BYTES].ljust(PROBE_BYTES, b"\0")
    if b"=" not in content or content.endswith(b"\n"):
        assert ("vmdk" in matches(padded)) is ours
    (tmp_path / "x").write_bytes(content)
    said = shell(tmp_path, peer("qemu-img"), "info", "x", ok=False)
    assert ("file format: raw" not in said) is theirs


def test_the_end_is_looked_at() -> None:
    blank = bytes(PROBE_BYTES)
    for magic, name in ((b"conectix", "vpc"), (b"koly", "dmg")):
        tail = magic.ljust(PROBE_BYTES, b"\0")
        assert matches(blank, tail) == {name: False}
        assert guess(blank, tail, False) == name
        with pytest.raises(ImageError, match=f"only its end looks like {name}"):
            guess(blank, tail, True)
        assert matches(tail, b"") == ({name: True} if name == "vpc" else {})
        assert matches(blank, tail[: len(magic)]) == {}
    early = b"\0conectix".ljust(PROBE_BYTES, b"\0")
    assert matches(blank, early) == {"vpc": False}
    both = b"conectix".ljust(PROBE_BYTES, b"\0")
    assert guess(both, both, True) == "vpc"
    assert guess(blank, blank, True) == guess(b"", b"", True) == "raw"


def test_what_looks_like_two_formats_is_none() -> None:
    qcow2 = b"QFI\xfb\0\0\0\3".ljust(64, b"\0") + b"\x7f\x10\xda\xbe"
    with pytest.raises(ImageError, match=r"several formats \(qcow2, vdi\); the format must be"):
        guess(qcow2, b"", False)
    with pytest.raises(ImageError, match="qcow2, vpc"):
        guess(qcow2[:64], b"conectix".ljust(512, b"\0"), False)
    assert matches(b"QFI\xfb\0\0\0\1") == {"qcow": True}


def test_a_guessed_raw_disk_keeps_its_end_plain(tmp_path: Path) -> None:
    path = tmp_path / "a"
    diskwright.create(path, format="raw", size=1 << 20)
    last = (1 << 20) - PROBE_BYTES
    with diskwright.open(path, writable=True) as disk:
        footer = b"conectix".ljust(PROBE_BYTES, b"\0")
        for offset, data in ((last, b"koly"), (last - 4096, bytes(4096) + footer)):
            with pytest.raises(PermissionError, match="by guess"):
                disk.write_at(offset, data)
        disk.write_at(last, b"xkoly")
        with pytest.raises(PermissionError):
            disk.write_at(last, b"kolykoly"[4:])
        disk.write_at(last - 4096, b"koly")
        with pytest.raises(PermissionError):  # a cut would make it the end
            disk.resize(last - 4096 + PROBE_BYTES, shrink=True)
        disk.zero(last - 4096, 4)
        disk.resize(last - 4096 + PROBE_BYTES, shrink=True)
    with diskwright.open(path, format="raw", writable=True) as disk:
        disk.write_at(disk.size - PROBE_BYTES, b"koly")
    with pytest.raises(ImageError, match="only its end"):
        diskwright.open(path, writable=True)
