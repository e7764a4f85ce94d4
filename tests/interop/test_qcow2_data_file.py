"""qcow2 images whose guest data are in a file of their own: ours and QEMU's tools in turns, and
what is refused."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import diskwright
from diskwright.errors import (
    CorruptImage,
    DiskError,
    MalformedImage,
    Refused,
    UsageError,
)
from interop.tools import ENV, OURS, run

Peer = Callable[[str], str]
KIB = 1 << 10
SIZE = 1500 * KIB + 512
L2 = 0x40000  # of an image of this size with clusters of 64 KiB


def made(folder: Path, **options: object) -> Path:
    path = folder / "image.qcow2"
    given = {"data_file": str(folder / "data"), **options}
    diskwright.create(str(path), format="qcow2", size=SIZE, options=given)
    return path


def patched(path: Path, offset: int, data: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(data)] = data
    path.write_bytes(whole)


def step(rng: random.Random, disk: diskwright.Disk, model: bytearray) -> str:
    """One request on our side; the same in qemu-io's words."""
    offset = rng.randrange(disk.size)
    length = min(rng.choice([1, 700, 4096, 65536, 200_000]), disk.size - offset)
    if rng.random() < 0.5:
        offset -= offset % 65536
    kind = rng.choice(["write", "write", "zero", "unmap", "discard"])
    if kind == "write":
        byte = rng.randrange(1, 255)
        disk.write_at(offset, bytes([byte]) * length)
        model[offset : offset + length] = bytes([byte]) * length
        return f"write -q -P {byte} {offset} {length}"
    if kind == "discard":
        offset, length = offset - offset % 65536, 65536
        length = min(length, disk.size - offset)
        disk.discard(offset, length)
        model[offset : offset + length] = bytes(length)
        return f"discard -q {offset} {length}"
    disk.zero(offset, length, unmap=kind == "unmap")
    model[offset : offset + length] = bytes(length)
    return f"write -q -z {'-u' if kind == 'unmap' else ''} {offset} {length}"


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 65536},
        {"cluster_size": 512},
        {"cluster_size": 65536, "data_file_raw": True},
        {"cluster_size": 4096, "data_file_raw": True, "lazy_refcounts": True},
        {"cluster_size": 65536, "preallocation": "metadata"},
        {"cluster_size": 1 << 20, "preallocation": "full"},
        {"cluster_size": 65536, "extended_l2": True},
        {"cluster_size": 16384, "extended_l2": True, "data_file_raw": True},
        {"cluster_size": 65536, "extended_l2": True, "preallocation": "metadata"},
    ],
)
def test_in_turns(options: dict[str, object], peer: Peer, tmp_path: Path) -> None:
    rng = random.Random(str(options))
    qemu_img, qemu_io = peer("qemu-img"), peer("qemu-io")
    path = made(tmp_path, **options)
    data = tmp_path / "data"
    raw = bool(options.get("data_file_raw"))
    model = bytearray(SIZE)
    for turn in range(3):
        with diskwright.open(str(path), writable=True, policy="trusted") as disk:
            words = [step(rng, disk, model) for _ in range(12)]
            if turn == 1:
                disk.resize(SIZE + 700 * KIB)
                model.extend(bytes(700 * KIB))
            if turn == 2:
                disk.resize(SIZE - 300 * KIB, shrink=True)
                del model[SIZE - 300 * KIB :]
        with diskwright.open(str(path), policy="trusted") as disk:
            assert disk.read_at(0, disk.size) == model
            assert disk.size == len(model) == data.stat().st_size
            ours = list(disk.extents())
        run([qemu_img, "check", "-q", path])
        for source in (path, data) if raw else (path,):
            format = "qcow2" if source is path else "raw"
            run([qemu_img, "convert", "-f", format, "-O", "raw", source, tmp_path / "out"])
            assert (tmp_path / "out").read_bytes() == model
        assert sum(part.length for part in ours) == len(model)
        words = [word for word in words if not word.startswith("discard")]
        # The same requests by qemu-io, in another order.
        rng.shuffle(words)
        fits = [w for w in words if sum(map(int, w.split()[-2:])) <= len(model)]
        run([qemu_io, "-f", "qcow2", *[part for w in fits for part in ("-c", w)], path])
        for word in fits:
            parts = word.split()
            offset, length = int(parts[-2]), int(parts[-1])
            byte = int(parts[parts.index("-P") + 1]) if "-P" in parts else 0
            model[offset : offset + length] = bytes([byte]) * length
        with diskwright.open(str(path), policy="trusted") as disk:
            assert disk.read_at(0, disk.size) == model
        assert not raw or data.read_bytes() == model


def test_what_is_made(peer: Peer, tmp_path: Path) -> None:
    """The same image file, to the byte, as qemu-img makes, and a file that was there is emptied."""
    wide = "data_file=data,extended_l2=on"
    for options in (
        "data_file=data",
        "data_file=data,data_file_raw=on",
        wide,
        f"{wide},data_file_raw=on",
        f"{wide},preallocation=metadata",
    ):
        (tmp_path / "data").write_bytes(b"x" * (2 << 20))
        for tool, name in (([peer("qemu-img")], "theirs"), (OURS, "ours")):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            command = ["create", "-q", "-f", "qcow2", "-o", options, "image", "1M"]
            run(["env", "-C", folder, *tool, *command])
        theirs, ours = ((tmp_path / name / "image").read_bytes() for name in ("theirs", "ours"))
        assert ours == theirs
        assert (tmp_path / "ours/data").read_bytes() == bytes(1 << 20)


def test_relative_to_the_image(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "image"
    diskwright.create(str(path), format="qcow2", size=SIZE, options={"data_file": "data"})
    assert (tmp_path / "sub" / "data").stat().st_size == SIZE
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        disk.write_at(0, b"x")
    assert (tmp_path / "sub" / "data").read_bytes()[:2] == b"x\0"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"data_file_raw": True}, "data-file-raw requires data-file"),
        ({"data_file": "d", "compat": "0.10"}, "External data files are only supported with"),
        (
            {"data_file": "d", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
            "Backing file and data-file-raw cannot be used at the same time",
        ),
        ({"data_file": ""}, "Could not create ''"),
        ({"data_file": "nbd://host/x"}, "is no plain file"),
        ({"data_file": "image"}, "is a file of the image already"),
        ({"data_file": "missing/d"}, "No such file"),
    ],
)
def test_refused_at_creation(options: dict[str, object], text: str, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(bytes(SIZE))
    before = sorted(tmp_path.iterdir())
    with pytest.raises((DiskError, OSError), match=text):
        diskwright.create(str(tmp_path / "image"), format="qcow2", size=SIZE, options=options)
    assert sorted(tmp_path.iterdir()) == before


def test_the_gate(tmp_path: Path) -> None:
    path = made(tmp_path)
    with pytest.raises(Refused, match="opens no data file"):
        diskwright.open(str(path), policy="untrusted")
    named = {"data-file.driver": "file", "data-file.filename": str(tmp_path / "data")}
    with diskwright.open(str(path), options=named, writable=True, policy="untrusted") as disk:
        disk.write_at(4096, b"there")
    assert (tmp_path / "data").read_bytes()[4096:4101] == b"there"
    # What an image tells of itself needs no data file, and opens none.
    (tmp_path / "data").unlink()
    text = run([*OURS, "info", path], env=ENV)
    assert f"data file: {tmp_path / 'data'}" in text
    assert "data file raw: false" in text


def test_locks(tmp_path: Path) -> None:
    """A data file cannot be cut off while an image uses it."""
    path = made(tmp_path)
    with diskwright.open(str(path), policy="trusted"):
        data = tmp_path / "data"
        with diskwright.open(str(data), format="raw", writable=True) as raw:
            raw.write_at(0, b"it is shared")
        text = run([*OURS, "resize", "-f", "raw", "--shrink", data, "512"], status=1)
    assert 'Failed to get "resize" lock' in text


ENTRY_ERRORS = [
    (0x8000_0000_0003_0000, "External data file host cluster offset 0x30000 does not match"),
    (0x4000_0000_0002_0000, "Compressed cluster entry found in image with external data file"),
    (0x8000_0000_0002_0200, "unaligned"),
]


@pytest.mark.parametrize(("entry", "text"), ENTRY_ERRORS)
def test_broken_entries(entry: int, text: str, tmp_path: Path) -> None:
    path = made(tmp_path)
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        disk.write_at(0, b"x" * (256 * KIB))
    patched(path, L2 + 16, struct.pack(">Q", entry))
    with diskwright.open(str(path), policy="trusted") as disk:
        assert disk.read_at(64 * KIB, 10) == b"x" * 10
        with pytest.raises(CorruptImage, match=text):
            disk.read_at(128 * KIB, 512)
    data = (tmp_path / "data").read_bytes()
    with (
        diskwright.open(str(path), writable=True, policy="trusted") as disk,
        pytest.raises(CorruptImage, match=text),
    ):
        disk.write_at(100 * KIB, b"y" * (64 * KIB))
    assert (tmp_path / "data").read_bytes() == data
    assert path.read_bytes()[79] & 2  # it is marked


def test_hostile_headers(tmp_path: Path) -> None:
    path = made(tmp_path)
    whole = path.read_bytes()
    patched(path, 112, b"XATA")
    with pytest.raises(MalformedImage, match="'data-file' is required for this image"):
        diskwright.open(str(path), policy="trusted")
    path.write_bytes(whole)
    patched(path, 79, b"\0")
    named = {"data-file.driver": "file", "data-file.filename": str(tmp_path / "data")}
    with pytest.raises(UsageError, match="can only be set for images with an external data file"):
        diskwright.open(str(path), options=named)
    patched(path, 95, b"\2")
    with pytest.raises(MalformedImage, match="data-file-raw requires a data file"):
        diskwright.open(str(path), policy="trusted")


@pytest.mark.parametrize("name", ["image.qcow2", "json:{}", "loop", "."])
def test_hostile_names(name: str, tmp_path: Path) -> None:
    """Whatever an image calls its data file: it is no other format, and not the image itself."""
    (tmp_path / "loop").symlink_to("image.qcow2")
    path = tmp_path / "image.qcow2"
    diskwright.create(str(path), format="qcow2", size=SIZE, options={"data_file": "x" * len(name)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"x" * len(name), name.encode(), 1))
    before = path.read_bytes()
    with pytest.raises((DiskError, OSError)):
        diskwright.open(str(path), writable=True, policy="trusted")
    assert path.read_bytes() == before


def test_compressed_and_rebased(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"words " * 40_000)
    command = [*OURS, "convert", "-c", "-f", "raw", "-O", "qcow2"]
    text = run([*command, "-o", "data_file=d", source, tmp_path / "copy"], status=1)
    assert "Operation not supported" in text
    path = made(tmp_path, data_file_raw=True)
    text = run([*OURS, "rebase", "-u", "-b", "foo", "-F", "raw", path], status=1)
    assert "Could not change the backing file to 'foo': Invalid argument" in text


def test_commit_gives_back(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(bytes([1]) * SIZE)
    path = made(tmp_path, backing_file=str(base), backing_fmt="raw")
    with diskwright.open(str(path), writable=True, policy="trusted") as disk:
        disk.write_at(100 * KIB, b"z" * (200 * KIB))
    run([*OURS, "commit", path])
    assert base.read_bytes()[100 * KIB : 300 * KIB] == b"z" * (200 * KIB)
    with diskwright.open(str(path), policy="trusted") as disk:
        assert not any(part.present and part.depth == 0 for part in disk.extents())
    assert (tmp_path / "data").read_bytes() == bytes(SIZE)
