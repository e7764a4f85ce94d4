"""Everything that can be done with one qcow2 image, in random order, against a model; see
`qcow2_states`.  ``DISKWRIGHT_STATES`` is how many sequences each kind of image gets."""

from __future__ import annotations

import os
import random

import pytest

from engine import qcow2_states as states

COUNT = int(os.environ.get("DISKWRIGHT_STATES", "2"))
FIRST = int(os.environ.get("DISKWRIGHT_STATES_FIRST", "0"))
STEPS = 18


def tried(kind: str, seed: int, count: int) -> None:
    todo = states.steps(kind, seed, count)
    wrong = states.problem(kind, seed, todo)
    if wrong:
        less = states.shortened(kind, seed, todo)
        again = states.problem(kind, seed, less)
        pytest.fail(f"{kind}, seed {seed}: {wrong}\n{less}: {again}", pytrace=False)


@pytest.mark.timeout(0 if "DISKWRIGHT_STATES" in os.environ else 120)
@pytest.mark.parametrize("kind", states.KINDS)
def test_anything_in_any_order(kind: str) -> None:
    for seed in range(FIRST, FIRST + COUNT):
        tried(kind, seed, STEPS)


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", states.KINDS)
def test_anything_in_any_order_long(kind: str) -> None:
    for seed in range(1000, 1040):
        tried(kind, seed, 60)


def test_a_failure_is_made_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: states.Subject, a: int, b: int) -> None:
        self.model[a % len(self.model)] ^= 1

    monkeypatch.setattr(states.Subject, "resize", broken)
    rng = random.Random(3)
    less = states.shortened("plain", 0, [(n, *rng.sample(range(99999), 2)) for n in range(19)])
    assert [step[0] for step in less] == [16]


def test_growth_behind_an_encrypted_data_file_reads_as_zeroes() -> None:
    """Behind the end of the disk its last cluster is not written, so nothing is encrypted there."""
    subject = states.Subject("luks-data-file", 0)

    async def story() -> None:
        for size in (65536 + 512, 65536 + 2048, 3 * 65536 + 1024, 9 * 65536):
            last = subject.node.size - 512
            await subject.node.write([last], [b"x" * 512])
            subject.model[last:] = b"x" * 512
            await subject.node.truncate(size)
            del subject.model[size:]
            subject.model.extend(bytes(size - len(subject.model)))
            await subject.look(thorough=True)
        await subject.node.close()

    subject.driver.run(story())
    subject.driver.close()


@pytest.mark.parametrize("kind", ["aes", "luks"])
@pytest.mark.parametrize("snapshot", [False, True])
def test_version_2_of_an_encrypted_image_keeps_its_zeroes(kind: str, snapshot: bool) -> None:
    """Zero clusters over a backing file become clusters of zeroes, which are encrypted like any."""
    for seed in range(9):
        subject = states.Subject(kind, seed)
        if subject.base:
            break

    async def story() -> None:
        unit = subject.unit
        subject.model[: 2 * unit] = b"y" * 2 * unit
        await subject.node.write([0], [bytes(subject.model[: 2 * unit])])
        await subject.node.zero([unit], [4 * unit], 0)
        subject.model[unit : 5 * unit] = bytes(4 * unit)
        if snapshot:
            await subject.snapshot(0, 0)
            await subject.node.zero([0], [unit], 0)
            subject.model[:unit] = bytes(unit)
        await subject.amend(0, 0)
        assert subject.node.format.header.version == 2
        await subject.look(thorough=True)
        await subject.node.close()

    subject.driver.run(story())
    subject.driver.close()
