"""Buffers for large pieces, and the search for zeroes in them."""

from __future__ import annotations

import random

import pytest

from diskwright.engine.buffers import is_zero, page_buffer, zero_runs


def plain_runs(data: bytes, block: int) -> list[tuple[int, int, bool]]:
    """What zero_runs must say, one byte at a time."""
    out: list[tuple[int, int, bool]] = []
    for at in range(0, len(data), block):
        end = min(at + block, len(data))
        zero = not any(data[at:end])
        if out and out[-1][2] is zero:
            out[-1] = (out[-1][0], end, zero)
        else:
            out.append((at, end, zero))
    return out


@pytest.mark.parametrize("block", [512, 1024, 4096])
def test_runs_are_those_of_a_plain_search(block: int) -> None:
    rng = random.Random(block)
    for _ in range(300):
        data = bytearray(rng.randrange(12) * block + rng.choice((0, 0, rng.randrange(block))))
        for at in range(0, len(data), block):
            match rng.randrange(4):
                case 0:
                    data[at : at + block] = rng.randbytes(len(data[at : at + block]))
                case 1:  # one byte, mostly behind the word that is looked at first
                    data[rng.randrange(at, min(at + block, len(data)))] = 1
        found = list(zero_runs(memoryview(data), block))
        assert found == plain_runs(bytes(data), block)


def test_blocks_longer_than_the_zeroes_at_hand() -> None:
    data = bytearray(3 << 20)
    assert is_zero(memoryview(data))
    data[(2 << 20) - 1] = 1
    assert not is_zero(memoryview(data))
    found = list(zero_runs(memoryview(data), 1 << 20))
    assert found == [(0, 1 << 20, True), (1 << 20, 2 << 20, False), (2 << 20, 3 << 20, True)]


def test_a_page_buffer_is_zeroed_and_writable() -> None:
    buffer = page_buffer(10_000)
    assert len(buffer) == 10_000 and is_zero(buffer)
    buffer[:3] = b"abc"
    assert bytes(buffer[:4]) == b"abc\0"
