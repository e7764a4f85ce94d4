"""Every correctness rule is held by a race that fails without it."""

from __future__ import annotations

import pytest

from .mutants import MUTANTS, Mutant, applied
from .pool import executor, show

# Broken rules under which no run has failed, and what was tried.
SURVIVORS: dict[str, str] = {}


def hunt(index: int) -> tuple[str, int, str]:
    """In a worker: (case, seeds it took, what went wrong), the last one empty if nothing did."""
    from .harness import run_seeds

    one = MUTANTS[index]
    seeds = 0
    with applied(one):
        tries = [(case, 1000, one.seeds) for case in one.cases]
        if one.known is not None:
            tries.insert(0, (*one.known, 1))
        for case, first, count in tries:
            total, failures = run_seeds(case, first, count)
            seeds += total["seeds"]
            if failures:
                return case, seeds, failures[0][1]
    return "", seeds, ""


@pytest.mark.timeout(900)
def test_mutants(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    survived = []
    with executor() as pool:
        for one, (case, seeds, text) in zip(
            MUTANTS, pool.map(hunt, range(len(MUTANTS))), strict=True
        ):
            found = f"{case} after {seeds}: {text[:60]}" if text else f"SURVIVED {seeds}"
            lines.append(f"  rule {one.rule}: {one.name}: {found}")
            # A mutation that cannot run proves nothing.
            assert not text.startswith(("TypeError", "AttributeError", "NameError")), (one, text)
            if not text:
                survived.append(one.name)
    show(
        capsys,
        f"mutants: {len(MUTANTS) - len(survived)} of {len(MUTANTS)} found\n" + "\n".join(lines),
    )
    assert sorted(survived) == sorted(SURVIVORS), "what survives is written down, and nothing else"


def test_every_rule_has_a_mutant() -> None:
    assert {one.rule for one in MUTANTS} == {*range(1, 10), 12}
    assert all(isinstance(one, Mutant) and one.name for one in MUTANTS)
