"""Which files are taken for VMDK descriptors, beside qemu-img."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diskwright.graph.probe import PROBE_BYTES, probe

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
    assert (probe(content[:PROBE_BYTES]) == "vmdk") is ours
    padded = content[:PROBE_BYTES].ljust(PROBE_BYTES, b"\0")
    if b"=" not in content or content.endswith(b"\n"):
        assert (probe(padded) == "vmdk") is ours
    (tmp_path / "x").write_bytes(content)
    said = shell(tmp_path, peer("qemu-img"), "info", "x", ok=False)
    assert ("file format: raw" not in said) is theirs
