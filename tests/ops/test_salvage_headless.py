"""``salvage`` of images with features whose header is gone: found again, or said by the caller."""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diskwright
from cli.support import ours
from diskwright.errors import DiskError
from ops.test_salvage import SIZE, Made, header_zeroed, l1_zeroed

KEY = {"s": b"abc"}
KINDS: dict[str, dict[str, Any]] = {
    "extended": {"extended_l2": True, "cluster_size": 16384},
    "data-file": {"data_file": "data"},
    "both": {"extended_l2": True, "cluster_size": 16384, "data_file": "data"},
    "luks": {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10},
    "aes": {"encrypt.format": "aes", "encrypt.key-secret": "s"},
}
NEEDED = {"data-file": {"data_file"}, "both": {"data_file"}, "luks": {"encrypt.key-secret"},
          "aes": {"encrypt.format", "encrypt.key-secret"}}  # fmt: skip
"""What cannot be found."""


def made(folder: Path, kind: str) -> tuple[Made, dict[str, Any], dict[str, Any]]:
    """A disk written in order; what may be assumed of it; what opening it needs."""
    options = {"cluster_size": 4096, **KINDS[kind]}
    if "data_file" in options:
        options["data_file"] = str(folder / "data")
    keys: dict[str, Any] = {}
    if "encrypt.format" in options:
        pytest.importorskip("cryptography")
        keys = {"secrets": KEY}
    path, unit = folder / "a.qcow2", options["cluster_size"]
    diskwright.create(path, format="qcow2", size=SIZE, options=options, **keys)
    rng = random.Random(6)
    disk = bytearray(SIZE)
    opened = {"encrypt.key-secret": "s"} if keys else {}
    with diskwright.open(
        path, format="qcow2", writable=True, options=opened, policy="trusted", **keys
    ) as image:
        for place in sorted(rng.sample(range(SIZE // unit), 300)):
            part = rng.randrange(1, unit // 512) * 512 if "extended" in kind else unit
            data = rng.randbytes(part)
            image.write_at(place * unit, data)
            disk[place * unit : place * unit + part] = data
    return Made(path, bytes(disk)), {k: v for k, v in options.items() if "iter" not in k}, keys


def saved(
    m: Made, folder: Path, assume: dict[str, Any], **keys: Any
) -> tuple[Any, list[int], list[int]]:
    """The result; sectors that differ, and those of which nothing is said."""
    m.path.write_bytes(m.file)
    done = diskwright.salvage(
        m.path,
        folder / "out",
        target_format="raw",
        format="qcow2",
        force=True,
        assume=assume,
        **keys,
    )
    back = (folder / "out").read_bytes().ljust(SIZE, b"\0")
    told = bytearray(SIZE)
    for part in done.map.parts:
        told[part.start : part.start + part.length] = b"\1" * part.length
    told[done.size :] = b"\1" * (SIZE - done.size)
    wrong = [i for i in range(0, SIZE, 512) if back[i : i + 512] != m.disk[i : i + 512]]
    return done, wrong, [i for i in wrong if not told[i]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("l1", ["kept", "lost"])
def test_a_header_with_features(tmp_path: Path, kind: str, l1: str) -> None:
    """All of the disk, whether the caller says everything or only what nothing tells."""
    m, options, keys = made(tmp_path, kind)
    if l1 == "lost":
        l1_zeroed(m)
    m.zero(0, 4096)
    needed = {k: options[k] for k in NEEDED.get(kind, ())}
    for assume in (needed, {**options, "extended_l2": "extended_l2" in options, "size": SIZE}):
        done, wrong, _ = saved(m, tmp_path, assume, **keys)
        assert not wrong and not done.lost, (assume, done.remarks)
        assert done.size == SIZE or "size" not in assume
        if kind in ("data-file", "both"):
            assert done.size == SIZE
            continue
        assert all(part.state == "guessed" for part in done.map.parts)


@pytest.mark.parametrize("kind", ["data-file", "luks", "extended"])
def test_what_must_be_said_is_asked_for(tmp_path: Path, kind: str) -> None:
    m, _, _ = made(tmp_path, kind)
    header_zeroed(m)
    if kind == "data-file":
        with pytest.raises(DiskError, match=r"external data file.*data_file"):
            saved(m, tmp_path, {})
        return
    if kind == "luks":
        with pytest.raises(DiskError, match=r"encryption header.*encrypt\.key-secret"):
            saved(m, tmp_path, {})
        done, wrong, _ = saved(m, tmp_path, {"encrypt.format": "none"})  # as it is stored
        assert wrong and not done.lost
        return
    for assume, problem in (
        ({"cluster_size": 1000}, "power of two"),
        ({"cluster_size": 4096, "extended_l2": True}, "16 KiB"),
        ({"refcount_bits": 16}, "cannot be assumed"),
        ({"compat": "4"}, "compatibility level"),
        ({"backing_file": "b"}, "together"),
    ):
        with pytest.raises(DiskError, match=problem):
            saved(m, tmp_path, assume)
    with pytest.raises(DiskError, match="say it with -f"):
        diskwright.salvage(m.path, tmp_path / "new", assume={"size": SIZE})


def test_a_pointer_to_the_encryption_header(tmp_path: Path) -> None:
    """The extension is gone: the header itself is found."""
    m, _, keys = made(tmp_path, "luks")
    at = bytes(m.file[:4096]).index(struct.pack(">II", 0x0537BE77, 16))
    luks = struct.unpack_from(">Q", m.file, at + 8)[0]
    m.put(at, (0x1234 << 32) | 16)
    done, wrong, _ = saved(m, tmp_path, {"encrypt.key-secret": "s"}, **keys)
    assert not wrong and not done.lost and f"found at {luks:#x}" in "".join(done.remarks)


def test_a_header_that_contradicts_is_not_believed(tmp_path: Path) -> None:
    m, _, _ = made(tmp_path, "extended")
    m.file[20:24] = struct.pack(">I", 13)
    m.put(72, 0)
    done, wrong, _ = saved(m, tmp_path, {"cluster_size": 16384, "extended_l2": True})
    assert not wrong and not done.lost and "not believed" in done.remarks[0]


def test_zstd_is_told_by_its_look(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    disk = b"".join(bytes([i % 251]) * 4096 for i in range(SIZE // 4096))
    (tmp_path / "raw").write_bytes(disk)
    line = "convert -c -f raw -O qcow2 -o cluster_size=4k,compression_type=zstd raw a.qcow2"
    assert ours(*line.split(), cwd=tmp_path).status == 0
    m = Made(tmp_path / "a.qcow2", disk)
    m.zero(0, 4096)
    done, wrong, _ = saved(m, tmp_path, {"cluster_size": "4k"})
    assert not wrong and not done.lost and "zstd" in "".join(done.remarks)


def test_a_backing_file_by_hand(tmp_path: Path) -> None:
    """Holes of an overlay without header are those of the backing file that is said."""
    base = tmp_path / "base"
    base.write_bytes(b"B" * SIZE)
    diskwright.create(
        tmp_path / "a.qcow2", format="qcow2", size=SIZE, options={"cluster_size": 4096}
    )
    with diskwright.open(tmp_path / "a.qcow2", format="qcow2", writable=True) as image:
        image.write_at(4096, b"x" * 4096)
        image.write_at(SIZE - 4096, b"y" * 4096)
    disk = b"B" * 4096 + b"x" * 4096 + b"B" * (SIZE - 12288) + b"y" * 4096
    m = Made(tmp_path / "a.qcow2", disk)
    header_zeroed(m)
    known = {"size": SIZE, "backing_file": str(base), "backing_fmt": "raw", "cluster_size": 4096}
    done, wrong, _ = saved(m, tmp_path, known)
    assert not wrong and done.guessed and not done.lost


def test_the_command_line(tmp_path: Path) -> None:
    m, _, _ = made(tmp_path, "luks")
    header_zeroed(m)
    m.path.write_bytes(m.file)
    (tmp_path / "key").write_bytes(KEY["s"])
    line = "salvage --object secret,id=s,file=key -f qcow2 a.qcow2 out --assume"
    known = f"cluster_size=4k,size={SIZE},encrypt.format=luks,encrypt.key-secret=s"
    done = ours(*line.split(), known, cwd=tmp_path, name="diskwright")
    assert done.status == 3 and re.search(rb"encryption header was found", done.out), done
    assert (tmp_path / "out").read_bytes() == m.disk


def test_a_guests_own_encryption_is_not_taken_for_the_images(tmp_path: Path) -> None:
    m, _, _ = made(tmp_path, "extended")
    with diskwright.open(m.path, format="qcow2", writable=True) as image:
        for place in range(0, SIZE, 1 << 20):
            image.write_at(place, b"LUKS\xba\xbe\0\1" + bytes(504))
        disk = image.read_at(0, SIZE)
    m = Made(m.path, disk)
    m.zero(0, 16384)
    done, wrong, _ = saved(m, tmp_path, {})
    assert not wrong and not done.lost


@pytest.mark.parametrize("gib", [16, pytest.param(1024, marks=pytest.mark.long)])
def test_all_metadata_and_no_l1_table(tmp_path: Path, gib: int) -> None:
    """Tables are gone through by runs, and what the file has as holes is not read."""
    path = tmp_path / "a.qcow2"
    diskwright.create(path, format="qcow2", size=gib << 30, options={"preallocation": "metadata"})
    with diskwright.open(path, format="qcow2", writable=True) as image:
        image.write_at(1 << 30, b"first" * 1000)
        image.write_at((gib << 30) - 8192, b"last" * 1000)
    with path.open("r+b") as file:
        file.seek(36)
        count, l1 = struct.unpack(">IQ", file.read(12))
        file.seek(l1)
        file.write(bytes(8 * count))
    script = (
        "import diskwright, resource, time\n"
        "done = diskwright.salvage('a.qcow2', 'out', target_format='raw')\n"
        "status = open('/proc/self/status').read()\n"
        "print(done.lost, status.split('VmHWM:')[1].split()[0], time.process_time())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(diskwright.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    lost, kib, seconds = ran.stdout.split()
    assert lost == "0" and int(kib) < 128 << 10 and float(seconds) < 2 + gib / 16
    with (tmp_path / "out").open("rb") as found:
        found.seek(1 << 30)
        assert found.read(5000) == b"first" * 1000
        found.seek((gib << 30) - 8192)
        assert found.read() == b"last" * 1000 + bytes(8192 - 4000)
