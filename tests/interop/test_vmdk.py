"""VMDK images under our tools, QEMU's and libvmdk: the same bytes, whoever wrote them."""

from __future__ import annotations

import bz2
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from house.tinyvmdk import SECTOR, Reading
from interop.tools import (
    OURS,
    TRUSTED,
    Op,
    apply,
    assert_bytes,
    io_arguments,
    operations,
    run,
)

Peer = Callable[[str], str]
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
GRAIN = 64 * KIB


def libvmdk_bytes(libvmdk: Any, *chain: Path) -> bytes:
    """The disk in the first of ``chain``, whose parents the others are.  It takes no notice of
    zeroed grains: sector 1, the descriptor, is what it shows of one."""
    handles = []
    for path in chain:
        handle = libvmdk.handle()
        handle.open(str(path))
        handle.open_extent_data_files()
        handles.append(handle)
    for child, parent in itertools.pairwise(handles):
        assert child.parent_content_identifier == parent.content_identifier
        child.set_parent(parent)
    top = handles[0]
    out = bytearray()
    while len(out) < top.media_size:
        part = top.read_buffer_at_offset(min(4 * MIB, top.media_size - len(out)), len(out))
        assert part
        out += part
    for handle in handles:
        handle.close()
    return bytes(out)


def head(path: Path, length: int) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as file:
        return file.read(length)


class Bench:
    """One image, worked on by either side."""

    def __init__(self, peer: Peer, folder: Path, env: dict[str, str] = TRUSTED) -> None:
        self.img, self.io = peer("qemu-img"), peer("qemu-io")
        self.folder, self.env = folder, env

    def create(self, ours: bool, path: Path, size: int, *words: str) -> None:
        tool: list[str | Path] = [*OURS] if ours else [self.img]
        run([*tool, "create", "-q", "-f", "vmdk", *words, path, str(size)], env=self.env)

    def change(self, ours: bool, path: Path, ops: list[Op]) -> None:
        words = io_arguments(ops)
        if ours:
            run([*OURS, "io", "-f", "vmdk", *words, path], env=self.env)
        else:
            run([self.io, "-d", "unmap", "-f", "vmdk", *words, path])

    def agree(self, path: Path, model: bytes | bytearray) -> None:
        """Both sides find the image good and read the model's bytes from it."""
        raw = self.folder / "model.raw"
        raw.write_bytes(model)
        run([self.img, "check", "-q", "-f", "vmdk", path])
        run([*OURS, "check", "-q", "-f", "vmdk", path], env=self.env)
        run([self.img, "compare", "-q", "-f", "raw", "-F", "vmdk", raw, path])
        run([*OURS, "compare", "-q", "-f", "raw", "-F", "vmdk", raw, path], env=self.env)
        first = head(path, SECTOR)
        if first[:4] == b"KDMV" and Reading(first).unclean:
            raise AssertionError("the image was not closed in order")


SHAPES = [
    ("subformat=monolithicSparse", GRAIN),
    ("subformat=monolithicSparse,zeroed_grain=on", GRAIN),
    ("subformat=twoGbMaxExtentSparse", GRAIN),
    ("subformat=twoGbMaxExtentSparse,zeroed_grain=on", GRAIN),
    ("subformat=monolithicFlat", 0),
    ("subformat=twoGbMaxExtentFlat", 0),
]


def random_size(rng: random.Random) -> int:
    return (rng.randrange(1, 80) * GRAIN + rng.choice((0, 0, 512, -512, 1536))) or 512


def without_discards(ops: list[Op]) -> list[Op]:
    """What leaves one content on both sides: QEMU discards nothing in this format."""
    return [op for op in ops if op.kind != "discard"]


@pytest.mark.parametrize("seed", range(6))
def test_both_ways(seed: int, peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    rng = random.Random(seed)
    bench = Bench(peer, tmp_path)
    options, grain = SHAPES[seed % len(SHAPES)]
    size = random_size(rng)
    image = tmp_path / "image.vmdk"
    ours = rng.random() < 0.5
    bench.create(ours, image, size, "-o", options)
    model = bytearray(size)
    for _ in range(3):
        ops = operations(rng, size, GRAIN, rng.randrange(3, 10), discard=bool(grain))
        if not ours:
            ops = without_discards(ops)
        bench.change(ours, image, ops)
        apply(model, ops, grain)
        bench.agree(image, model)
        ours = not ours
    if "zeroed" not in options:
        assert libvmdk_bytes(libvmdk, image) == model
    if "monolithicSparse" in options:
        file = image.read_bytes()
        for copy in (False, True):
            assert_bytes(Reading(file, copy).content(), model, "a directory")


@pytest.mark.parametrize("seed", range(4))
def test_delta_links_both_ways(seed: int, peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    """A chain of three, written to by both; every layer is read through its parents."""
    rng = random.Random(100 + seed)
    bench = Bench(peer, tmp_path)
    base, middle, top = (tmp_path / f"{name}.vmdk" for name in ("base", "middle", "top"))
    size = random_size(rng)
    flat = seed % 2
    bench.create(
        rng.random() < 0.5,
        base,
        size,
        "-o",
        f"subformat={'monolithicFlat' if flat else 'monolithicSparse'}",
    )
    model = bytearray(size)
    ops = without_discards(operations(rng, size, GRAIN, 12))
    bench.change(rng.random() < 0.5, base, ops)
    apply(model, ops, GRAIN)
    models = [bytes(model)]
    for parent, child in ((base, middle), (middle, top)):
        zeroed = "on" if seed > 1 else "off"
        sub = rng.choice(("monolithicSparse", "twoGbMaxExtentSparse"))
        bench.create(
            rng.random() < 0.5,
            child,
            size,
            "-b",
            parent.name,
            "-F",
            "vmdk",
            "-o",
            f"zeroed_grain={zeroed},subformat={sub}",
        )
        for ours in (True, False):
            ops = without_discards(operations(rng, size, GRAIN, rng.randrange(2, 8)))
            bench.change(ours, child, ops)
            apply(model, ops, GRAIN)
            bench.agree(child, model)
        models.append(bytes(model))
    bench.agree(base, models[0])
    bench.agree(middle, models[1])
    if seed < 2:
        assert libvmdk_bytes(libvmdk, top, middle, base) == models[2]
        assert libvmdk_bytes(libvmdk, middle, base) == models[1]


def test_discards_of_ours_are_holes_for_others(peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    rng = random.Random(5)
    bench = Bench(peer, tmp_path)
    for zeroed in ("off", "on"):
        image = tmp_path / f"image-{zeroed}.vmdk"
        bench.create(True, image, 5 * MIB, "-o", f"zeroed_grain={zeroed}")
        model = bytearray(5 * MIB)
        for _ in range(3):
            ops = operations(rng, len(model), GRAIN, 14)
            bench.change(True, image, ops)
            apply(model, ops, GRAIN)
            bench.agree(image, model)
        if zeroed == "off":
            assert libvmdk_bytes(libvmdk, image) == model


def test_zeroed_grains_hide_the_parent(peer: Peer, tmp_path: Path) -> None:
    bench = Bench(peer, tmp_path)
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    bench.create(True, base, MIB)
    bench.change(True, base, [Op("write", 0, MIB, 7)])
    bench.create(True, top, MIB, "-b", base.name, "-F", "vmdk", "-o", "zeroed_grain=on")
    bench.change(True, top, [Op("zero", 0, GRAIN), Op("discard", 2 * GRAIN, GRAIN)])
    model = bytearray(b"\7" * MIB)
    model[:GRAIN] = bytes(GRAIN)
    model[2 * GRAIN : 3 * GRAIN] = bytes(GRAIN)
    bench.agree(top, model)
    reading = Reading(top.read_bytes())
    assert [reading.entry(n) for n in range(4)] == [1, 0, 1, 0]


def test_esx_extents_both_ways(peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    rng = random.Random(11)
    bench = Bench(peer, tmp_path)
    image = tmp_path / "esx.vmdk"
    size = 5 * MIB + 1536
    bench.create(True, image, size, "-o", "subformat=vmfsSparse")
    model = bytearray(size)
    # QEMU writes into the header where it finds no grain table (of 2 MiB), so each has one.
    first = [Op("write", place, 512, 1) for place in range(0, size, 2 * MIB)]
    bench.change(True, image, first)
    apply(model, first, 512)
    for turn in range(4):
        ours = turn % 2 == 0
        ops = operations(rng, size, 512, 8)
        if not ours:
            ops = without_discards(ops)
        bench.change(ours, image, ops)
        apply(model, ops, 512)
        run([bench.img, "check", "-q", image])
        raw = tmp_path / "raw"
        raw.write_bytes(model)
        run([bench.img, "compare", "-q", "-F", "raw", image, raw])
        run([*OURS, "compare", "-q", "-F", "raw", image, raw], env=TRUSTED)
        if ours:
            run([*OURS, "check", "-q", image], env=TRUSTED)
            file = (tmp_path / "esx-delta.vmdk").read_bytes()
            assert Reading(file).content() == model
            assert Reading(file).free == len(file) // SECTOR
    assert libvmdk_bytes(libvmdk, image) == model
    # What QEMU took without saying so is told to ESX by a repair.
    run([*OURS, "check", "-q", "-r", "all", image], env=TRUSTED, status=(0, 2, 3))
    run([*OURS, "check", "-q", image], env=TRUSTED)
    file = (tmp_path / "esx-delta.vmdk").read_bytes()
    assert Reading(file).content() == model


@pytest.mark.parametrize("target", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"])
def test_convert_both_ways(target: str, peer: Peer, tmp_path: Path, libvmdk: Any) -> None:
    rng = random.Random(target)
    raw = bytearray(9 * MIB + 512)
    for _ in range(20):
        at = rng.randrange(len(raw) - 100_000)
        raw[at : at + 100_000] = rng.randbytes(100_000)
    source = tmp_path / "source.raw"
    source.write_bytes(raw)
    image, back = tmp_path / "image.vmdk", tmp_path / "back.raw"
    options = ["-o", f"subformat={target}"]
    run([*OURS, "convert", "-f", "raw", "-O", "vmdk", *options, source, image], env=TRUSTED)
    run([peer("qemu-img"), "convert", "-O", "raw", image, back])
    assert_bytes(back.read_bytes(), raw, "QEMU's reading")
    assert libvmdk_bytes(libvmdk, image) == raw
    if target != "vmfsSparse":
        image = tmp_path / "theirs.vmdk"
        run([peer("qemu-img"), "convert", "-f", "raw", "-O", "vmdk", *options, source, image])
    run([*OURS, "convert", "-f", "vmdk", "-O", "raw", image, back], env=TRUSTED)
    assert_bytes(back.read_bytes(), raw, "our reading")


# -- borders
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse", "vmfsSparse"])
@pytest.mark.parametrize("size", [4 * GIB + 512, 2 * TIB - 512])
def test_offsets_beside_borders(subformat: str, size: int, peer: Peer, tmp_path: Path) -> None:
    if subformat == "twoGbMaxExtentSparse" and size > TIB:
        size = 24 * GIB + 512
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vmdk"
    bench.create(True, image, size, "-o", f"subformat={subformat}")
    places = [2 * GIB - 1024, 4 * GIB - 1024, 1024 * GIB - 1024, size - 2048]
    places = [place for place in places if place + 2048 <= size]
    for number, place in enumerate(places):
        # QEMU writes into the header of a COWD extent where it finds no grain table.
        ours = number % 2 == 0 or subformat == "vmfsSparse"
        bench.change(ours, image, [Op("write", place, 2048, number + 1)])
    for number, place in enumerate(places):
        read = f"read -P {number + 1} {place} 2048"
        for command in ([bench.io, "-r"], [*OURS, "io", "-r"]):
            said = run([*command, "-c", read, image], env=TRUSTED)
            assert "failed" not in said
    run([*OURS, "check", "-q", image], env=TRUSTED)
    # Only what was written was allocated.
    there = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert there < 64 * MIB


def test_a_disk_beyond_what_entries_can_name(peer: Peer, tmp_path: Path) -> None:
    """The disk may be larger than 2 TiB, its file may not."""
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vmdk"
    size = 5 * TIB
    bench.create(True, image, size)
    bench.change(True, image, [Op("write", size - 4096, 4096, 9)])
    assert "failed" not in run([bench.io, "-r", "-c", f"read -P 9 {size - 4096} 4096", image])
    bench.change(False, image, [Op("write", size - 8192, 4096, 8)])
    said = run([*OURS, "io", "-r", "-c", f"read -P 8 {size - 8192} 4096", image], env=TRUSTED)
    assert "failed" not in said


def test_grains_beyond_one_tebibyte_of_the_file(peer: Peer, tmp_path: Path) -> None:
    """Entries of 2^31 and more; the last grain that an entry can name; none behind it."""
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vmdk"
    bench.create(True, image, GIB)
    os.truncate(image, TIB)
    bench.change(True, image, [Op("write", 0, 4096, 1), Op("write", GRAIN, 4096, 2)])
    reading = Reading(head(image, MIB))
    assert [reading.entry(0), reading.entry(1)] == [1 << 31, (1 << 31) + 128]
    os.truncate(image, 2 * TIB - 2 * GRAIN)
    ops = [Op("write", n * GRAIN, 4096, 3) for n in (2, 3)]
    bench.change(True, image, ops)
    for place, value in ((0, 1), (GRAIN, 2), (2 * GRAIN, 3), (3 * GRAIN, 3)):
        command = f"read -P {value} {place} 4096"
        for tool in ([bench.io, "-r"], [*OURS, "io", "-r"]):
            assert "failed" not in run([*tool, "-c", command, image], env=TRUSTED)
    said = run(
        [*OURS, "io", "-c", f"write -P 4 {4 * GRAIN} 4096", image], env=TRUSTED, status=(0, 1)
    )
    assert "No space left" in said


# -- what others wrote
def test_an_image_of_vmware(fixtures_dir: Path, peer: Peer, tmp_path: Path) -> None:
    """A stream of version 3."""
    image = tmp_path / "v3.vmdk"
    image.write_bytes(bz2.decompress((fixtures_dir / "iotest-version3.vmdk.bz2").read_bytes()))
    run([*OURS, "check", "-q", image], env=TRUSTED)
    theirs, ours = tmp_path / "theirs.raw", tmp_path / "ours.raw"
    run([peer("qemu-img"), "convert", "-O", "raw", image, theirs])
    run([*OURS, "convert", "-O", "raw", image, ours], env=TRUSTED)
    run([peer("qemu-img"), "compare", "-q", "-f", "raw", "-F", "raw", theirs, ours])


def test_a_fuzzed_image_is_refused(fixtures_dir: Path, tmp_path: Path) -> None:
    image = tmp_path / "afl9.vmdk"
    image.write_bytes(bz2.decompress((fixtures_dir / "afl9.vmdk.bz2").read_bytes()))
    for verb in ("info", "check", "map"):
        said = run([*OURS, verb, image], env=TRUSTED, status=1)
        assert "line ends were changed" in said and "singleEndLineChar" in said


def test_a_grain_directory_of_which_one_copy_is_damaged(peer: Peer, tmp_path: Path) -> None:
    """QEMU reads through the primary one alone, and its check sees nothing."""
    bench = Bench(peer, tmp_path)
    image = tmp_path / "image.vmdk"
    bench.create(False, image, 100 * MIB)
    bench.change(False, image, [Op("write", 0, MIB, 5), Op("write", 40 * MIB, MIB, 6)])
    file = bytearray(image.read_bytes())
    place = Reading(file).entry_place(0)
    file[place : place + 4] = b"\xff\xff\xff\x0f"
    image.write_bytes(file)
    said = run([*OURS, "check", image], env=TRUSTED, status=2)
    assert "2 errors were found" in said
    run([*OURS, "check", "-r", "all", image], env=TRUSTED)
    model = bytearray(100 * MIB)
    model[:MIB] = b"\5" * MIB
    model[40 * MIB : 41 * MIB] = b"\6" * MIB
    bench.agree(image, model)


def test_an_extent_that_may_not_be_written_stays_as_it_is(peer: Peer, tmp_path: Path) -> None:
    """Of two extents one is RDONLY; QEMU leaves it out, so that what follows is in its place."""
    bench = Bench(peer, tmp_path)
    names = []
    for number in (0, 1):
        part = tmp_path / f"part{number}.vmdk"
        bench.create(True, part, MIB)
        bench.change(True, part, [Op("write", 0, MIB, number + 1)])
        names.append(part.name)
    image = tmp_path / "image.vmdk"
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        'createType="twoGbMaxExtentSparse"\n'
        f'RDONLY 2048 SPARSE "{names[0]}"\nRW 2048 SPARSE "{names[1]}"\n'
    )
    before = (tmp_path / names[0]).read_bytes()
    run([*OURS, "io", "-c", f"write -P 3 {MIB} 4096", image], env=TRUSTED)
    said = run([*OURS, "io", "-c", "write -P 3 0 4096", image], env=TRUSTED, status=(0, 1))
    assert "may not be written" in said or "Permission denied" in said
    assert (tmp_path / names[0]).read_bytes() == before
    out = tmp_path / "out.raw"
    run([*OURS, "convert", "-O", "raw", image, out], env=TRUSTED)
    model = b"\1" * MIB + b"\3" * 4096 + b"\2" * (MIB - 4096)
    assert_bytes(out.read_bytes(), model, "our reading")
    assert "virtual size: 1 MiB" in run([bench.img, "info", "-f", "vmdk", image])
