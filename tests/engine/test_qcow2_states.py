"""Everything that can be done with one qcow2 image, in random order, against a model; see
`qcow2_states`.  ``DISKWRIGHT_STATES`` is how many sequences each kind of image gets."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from engine import qcow2_states as states

COUNT = int(os.environ.get("DISKWRIGHT_STATES", "3"))
numbers = st.integers(0, (1 << 30) - 1)


class AnyOrder(RuleBasedStateMachine):
    kind = ""

    @initialize(seed=st.integers(0, 99))
    def make(self, seed: int) -> None:
        self.subject = states.Subject(self.kind, seed)

    def do(self, work: Awaitable[None]) -> None:
        self.subject.driver.run(work)  # type: ignore[arg-type]

    @rule(
        what=st.sampled_from(["write", "write", "write", "zero", "discard", "packed", "resize"]),
        a=numbers,
        b=numbers,
    )
    def change(self, what: str, a: int, b: int) -> None:
        self.do(getattr(self.subject, what)(a, b))

    @rule(what=st.sampled_from(["take", "take", "apply", "delete"]), a=numbers, b=numbers)
    def snapshot(self, what: str, a: int, b: int) -> None:
        self.do(getattr(self.subject, what)(a, b))

    @rule(a=numbers, b=numbers)
    def add_bitmap(self, a: int, b: int) -> None:
        self.do(self.subject.add(a, b))

    @rule(what=st.sampled_from(["remove", "clear", "switch", "merge"]), a=numbers, b=numbers)
    def bitmap(self, what: str, a: int, b: int) -> None:
        self.do(self.subject.bitmap(what, a, b))

    @rule(what=st.sampled_from(["amend", "store", "reopen"]), a=numbers)
    def keep(self, what: str, a: int) -> None:
        self.do(getattr(self.subject, what)(a, 0))

    @rule()
    def look_at_all(self) -> None:
        self.do(self.subject.look(thorough=True))

    @invariant()
    def reads_as_the_model(self) -> None:
        self.do(self.subject.look(thorough=False))

    def teardown(self) -> None:
        if hasattr(self, "subject"):
            try:
                self.do(self.subject.look(thorough=True))
                self.do(self.subject._close())
            finally:
                self.subject.driver.close()


def tried(kind: str, examples: int, steps: int, **more: Any) -> None:
    machine = type(f"AnyOrder_{kind}", (AnyOrder,), {"kind": kind})
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
        **more,
    )
    run_state_machine_as_test(machine, settings=limits)


@pytest.mark.timeout(0 if "DISKWRIGHT_STATES" in os.environ else 600)
@pytest.mark.parametrize("kind", states.KINDS)
def test_anything_in_any_order(kind: str) -> None:
    tried(kind, COUNT - kind.startswith("luks"), 20)  # keys take their time


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", states.KINDS)
def test_anything_in_any_order_long(kind: str) -> None:
    tried(kind, 60, 60)


def test_what_goes_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: states.Subject, a: int, b: int) -> None:
        self.model[a % len(self.model)] ^= 1

    monkeypatch.setattr(states.Subject, "zero", broken)
    with pytest.raises(AssertionError, match="the disk"):
        tried("plain", 20, 20, derandomize=True, database=None, phases=[Phase.generate])


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
            await subject.take(0, 0)
            await subject.node.zero([0], [unit], 0)
            subject.model[:unit] = bytes(unit)
        await subject.amend(0, 0)
        assert subject.node.format.header.version == 2
        await subject.look(thorough=True)
        await subject.node.close()

    subject.driver.run(story())
    subject.driver.close()
