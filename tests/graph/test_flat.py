"""Chains that are looked through: the same bytes as layer by layer, and no layer asked twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diskwright.contract import COMPRESSED
from diskwright.engine import flat
from diskwright.engine.kernel import Driver, gather
from diskwright.extents import HOLE
from diskwright.graph.gate import Gate
from diskwright.graph.mapped import MappedNode
from diskwright.graph.node import Node
from diskwright.graph.opener import close_disk, create_image, open_disk
from diskwright.graph.reopen import reopen

KIB = 1 << 10
SIZE = (3 << 20) + 512


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


async def make_chain(driver: Driver, rng: random.Random, depth: int, gate: Gate) -> bytearray:
    """Images 0 to depth - 1, each over the one before; what the last one reads."""
    model = bytearray()
    for number in range(depth):
        size = SIZE - rng.choice([0, 0, 512, 70 * KIB])
        options: dict[str, Any] = {}
        kind = "raw" if not number and rng.random() < 0.5 else "qcow2"
        if kind == "qcow2":
            options["cluster_size"] = rng.choice([4 * KIB, 4 * KIB, 64 * KIB, 512])
        if number:
            before = "raw" if Path("0").read_bytes()[:4] != b"QFI\xfb" else "qcow2"
            options["backing_file"] = str(number - 1)
            options["backing_fmt"] = before if number == 1 else "qcow2"
        await create_image(driver, str(number), kind, size, options, gate=gate)
        del model[size:]
        model.extend(bytes(size - len(model)))
        node = await open_disk(driver, str(number), format=kind, writable=True, gate=gate)
        for _ in range(12):
            offset = rng.randrange(size - 1)
            length = min(rng.choice([512, 4 * KIB, 40 * KIB]), size - offset)
            if rng.random() < 0.5:
                offset &= -4096
            what = rng.random()
            if what < 0.8:
                data = rng.randbytes(length)
                await node.write([offset], [data])
                model[offset : offset + length] = data
            elif what < 0.9 and kind == "qcow2":
                unit = options["cluster_size"]
                offset = offset & -unit
                data = rng.randbytes(64) * (unit // 64)
                data = data[: size - offset]
                if (await node.extents(offset, len(data)))[0].kind == HOLE:
                    await node.write([offset], [data], COMPRESSED)
                    model[offset : offset + len(data)] = data
            else:
                await node.zero([offset], [length])
                model[offset : offset + length] = bytes(length)
        await node.flush()
        await close_disk(node)
    return model


async def read_some(node: Node, model: bytes, rng: random.Random) -> None:
    count = rng.choice([1, 2, 8, 32])
    offsets = [rng.randrange(len(model) - 1) for _ in range(count)]
    if rng.random() < 0.6:
        offsets = [offset & -4096 for offset in offsets]
    lengths = [min(rng.choice([512, 4096, 4096, 200 * KIB]), len(model) - o) for o in offsets]
    into = None
    if rng.random() < 0.5:
        into = [memoryview(bytearray(b"\xee" * length)) for length in lengths]
    got = await node.read(offsets, lengths, into)
    for offset, length, part in zip(offsets, lengths, got, strict=True):
        assert bytes(part) == model[offset : offset + length], (offset, length)


@pytest.mark.parametrize("seed", range(12))
def test_any_chain_reads_as_its_layers(seed: int, driver: Driver) -> None:
    rng = random.Random(seed)
    gate = Gate("trusted")

    async def steps() -> None:
        depth = rng.choice([2, 3, 7])
        model = await make_chain(driver, rng, depth, gate)
        node = await open_disk(driver, str(depth - 1), format="qcow2", gate=gate)
        assert isinstance(node, MappedNode)
        await gather(driver, [read_some(node, model, rng) for _ in range(30)])
        assert node.engine.flat is not None
        assert len(node.engine.flat.layers) == depth
        await close_disk(node)
        # The same below a disk that is written to: its own layer is asked at every read.
        node = await open_disk(driver, str(depth - 1), format="qcow2", writable=True, gate=gate)
        for _ in range(30):
            offset = rng.randrange(len(model) - 1)
            data = rng.randbytes(min(5000, len(model) - offset))
            await node.write([offset], [data])
            model[offset : offset + len(data)] = data
            await read_some(node, model, rng)
        await close_disk(node)

    driver.run(steps())


@contextmanager
def counting() -> Iterator[list[int]]:
    """How often the map of any layer is asked."""
    from diskwright.engine.engine import Engine

    asked = [0]
    original = Engine.map_ranges

    async def map_ranges(self: Engine, ranges: Any) -> Any:
        asked[0] += 1
        return await original(self, ranges)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "map_ranges", map_ranges)
        yield asked


def test_a_warm_chain_asks_no_layer(driver: Driver) -> None:
    rng = random.Random(5)
    gate = Gate("trusted")

    async def steps() -> None:
        model = await make_chain(driver, rng, 20, gate)
        node = await open_disk(driver, "19", format="qcow2", gate=gate)
        with counting() as asked:
            await node.read([0], [len(model)])
            first = asked[0]
            assert first <= 20 * 80  # two windows, and some ragged units
            for _ in range(100):
                await read_some(node, bytes(model), rng)
            assert asked[0] - first < 20 * 100
        await close_disk(node)

    driver.run(steps())


def test_windows_have_a_bound(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "_MOST_WINDOWS", 2)
    monkeypatch.setattr(flat, "_WINDOW_BITS", 3)
    rng = random.Random(6)
    gate = Gate("trusted")

    async def steps() -> None:
        model = await make_chain(driver, rng, 3, gate)
        node = await open_disk(driver, "2", format="qcow2", gate=gate)
        assert isinstance(node, MappedNode)
        await gather(driver, [read_some(node, bytes(model), rng) for _ in range(40)])
        assert node.engine.flat is not None
        assert len(node.engine.flat.windows) <= 2
        await close_disk(node)

    driver.run(steps())


def test_a_layer_that_becomes_writable_is_asked_again(driver: Driver) -> None:
    """A backing file is opened for writing below an overlay that is being read, changed, and
    opened for reading again."""
    gate = Gate("trusted")

    async def steps() -> None:
        await create_image(driver, "base", "qcow2", SIZE, {"cluster_size": 4096}, gate=gate)
        for name, below in (("mid", "base"), ("top", "mid")):
            options = {"backing_file": below, "backing_fmt": "qcow2", "cluster_size": 4096}
            await create_image(driver, name, "qcow2", SIZE, options, gate=gate)
        top = await open_disk(driver, "top", format="qcow2", gate=gate)
        assert isinstance(top, MappedNode)
        assert bytes((await top.read([0], [4096]))[0]) == bytes(4096)
        known = top.engine.flat
        assert known is not None
        base = top.child("backing").child("backing")  # type: ignore[union-attr]
        assert base is not None
        await reopen(base, writable=True)
        assert top.engine.flat is None
        await base.write([0], [b"\1" * 4096])
        assert bytes((await top.read([0], [4096]))[0]) == b"\1" * 4096
        now = top.engine.flat
        assert now is not None and len(now.layers) == 2
        await base.write([0, 8192], [b"\2" * 4096] * 2)
        assert bytes((await top.read([0], [4096]))[0]) == b"\2" * 4096
        await reopen(base, writable=False)
        assert bytes((await top.read([8192], [4096]))[0]) == b"\2" * 4096
        assert top.engine.flat is not None and len(top.engine.flat.layers) == 3
        await close_disk(top)

    driver.run(steps())


def test_nobody_reads_where_a_layer_was(driver: Driver) -> None:
    """Opening a layer for writing waits for those who already know where its bytes are."""
    gate = Gate("trusted")

    async def steps() -> None:
        await create_image(driver, "base", "qcow2", SIZE, {"cluster_size": 4096}, gate=gate)
        options = {"backing_file": "base", "backing_fmt": "qcow2", "cluster_size": 4096}
        await create_image(driver, "top", "qcow2", SIZE, options, gate=gate)
        top = await open_disk(driver, "top", format="qcow2", gate=gate)
        assert isinstance(top, MappedNode)
        base = top.child("backing")
        assert base is not None
        epoch = top.engine.epochs.enter()
        opening = driver.spawn(reopen(base, writable=True))
        await driver.sleep(0.02)
        assert not opening.done and base.read_only
        assert (await top.read([0], [512]))[0] == bytes(512)  # a later one is not waited for
        top.engine.epochs.leave(epoch)
        await opening
        assert not base.read_only
        await close_disk(top)

    driver.run(steps())
