"""Several tasks on one file, each on stripes of its own that share sectors with the others'."""

from __future__ import annotations

import random

import pytest

from diskwright.contract import MAY_UNMAP
from diskwright.engine.kernel import Cancelled
from diskwright.protocols.file import FileNode

STRIPE = 100
STRIPES = 400


async def owner(driver, node, model, number, count, rng):
    """Change stripes ``number``, ``number + count``, ...; what was cancelled is written again."""
    mine = range(number, STRIPES, count)
    for _ in range(40):
        chosen = rng.sample(mine, rng.choice([1, 2, 7]))
        offsets = [i * STRIPE for i in chosen]
        lengths = [STRIPE] * len(chosen)
        kind = rng.choice("wwwzr")
        if kind == "r":
            got = await node.read(offsets, lengths)
            for offset, part in zip(offsets, got, strict=True):
                assert bytes(part) == bytes(model[offset : offset + STRIPE])
            continue
        buffers = [rng.randbytes(STRIPE) for _ in chosen]
        if kind == "w":
            work = node.write(offsets, buffers)
        else:
            buffers = [bytes(STRIPE)] * len(chosen)
            work = node.zero(offsets, lengths, rng.choice([0, MAY_UNMAP]))
        task = driver.spawn(work)
        if rng.random() < 0.2:
            for _ in range(rng.randrange(3)):
                await driver.turn()
            task.cancel()
        try:
            await task
        except Cancelled:
            await node.write(offsets, buffers)
        for offset, part in zip(offsets, buffers, strict=True):
            model[offset : offset + STRIPE] = part


@pytest.mark.parametrize("cache", ["writeback", "none"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_stripes(cache, pooled, seed, driver, tmp_path):
    if pooled and cache == "none":
        pytest.skip("direct I/O always runs in the pool")
    path = tmp_path / "x"
    model = bytearray(STRIPES * STRIPE)

    async def steps():
        rng = random.Random(seed)
        node = await FileNode.open(driver, str(path), create=True, cache=cache)
        if pooled:
            node.inline_write = node.inline_read = 0
        count = 5
        tasks = [
            driver.spawn(owner(driver, node, model, i, count, random.Random(rng.random())))
            for i in range(count)
        ]
        for task in tasks:
            await task
        end = node.size
        assert bytes((await node.read([0], [len(model)]))[0]) == bytes(model)
        await node.close()
        assert path.stat().st_size == end
        assert path.read_bytes() == model[:end]
        assert not any(model[end:])

    driver.run(steps())
