"""A pytest plugin for programs that bring drivers of their own: ``-p diskwright.testing.plugin``.

Fixtures: ``seeded_driver`` (a :class:`~.scheduler.SeededDriver`; its seed is in the test's report
when it fails), ``recording_leaf`` (makes a :class:`~.memory.RecordingNode` on it) and
``conformance`` (runs the suite's checks on a :class:`~.conformance.Subject`).
``--diskwright-seed`` sets the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .conformance import CHECKS, Subject, run_check
from .memory import RecordingNode
from .scheduler import SeededDriver
from .subjects import RUNNERS, portable_mode

if TYPE_CHECKING:
    from ..engine.futures import BaseDriver


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--diskwright-seed", type=int, default=0, help="seed of the interleaving of engine tests"
    )


@pytest.fixture
def seeded_driver(request: Any) -> Iterator[SeededDriver]:
    """A driver that interleaves by ``--diskwright-seed``."""
    seed = request.config.getoption("--diskwright-seed")
    request.node.user_properties.append(("diskwright-seed", seed))
    yield SeededDriver(seed, eager=None)


@pytest.fixture
def recording_leaf(seeded_driver: SeededDriver) -> Callable[..., RecordingNode]:
    """``recording_leaf(data, delay=20, ...)`` on the seeded driver."""
    return partial(RecordingNode, seeded_driver)


@pytest.fixture
def conformance(tmp_path: Path) -> Callable[[Subject], None]:
    """``conformance(subject)``: every check, on both drivers of the kernel."""

    def run(subject: Subject) -> None:
        for kernel, runner in RUNNERS.items():
            for check in CHECKS:
                folder = tmp_path / kernel / check.__name__
                folder.mkdir(parents=True)

                async def one(driver: BaseDriver, check: Any = check, at: Path = folder) -> None:
                    await run_check(check, driver, subject, at)

                with portable_mode(subject.portable):
                    runner(one)

    return run
