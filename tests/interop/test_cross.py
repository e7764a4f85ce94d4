"""The same images under our tools and QEMU's, in both directions, over random options."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from interop.tools import (
    OURS,
    TRUSTED,
    Geometry,
    apply,
    assert_bytes,
    geometry,
    io_arguments,
    operations,
    run,
)

Peer = Callable[[str], str]

PORTABLE = {**TRUSTED, "DISKWRIGHT_PORTABLE": "1"}


class Pair:
    """One image, worked on by either side."""

    def __init__(self, peer: Peer, folder: Path, env: dict[str, str]) -> None:
        self.img = peer("qemu-img")
        self.io = peer("qemu-io")
        self.folder = folder
        self.env = env

    def create(self, ours: bool, path: Path, g: Geometry, backing: Path | None = None) -> None:
        tool: list[str | Path] = [*OURS] if ours else [self.img]
        words: list[str | Path] = [*tool, "create", "-q", "-f", "qcow2", "-o", g.options()]
        if backing is not None:
            words += ["-b", backing, "-F", backing.suffix[1:]]
        run([*words, path, str(g.size)], env=self.env)

    def change(self, ours: bool, path: Path, words: list[str]) -> None:
        fmt = path.suffix[1:]
        if ours:
            run([*OURS, "io", "-f", fmt, *words, path], env=self.env)
        else:
            run([self.io, "-d", "unmap", "-f", fmt, *words, path])

    def agree(self, path: Path, model: bytearray) -> None:
        """Both sides find the image good and read the model's bytes from it."""
        raw = self.folder / "model.raw"
        raw.write_bytes(model)
        run([self.img, "check", "-q", "-f", "qcow2", path])
        run([*OURS, "check", "-q", "-f", "qcow2", path], env=self.env)
        run([self.img, "compare", "-q", "-f", "raw", "-F", "qcow2", raw, path])
        out = self.folder / "ours.raw"
        run([*OURS, "convert", "-f", "qcow2", "-O", "raw", path, out], env=self.env)
        assert_bytes(out.read_bytes(), model, "our reading")
        run([*OURS, "compare", "-q", "-f", "raw", "-F", "qcow2", raw, path], env=self.env)


def cross(seed: int, peer: Peer, folder: Path, env: dict[str, str]) -> None:
    rng = random.Random(seed)
    pair = Pair(peer, folder, env)
    g = geometry(rng)
    image = folder / "image.qcow2"
    ours = rng.random() < 0.5
    pair.create(ours, image, g)
    model = bytearray(g.size)
    for _ in range(3):
        ops = operations(rng, g.size, g.cluster_size, rng.randrange(4, 14))
        pair.change(ours, image, io_arguments(ops))
        apply(model, ops, g.cluster_size)
        pair.agree(image, model)
        ours = not ours


def overlay(seed: int, peer: Peer, folder: Path, env: dict[str, str]) -> None:
    """A chain of up to three layers of different geometry, written, checked and committed."""
    rng = random.Random(seed)
    pair = Pair(peer, folder, env)
    bottom = folder / rng.choice(("base.raw", "base.qcow2"))
    g = geometry(rng)
    base = bytearray(g.size)
    if bottom.suffix == ".raw":
        bottom.write_bytes(base)
    else:
        pair.create(rng.random() < 0.5, bottom, g)
    # A raw file may keep the bytes of a discard: not every system can punch holes.
    ops = operations(rng, g.size, g.cluster_size, 8, discard=bottom.suffix == ".qcow2")
    pair.change(rng.random() < 0.5, bottom, io_arguments(ops))
    apply(base, ops, g.cluster_size)
    below, model = bottom, base
    for level in range(rng.randrange(1, 3)):
        g = geometry(rng, backing=True)
        if rng.random() < 0.5:
            g = g._replace(size=len(model))
        top = folder / f"overlay{level}.qcow2"
        pair.create(rng.random() < 0.5, top, g, below)
        above = bytearray(model[: g.size].ljust(g.size, b"\0"))
        # Version 2 cannot say "reads as zeroes" over a backing file, so what a discard leaves
        # there is each program's own affair.
        ops = operations(rng, g.size, g.cluster_size, 10, discard=g.compat != "0.10")
        for part in (ops[:5], ops[5:]):
            pair.change(rng.random() < 0.5, top, io_arguments(part))
            apply(above, part, g.cluster_size)
        pair.agree(top, above)
        below_model, model = model, above
        below = top
    before = bytes(below_model)
    ours = rng.random() < 0.7
    tool: list[str | Path] = [*OURS] if ours else [pair.img]
    run([*tool, "commit", "-q", "-f", "qcow2", below], env=env if ours else TRUSTED)
    info = json.loads(run([pair.img, "info", "--output=json", below]))
    parent = Path(info["full-backing-filename"])
    committed = bytearray(max(model, before, key=len))
    committed[: len(model)] = model
    raw = folder / "committed.raw"
    raw.write_bytes(committed)
    words: list[str | Path] = ["compare", "-q", "-f", "raw", "-F", parent.suffix[1:], raw, parent]
    run([pair.img, *words])
    run([*OURS, *words], env=env)


@pytest.mark.parametrize("seed", range(12))
def test_either_side_writes_what_the_other_reads(seed: int, peer: Peer, tmp_path: Path) -> None:
    cross(seed, peer, tmp_path, TRUSTED)


@pytest.mark.parametrize("seed", range(100, 104))
def test_the_same_in_portable_mode(seed: int, peer: Peer, tmp_path: Path) -> None:
    cross(seed, peer, tmp_path, PORTABLE)


@pytest.mark.parametrize("seed", range(8))
def test_chains_are_read_and_committed_alike(seed: int, peer: Peer, tmp_path: Path) -> None:
    overlay(seed, peer, tmp_path, PORTABLE if seed % 4 == 3 else TRUSTED)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1400))
def test_many_more(seed: int, peer: Peer, tmp_path: Path) -> None:
    (overlay if seed % 2 else cross)(seed, peer, tmp_path, PORTABLE if seed % 5 == 0 else TRUSTED)


@pytest.mark.parametrize("seed", range(4))
def test_maps_agree(seed: int, peer: Peer, tmp_path: Path) -> None:
    """`map --output=json` of one image by both programs; ours may split extents elsewhere."""
    rng = random.Random(seed)
    pair = Pair(peer, tmp_path, TRUSTED)
    g = geometry(rng)._replace(preallocation="off")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    pair.create(False, base, g)
    pair.change(False, base, io_arguments(operations(rng, g.size, g.cluster_size, 6)))
    pair.create(True, top, geometry(rng, backing=True)._replace(size=g.size), base)
    pair.change(True, top, io_arguments(operations(rng, g.size, g.cluster_size, 6, discard=False)))

    def flat(tool: list[str]) -> list[tuple[object, ...]]:
        out: list[tuple[object, ...]] = []
        parts = json.loads(run([*tool, "map", "--output=json", "-f", "qcow2", top]))
        assert sum(p["length"] for p in parts) == g.size
        for part in parts:
            row = (part["depth"], part["present"], part["zero"], part["data"], part.get("offset"))
            assert part["length"] % 512 == 0
            for at in range(0, part["length"], 512):
                host = None if row[4] is None else row[4] + at
                out.append((*row[:4], host))
        return out

    assert flat(OURS) == flat([pair.img])


@pytest.mark.parametrize("size", ["3T", "8E"])
def test_sizes_at_the_end_of_the_range(size: str, peer: Peer, tmp_path: Path) -> None:
    image = tmp_path / "huge.qcow2"
    options = "cluster_size=2M"
    words: list[str | Path] = ["create", "-q", "-f", "qcow2", "-o", options, image, size]
    if size == "8E":  # more than an L1 table may describe
        run([peer("qemu-img"), *words], status=1)
        run([*OURS, *words], status=1)
        return
    run([*OURS, *words])
    last = (3 << 40) - 512
    run([*OURS, "io", "-c", f"write -P 0x42 {last} 512", image])
    run([peer("qemu-io"), "-r", "-c", f"read -P 0x42 {last} 512", image])
    run([peer("qemu-img"), "check", "-q", image])
    run([*OURS, "check", "-q", image])
