"""Compressed qcow2 through the commands, beside qemu-img."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import diskwright
from peers import find_peer

SOURCE = str(Path(diskwright.__file__).parents[1])
SIZE = (3 << 20) + 1536
OPTIONS = [
    "compression_type=zlib",
    "compression_type=zstd,cluster_size=2M",
    "compression_type=zlib,cluster_size=512,refcount_bits=2",
]


def content(seed: int, size: int = SIZE) -> bytes:
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        count = rng.randrange(1, 200_000)
        kind = rng.random()
        if kind < 0.3:
            out += bytes(count)
        elif kind < 0.5:
            out += rng.randbytes(count)
        else:
            out += (b"%x " % rng.getrandbits(64) * (count // 8 + 1))[:count]
    return bytes(out[:size])


def tool(name: str, *arguments: object, status: int = 0, folder: Path) -> str:
    program = [sys.executable, "-m", "diskwright"] if name == "dw" else [find_peer(name)]
    done = subprocess.run(
        [*program, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": SOURCE, "DISKWRIGHT_POLICY": "trusted"},
    )
    assert done.returncode == status, (arguments, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("options", OPTIONS)
def test_convert_packs_what_qemu_img_reads(tmp_path: Path, options: str) -> None:
    (tmp_path / "a").write_bytes(content(1))
    for name, flags in (("one", ["-W", "-m", "3"]), ("two", ["-S", "0"]), ("three", [])):
        tool("dw", "convert", "-c", *flags, "-f", "raw", "-O", "qcow2", "-o", options, "a", name,
             folder=tmp_path)  # fmt: skip
        tool("qemu-img", "check", name, folder=tmp_path)
        tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "a", name, folder=tmp_path)
    theirs = ("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, "a", "theirs")
    tool("qemu-img", *theirs, folder=tmp_path)
    tool("dw", "compare", "theirs", "three", folder=tmp_path)
    found = [
        json.loads(tool("dw", "check", "--output=json", name, folder=tmp_path))
        for name in ("theirs", "three")
    ]
    assert found[0]["compressed-clusters"] == found[1]["compressed-clusters"] > 0
    if options != OPTIONS[0]:
        return  # a cluster more or less is much there
    ours, other = ((tmp_path / name).stat().st_size for name in ("three", "theirs"))
    assert ours < 1.1 * other + 65536


def test_several_sources_and_overlays_are_packed_in_whole_clusters(tmp_path: Path) -> None:
    a, b = content(2, 700_000 // 512 * 512), content(3, 1 << 20)
    (tmp_path / "a").write_bytes(a)
    (tmp_path / "b").write_bytes(b)
    tool("dw", "convert", "-c", "-f", "raw", "-O", "qcow2", "a", "b", "joined", folder=tmp_path)
    (tmp_path / "both").write_bytes(a + b)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "both", "joined", folder=tmp_path)
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "joined", "-F", "qcow2", "over",
         folder=tmp_path)  # fmt: skip
    tool("qemu-io", "-c", "write -P 1 1k 3k", "-c", "write -P 2 1000k 99k", "-c",
         "write -z 64k 1k", "over", folder=tmp_path)  # fmt: skip
    tool("dw", "convert", "-c", "-O", "qcow2", "-B", "joined", "-F", "qcow2", "over", "packed",
         folder=tmp_path)  # fmt: skip
    tool("qemu-img", "compare", "over", "packed", folder=tmp_path)
    tool("qemu-img", "check", "packed", folder=tmp_path)
    mapped = json.loads(tool("qemu-img", "map", "--output=json", "packed", folder=tmp_path))
    assert {part["depth"] for part in mapped} == {0, 1}
    tool("dw", "commit", "packed", folder=tmp_path)
    tool("qemu-img", "check", "joined", folder=tmp_path)
    tool("qemu-img", "compare", "over", "joined", folder=tmp_path)


def test_compressed_requests_are_refused_where_qemu_io_refuses_them(tmp_path: Path) -> None:
    commands = [
        "write -c -P 1 0 64k", "write -c -P 2 0 64k", "write -P 3 64k 64k", "write -c 64k 64k",
        "write -z 128k 64k", "write -c -P 5 128k 64k", "write -c 1k 64k", "write -c 256k 32k",
        "write -c -P 7 960k 40k", "write -c -P 6 256k 128k", "write -c 320k 64k",
        "write -P 9 300k 1k", "read -P 6 301k 80k", "write -q 0 1", "discard 0 64k",
        "write -c -P 8 0 64k",
    ]  # fmt: skip
    flags = [part for command in commands for part in ("-c", command)]
    said = []
    for name, io in (("ours", ["dw", "io"]), ("theirs", ["qemu-io"])):
        tool("qemu-img", "create", "-q", "-f", "qcow2", name, "1000k", folder=tmp_path)
        out = tool(*io, *flags, name, status=1, folder=tmp_path)
        said.append([line for line in out.splitlines() if " ops" not in line])
    assert said[0] == said[1]
    tool("qemu-img", "compare", "ours", "theirs", folder=tmp_path)
    tool("qemu-img", "check", "ours", folder=tmp_path)
    kinds = []
    for name in ("ours", "theirs"):
        mapped = json.loads(tool("dw", "map", "--output=json", name, folder=tmp_path))
        kinds.append([(part["start"], part["compressed"]) for part in mapped])
    assert kinds[0] == kinds[1]
