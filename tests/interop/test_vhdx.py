"""VHDX images under our tools, QEMU's and libvhdi: the same bytes, whoever wrote them."""

from __future__ import annotations

import bz2
import json
import random
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from house.tinyvhdx import FULL, METADATA, MIB, PARTIAL, REGIONS, TinyVhdx

from .tools import OURS, TRUSTED, Op, apply, assert_bytes, io_arguments, operations, run

Peer = Callable[[str], str]
KIB, GIB, TIB = 1 << 10, 1 << 30, 1 << 40


def libvhdi_bytes(libvhdi: Any, *chain: Path) -> bytes:
    """The disk in the first of ``chain``, whose parents the others are."""
    files = []
    for path in chain:
        file = libvhdi.file()
        file.open(str(path))
        files.append(file)
    for child, parent in pairwise(files):
        assert child.parent_identifier == parent.identifier
        child.set_parent(parent)
    top = files[0]
    out = bytearray()
    while len(out) < top.media_size:
        part = top.read_buffer_at_offset(min(4 * MIB, top.media_size - len(out)), len(out))
        assert part
        out += part
    for file in files:
        file.close()
    return bytes(out)


class Bench:
    """One image, worked on by either side."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.img, self.io = peer("qemu-img"), peer("qemu-io")
        self.folder = folder

    def create(self, ours: bool, path: Path, size: int, *words: str) -> None:
        tool: list[str | Path] = [*OURS] if ours else [self.img]
        run([*tool, "create", "-q", "-f", "vhdx", *words, path, str(size)])

    def change(self, ours: bool, path: Path, ops: list[Op]) -> None:
        tool: list[str | Path] = [*OURS, "io"] if ours else [self.io, "-d", "unmap"]
        run([*tool, "-f", "vhdx", *io_arguments(ops), path])

    def agree(self, path: Path, model: bytes | bytearray) -> None:
        """Both sides find the image good and read the model's bytes from it."""
        raw = self.folder / "model.raw"
        raw.write_bytes(model)
        run([self.img, "check", "-q", "-f", "vhdx", path])
        run([*OURS, "check", "-q", "-f", "vhdx", path])
        run([self.img, "compare", "-q", "-f", "raw", "-F", "vhdx", raw, path])
        run([*OURS, "compare", "-q", "-f", "raw", "-F", "vhdx", raw, path])

    def content(self, path: Path) -> bytes:
        """All bytes, as we read them."""
        out = self.folder / "ours.raw"
        run([*OURS, "convert", "-O", "raw", path, out])
        data = out.read_bytes()
        out.unlink()
        return data


def options_of(rng: random.Random, block: int, ours: bool) -> str:
    subformat = rng.choice(("dynamic", "dynamic", "fixed"))
    words = [f"block_size={block}", f"subformat={subformat}"]
    words.append(f"log_size={rng.choice((1, 1, 2, 5)) * MIB}")
    words.append(f"block_state_zero={rng.choice(('on', 'off'))}")
    return ",".join(words)


# -- both ways
@pytest.mark.parametrize("seed", range(8))
def test_both_ways(seed: int, peer: Peer, tmp_path: Path, libvhdi: Any) -> None:
    rng = random.Random(seed)
    bench = Bench(peer, tmp_path)
    ours = seed % 2 == 0
    block = (1, 2, 8, 32, 1, 16, 4, 256)[seed] * MIB
    size = rng.randrange(1, 24 * MIB // 512) * 512
    image = tmp_path / "image.vhdx"
    bench.create(ours, image, size, "-o", options_of(rng, block, ours))
    model = bytearray(size)
    for turn in range(3):
        ops = operations(rng, size, min(block, MIB), 6, discard=False)
        by_us = (turn % 2 == 0) != ours
        bench.change(by_us, image, ops)
        apply(model, ops, min(block, MIB))
        bench.agree(image, model)
    if size % 512 == 0:
        assert_bytes(libvhdi_bytes(libvhdi, image), model, "libvhdi")
    raw = tmp_path / "model.raw"
    for tool in ([*OURS], [bench.img]):
        other = tmp_path / "other.vhdx"
        run([*tool, "convert", "-f", "raw", "-O", "vhdx", raw, other])
        bench.agree(other, model)


def test_discards_read_as_zeroes_on_both_sides(peer: Peer, tmp_path: Path) -> None:
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vhdx"
    bench.create(True, image, 8 * MIB, "-o", "block_size=1M")
    model = bytearray(8 * MIB)
    ops = [
        Op("write", 0, 8 * MIB, 7),
        Op("discard", MIB + 512, 3 * MIB),
        Op("unmap", 6 * MIB, MIB),
        Op("zero", 100 * KIB, 9 * KIB),
    ]
    bench.change(True, image, ops)
    apply(model, ops, MIB)
    bench.agree(image, model)


@pytest.mark.parametrize(
    ("size", "block"),
    [
        (1 << 31, 1),
        ((1 << 31) + 512, 1),
        ((1 << 32) - 512, 8),
        (1 << 32, 2),
        (2 * TIB, 1),
        (2 * TIB + 512, 32),
        (64 * TIB, 32),
        (64 * TIB, 256),
        (33 * MIB + 512, 32),
    ],
)
def test_borders(size: int, block: int, peer: Peer, tmp_path: Path) -> None:
    """Both sides write at the end and around 4 GiB, and read what the other wrote."""
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vhdx"
    for ours in (True, False):
        # QEMU writes each entry of a table of zero states, which takes too long at 64 TiB.
        words = f"block_size={block}M,block_state_zero=off"
        bench.create(ours, image, size, "-o", words)
        places = {0, size - 512, size // 2 // 512 * 512, min(size, 1 << 32) - 512}
        tools: list[list[str | Path]] = [[*OURS, "io"], [bench.io]]
        for number, place in enumerate(sorted(places)):
            run(
                [*tools[number % 2], "-f", "vhdx", "-c", f"write -P 0x3{number} {place} 512", image]
            )
        for tool in tools:
            checks: list[str | Path] = []
            for number, place in enumerate(sorted(places)):
                checks += ["-c", f"read -P 0x3{number} {place} 512"]
            text = run([*tool, "-r", "-f", "vhdx", *checks, image])
            assert "failed" not in text, text
        run([bench.img, "check", "-q", image])
        run([*OURS, "check", "-q", image])
        info = json.loads(run([*OURS, "info", "--output=json", image]))
        assert info["virtual-size"] == size
        image.unlink()


# -- logs
@pytest.mark.parametrize("size", [256 * MIB, 64 * GIB], ids=["one sector", "many sectors"])
def test_a_log_that_qemu_left(size: int, peer: Peer, tmp_path: Path) -> None:
    """qemu-io cannot write its block table behind the log that says so, and leaves that log."""
    bench = Bench(peer, tmp_path)
    image, theirs = tmp_path / "image.vhdx", tmp_path / "theirs.vhdx"
    bench.create(False, image, size, "-o", "block_size=1M")
    fault = {
        "event": "none",
        "iotype": "write",
        "sector": 2 * MIB // 512,
        "errno": 5,
        "once": False,
    }
    file = {"driver": "file", "filename": str(image)}
    broken = {"driver": "blkdebug", "image": file, "inject-error": [fault]}
    disk = "json:" + json.dumps({"driver": "vhdx", "file": broken})
    words = [f"write -P {1 + n} {n * size // 4} 1M" for n in (2, 1, 3, 0)]
    commands = [part for word in words for part in ("-c", word)]
    subprocess.run([bench.io, *commands, disk], capture_output=True, timeout=60)
    shutil.copy(image, theirs)
    asked = subprocess.run([bench.img, "info", str(image)], capture_output=True, text=True)
    assert "replayed" in asked.stderr  # QEMU reads no image with a log
    before = image.read_bytes()
    run([bench.img, "check", "-q", "-r", "all", theirs])
    run([*OURS, "compare", "-q", image, theirs])
    # QEMU had grown the file for the writes that failed: space that nothing uses is no damage.
    run([*OURS, "check", "-q", image], status=(0, 3))
    assert image.read_bytes() == before  # reading replays in memory
    run([*OURS, "io", "-f", "vhdx", "-c", "write -P 3 100M 4k", image])
    run([bench.img, "check", "-q", image])
    run([bench.io, "-f", "vhdx", "-c", "write -P 3 100M 4k", theirs])
    run([bench.img, "compare", "-q", image, theirs])


@pytest.mark.parametrize("name", ["iotest-dirtylog-10G-4M", "iotest-dynamic-1G"])
def test_images_of_hyper_v(
    name: str, fixtures_dir: Path, peer: Peer, tmp_path: Path, libvhdi: Any
) -> None:
    bench = Bench(peer, tmp_path)
    data = bz2.decompress((fixtures_dir / f"{name}.vhdx.bz2").read_bytes())
    image, theirs = tmp_path / "image.vhdx", tmp_path / "theirs.vhdx"
    image.write_bytes(data)
    theirs.write_bytes(data)
    run([bench.img, "check", "-q", "-r", "all", theirs])
    run([*OURS, "compare", "-q", image, theirs])
    run([*OURS, "check", "-q", image])
    assert image.read_bytes() == data, "reading wrote to the file"
    # Writable: the log is replayed into the file.
    run([*OURS, "io", "-f", "vhdx", "-c", "write -P 0x5a 900M 3M", image])
    run([bench.img, "check", "-q", image])
    run([*OURS, "check", "-q", image])
    run([bench.io, "-f", "vhdx", "-c", "write -P 0x5a 900M 3M", theirs])
    run([bench.img, "compare", "-q", image, theirs])
    run([*OURS, "compare", "-q", image, theirs])
    file = libvhdi.file()
    file.open(str(image))
    assert file.read_buffer_at_offset(3 * MIB, 900 * MIB) == b"\x5a" * (3 * MIB)
    file.close()


# -- differencing images, which qemu-img refuses
def test_a_chain_of_differencing_images(tmp_path: Path, libvhdi: Any, peer: Peer) -> None:
    rng = random.Random(11)
    bench = Bench(peer, tmp_path)
    size = 9 * MIB + 1024
    names = [tmp_path / f"{n}.vhdx" for n in range(3)]
    model = bytearray(size)
    for depth, path in enumerate(names):
        if depth:
            block = rng.choice((1, 2, 8))
            words = ["-b", names[depth - 1].name, "-F", "vhdx", "-o", f"block_size={block}M"]
            run([*OURS, "create", "-q", "-f", "vhdx", *words, path])
        else:
            bench.create(True, path, size, "-o", "block_size=1M")
        # libvhdi reads a block of zeroes from the parent, so there are writes alone.
        ops = [op for op in operations(rng, size, MIB, 12) if op.kind == "write"]
        bench.change(True, path, ops)
        apply(model, ops, MIB)
        assert_bytes(bench.content(path), model, f"layer {depth}")
        chain = [names[n] for n in range(depth, -1, -1)]
        assert_bytes(libvhdi_bytes(libvhdi, *chain), model, f"libvhdi, layer {depth}")
        run([*OURS, "check", "-q", path])
    # Into the parent, after which the child still fits to it.
    run([*OURS, "commit", "-q", names[2]])
    assert_bytes(bench.content(names[2]), model, "after the commit")
    assert_bytes(bench.content(names[1]), model, "the parent after the commit")
    assert_bytes(libvhdi_bytes(libvhdi, names[1], names[0]), model, "libvhdi")
    # libvhdi is not asked about a chunk that has no sector bitmap: it takes the header for one.
    # Over the first, then over nothing.
    run([*OURS, "rebase", "-q", "-b", names[0].name, "-F", "vhdx", names[2]])
    assert_bytes(bench.content(names[2]), model, "over another parent")
    assert_bytes(libvhdi_bytes(libvhdi, names[2], names[0]), model, "libvhdi")
    run([*OURS, "rebase", "-q", "-b", "", names[2]])
    bench.agree(names[2], model)
    assert_bytes(libvhdi_bytes(libvhdi, names[2]), model, "libvhdi")


def test_an_image_gets_a_parent_and_reads_as_before(tmp_path: Path) -> None:
    base, top = tmp_path / "base.vhdx", tmp_path / "top.vhdx"
    for path in (base, top):
        words = "block_size=1M,block_state_zero=off"
        run([*OURS, "create", "-q", "-f", "vhdx", "-o", words, path, "8M"])
    run([*OURS, "io", "-f", "vhdx", "-c", "write -P 1 0 6M", base])
    run([*OURS, "io", "-f", "vhdx", "-c", "write -P 2 1M 512", top])
    run([*OURS, "rebase", "-q", "-b", base.name, "-F", "vhdx", top])
    model = bytearray(8 * MIB)
    model[MIB : MIB + 512] = b"\2" * 512
    raw = tmp_path / "raw"
    run([*OURS, "convert", "-O", "raw", top, raw])
    assert_bytes(raw.read_bytes(), model, "over a parent that was no parent")


def test_libvhdi_is_told_an_absolute_parent(tmp_path: Path, libvhdi: Any) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    run([*OURS, "create", "-q", "-f", "vhdx", base, "8M"])
    run([*OURS, "create", "-q", "-f", "vhdx", "-b", base, "-F", "vhdx", child])
    file = libvhdi.file()
    file.open(str(child))
    assert file.parent_filename == str(base)
    file.close()
    info = json.loads(run([*OURS, "info", "--output=json", child]))
    assert info["backing-filename"] == "base.vhdx"


def test_a_parent_that_was_written_to_is_refused(tmp_path: Path) -> None:
    base, child = tmp_path / "base.vhdx", tmp_path / "child.vhdx"
    run([*OURS, "create", "-q", "-f", "vhdx", base, "8M"])
    run([*OURS, "create", "-q", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", child])
    run([*OURS, "io", "-r", "-c", "read 0 8M", child])
    run([*OURS, "io", "-c", "write 0 512", base])
    run([*OURS, "io", "-r", "-c", "read 0 8M", child], status=1)


# -- what qemu-img does otherwise
def test_a_disk_of_nothing_is_small(peer: Peer, tmp_path: Path, libvhdi: Any) -> None:
    """QEMU makes 71 MiB of a size of 0, by a number that runs below zero, and wants that table in
    all images; in ours it is a hole."""
    bench = Bench(peer, tmp_path)
    image, theirs = tmp_path / "image.vhdx", tmp_path / "theirs.vhdx"
    bench.create(True, image, 0)
    assert image.stat().st_blocks * 512 <= 4 * MIB
    run([bench.img, "check", "-q", image])
    bench.create(False, theirs, 0)
    assert theirs.stat().st_blocks * 512 > 60 * MIB
    for path in (image, theirs):
        assert json.loads(run([*OURS, "info", "--output=json", path]))["virtual-size"] == 0
        run([*OURS, "check", "-q", image])
    run([*OURS, "resize", "-q", image, "5M"])
    bench.agree(image, bytes(5 * MIB))


def test_the_second_region_table_is_used(peer: Peer, tmp_path: Path) -> None:
    """QEMU looks at the first one only."""
    bench = Bench(peer, tmp_path)
    tiny = TinyVhdx()
    image = tmp_path / "image.vhdx"
    data = bytearray(tiny.data)
    data[REGIONS[0] : REGIONS[0] + 512] = bytes(512)
    image.write_bytes(data)
    run([bench.img, "info", image], status=1)
    assert_bytes(bench.content(image), tiny.model, "by the second table")
    run([*OURS, "check", "-q", "-r", "all", image])
    bench.agree(image, tiny.model)


def test_regions_say_that_they_are_required(peer: Peer, tmp_path: Path) -> None:
    """QEMU writes them without that bit."""
    bench = Bench(peer, tmp_path)
    for ours in (True, False):
        image = tmp_path / f"{ours}.vhdx"
        bench.create(ours, image, 8 * MIB)
        data = image.read_bytes()
        for at in REGIONS:
            assert data[at + 44] & 1 == ours and data[at + 76] & 1 == ours
        run([*OURS, "check", "-q", image])


def test_sectors_of_4096(peer: Peer, tmp_path: Path, libvhdi: Any) -> None:
    """QEMU refuses them."""
    bench = Bench(peer, tmp_path)
    rng = random.Random(4)
    size = 9 * MIB
    image = tmp_path / "image.vhdx"
    bench.create(True, image, size, "-o", "logical_sector_size=4096,block_size=1M")
    ops = operations(rng, size, MIB, 8, discard=False)
    bench.change(True, image, ops)
    model = bytearray(size)
    apply(model, ops, MIB)
    assert_bytes(bench.content(image), model, "sectors of 4096")
    assert_bytes(libvhdi_bytes(libvhdi, image), model, "libvhdi")
    run([bench.img, "info", image], status=1)
    tiny = TinyVhdx(sector=4096)
    image.write_bytes(tiny.data)
    assert_bytes(bench.content(image), tiny.model, "an image from the specification")


def test_an_image_that_merely_has_a_locator_is_read(peer: Peer, tmp_path: Path) -> None:
    """QEMU refuses it; without the flag it means nothing."""
    bench = Bench(peer, tmp_path)
    tiny = TinyVhdx(parent=[("parent_linkage", "{0}"), ("relative_path", "x")])
    data = bytearray(tiny.data)
    data[METADATA + 65536 + 4] = 0  # the flags in the file parameters
    image = tmp_path / "image.vhdx"
    image.write_bytes(data)
    run([bench.img, "info", image], status=1)
    assert_bytes(bench.content(image), tiny.model, "with a locator")


def test_a_differencing_image_from_the_specification(tmp_path: Path, libvhdi: Any) -> None:
    base = TinyVhdx(blocks={n: (FULL, bytes([n + 1]) * MIB) for n in range(4)})
    child = TinyVhdx(
        blocks={1: (PARTIAL, b"p" * MIB), 3: (FULL, b"f" * MIB)},
        parent=[
            ("parent_linkage", "{11111111-2222-4333-8444-555555555555}"),
            ("relative_path", ".\\base.vhdx"),
        ],
        bitmap={2048, 2050, 2055, 4095},
    )
    (tmp_path / "base.vhdx").write_bytes(base.data)
    path = tmp_path / "child.vhdx"
    path.write_bytes(child.data)
    model = bytearray(base.model)
    for sector in (2048, 2050, 2055, 4095):
        model[sector * 512 : sector * 512 + 512] = b"p" * 512
    model[3 * MIB :] = b"f" * MIB
    raw = tmp_path / "raw"
    run([*OURS, "convert", "-O", "raw", path, raw], env=TRUSTED)
    assert_bytes(raw.read_bytes(), model, "a differencing image")
    assert_bytes(libvhdi_bytes(libvhdi, path, tmp_path / "base.vhdx"), model, "libvhdi")
    run([*OURS, "io", "-c", "write -P 9 1048577 5", "-c", "write -P 8 2M 1000", path])
    model[MIB + 1 : MIB + 6] = b"\x09" * 5
    model[2 * MIB : 2 * MIB + 1000] = b"\x08" * 1000
    assert_bytes(libvhdi_bytes(libvhdi, path, tmp_path / "base.vhdx"), model, "libvhdi")
