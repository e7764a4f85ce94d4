"""streamOptimized images in both directions: QEMU, libvmdk and 7-Zip read ours, we read QEMU's."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interop.tools import OURS, TRUSTED, assert_bytes, run
from sansio.streamwalk import walk

Peer = Callable[[str], str]
GRAIN = 65536
STREAM = ["-O", "vmdk", "-o", "subformat=streamOptimized"]


def source(path: Path, size: int, seed: int) -> bytes:
    """A raw file with holes, text and noise."""
    rng = random.Random(seed)
    data = bytearray(size)
    for _ in range(max(size >> 18, 1)):
        at = rng.randrange(size)
        n = min(rng.randrange(1, 200_000), size - at)
        data[at : at + n] = rng.randbytes(n) if rng.random() < 0.4 else (b"some words " * n)[:n]
    path.write_bytes(data)
    return bytes(data)


def libvmdk_bytes(libvmdk: Any, path: Path) -> bytes:
    """The disk as libvmdk reads it."""
    handle = libvmdk.handle()
    handle.open(str(path))
    handle.open_extent_data_files()
    size = handle.get_media_size()
    data: bytes = handle.read_buffer_at_offset(size, 0)
    handle.close()
    return data


SIZES = [512, GRAIN, 3 * GRAIN + 512, 5 << 20, (32 << 20) + 3584, 70 << 20]


@pytest.mark.parametrize("size", SIZES)
def test_ours_is_read_by_others(size: int, peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    data = source(tmp_path / "source.raw", size, size)
    path = tmp_path / "x.vmdk"
    run([*OURS, "convert", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    capacity, grains = walk(path.read_bytes())
    assert capacity * 512 == size
    assert all(any(grain) for grain in grains.values())
    run([peer("qemu-img"), "check", "-q", "-f", "vmdk", path])
    run([peer("qemu-img"), "compare", "-q", "-f", "raw", "-F", "vmdk", tmp_path / "source.raw",
         path])  # fmt: skip
    assert_bytes(libvmdk_bytes(libvmdk, path), data, "libvmdk")
    run([*OURS, "check", "-q", "-f", "vmdk", path])
    run([*OURS, "convert", "-f", "vmdk", "-O", "raw", path, tmp_path / "back.raw"])
    assert_bytes((tmp_path / "back.raw").read_bytes(), data, "ours")


def test_7zip_reads_ours(peer: Peer, tmp_path: Path) -> None:
    tool = peer("7z")
    data = source(tmp_path / "source.raw", (5 << 20) + 512, 3)
    path = tmp_path / "x.vmdk"
    run([*OURS, "convert", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    text = run([tool, "t", path])
    assert "Everything is Ok" in text and "WARNING" not in text.upper()
    done = subprocess.run([tool, "x", "-so", "-tvmdk", str(path)], capture_output=True, timeout=60)
    assert_bytes(done.stdout, data, "7-Zip")


@pytest.mark.parametrize("seed", range(4))
def test_we_read_qemus(seed: int, peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(seed)
    size = rng.choice((GRAIN, 6 << 20, 40 << 20)) + rng.randrange(8) * 512
    data = source(tmp_path / "source.raw", size, seed)
    path = tmp_path / "x.vmdk"
    run([peer("qemu-img"), "convert", "-c", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    run([*OURS, "check", "-q", "-f", "vmdk", path])
    run([*OURS, "convert", "-f", "vmdk", "-O", "raw", path, tmp_path / "ours.raw"])
    assert_bytes((tmp_path / "ours.raw").read_bytes(), data, "ours")
    info = json.loads(run([*OURS, "info", "--output=json", path]))
    theirs = json.loads(run([peer("qemu-img"), "info", "--output=json", path]))
    for key in ("virtual-size", "cluster-size", "format-specific"):
        assert info[key] == theirs[key]


def test_qemus_streams_lack_what_ours_have(peer: Peer, tmp_path: Path) -> None:
    """QEMU 10 writes neither footer nor end of stream, and its directory stands in front: no
    program could take it from a pipe.  (ESXi refuses such a file where it is empty.)"""
    source(tmp_path / "source.raw", 5 << 20, 1)
    theirs, ours = tmp_path / "theirs.vmdk", tmp_path / "ours.vmdk"
    words = ["-f", "raw", *STREAM, tmp_path / "source.raw"]
    run([peer("qemu-img"), "convert", "-c", *words, theirs])
    run([*OURS, "convert", *words, ours])
    walk(ours.read_bytes())
    with pytest.raises(AssertionError):
        walk(theirs.read_bytes())
    run([peer("qemu-img"), "create", "-q", "-f", "vmdk", *STREAM[2:], theirs, "1G"])
    run([*OURS, "create", "-q", "-f", "vmdk", *STREAM[2:], ours, "1G"])
    assert walk(ours.read_bytes()) == (1 << 21, {})
    with pytest.raises(AssertionError):
        walk(theirs.read_bytes())
    run([peer("qemu-img"), "check", "-q", ours])


def test_our_file_is_not_larger(peer: Peer, tmp_path: Path) -> None:
    """By no more than 6 percent at our level (QEMU's is zlib's default)."""
    text = b"".join(sorted(p.read_bytes() for p in Path(json.__file__).parent.parent.glob("*.py")))
    (tmp_path / "source.raw").write_bytes(text[: len(text) // 512 * 512])
    theirs, ours = tmp_path / "theirs.vmdk", tmp_path / "ours.vmdk"
    words = ["-f", "raw", *STREAM, tmp_path / "source.raw"]
    run([peer("qemu-img"), "convert", "-c", *words, theirs])
    run([*OURS, "convert", *words, ours])
    assert os.path.getsize(ours) < os.path.getsize(theirs) * 1.06


def test_a_stream_goes_through_a_pipe(tmp_path: Path) -> None:
    """Nothing is ever revisited."""
    from diskwright.formats.vmdk.stream.writer import StreamOptimized

    data = source(tmp_path / "source.raw", 3 << 20, 9)
    reading, writing = os.pipe()
    got: list[bytes] = []

    def drain() -> None:
        with os.fdopen(reading, "rb") as file:
            got.append(file.read())

    thread = threading.Thread(target=drain)
    thread.start()
    writer = StreamOptimized(len(data), b"# Disk DescriptorFile\nversion=1\n")
    with os.fdopen(writing, "wb") as file:
        file.writelines(writer.head())
        for index in range(len(data) // GRAIN):
            grain = data[index * GRAIN : (index + 1) * GRAIN]
            if any(grain):
                file.writelines(writer.put(index, writer.codec.pack(grain)))
        file.writelines(writer.end())
    thread.join(30)
    grains = walk(got[0])[1]
    assert b"".join(grains.get(i, bytes(GRAIN)) for i in range(len(data) // GRAIN)) == data


def test_writing_is_refused(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    source(tmp_path / "source.raw", 1 << 20, 2)
    run([*OURS, "convert", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    before = path.read_bytes()
    text = run([*OURS, "io", "-f", "vmdk", "-c", "write 0 4k", path], status=1, env=TRUSTED)
    assert "convert the image" in text
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 512, 1024, 70_000])
def test_a_truncated_file_is_told_of(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    source(tmp_path / "source.raw", 4 << 20, 4)
    run([*OURS, "convert", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    os.truncate(path, path.stat().st_size - cut)
    text = run([*OURS, "info", path], status=1)
    assert "footer" in text


def test_another_grain_in_its_place(peer: Peer, tmp_path: Path) -> None:
    """QEMU 10 does not look at the sector in a grain's header."""
    path = tmp_path / "x.vmdk"
    (tmp_path / "source.raw").write_bytes(b"abc " * 32768)
    run([*OURS, "convert", "-f", "raw", *STREAM, tmp_path / "source.raw", path])
    with path.open("r+b") as file:
        file.seek(65536)
        file.write((128).to_bytes(8, "little"))
    run([peer("qemu-io"), "-r", "-f", "vmdk", "-c", "read 0 4k", path])
    text = run([*OURS, "io", "-r", "-f", "vmdk", "-c", "read 0 4k", path], status=1)
    assert "belongs to sector 128" in text
    assert "belongs to sector 128" in run([*OURS, "check", "-f", "vmdk", path], status=2)
