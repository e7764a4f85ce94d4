"""The pytest plugin, which pytest finds by itself where diskwright is installed.

Fixtures for programs that use disks: ``disk_image`` (makes images), ``recording_file`` (makes files
that fail on demand) and ``crash_states`` (what a loss of power may leave); see docs/testing.md.

For programs that bring drivers of their own: ``seeded_driver`` (a
:class:`~.scheduler.SeededDriver`), ``recording_leaf`` (makes a :class:`~.memory.RecordingNode` on
it) and ``conformance`` (runs the suite's checks on a :class:`~.conformance.Subject`).

``--diskwright-seed`` sets the seed of whatever is random.  Nothing is imported before a fixture is
used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..engine.futures import BaseDriver
    from .conformance import Subject
    from .files import Crash, RecordingFile
    from .memory import RecordingNode
    from .scheduler import SeededDriver


def pytest_addoption(parser: Any) -> None:
    parser.addoption(
        "--diskwright-seed", type=int, default=0, help="seed of what diskwright's fixtures draw"
    )


def _seed(request: Any) -> int:
    seed: int = request.config.getoption("--diskwright-seed")
    request.node.user_properties.append(("diskwright-seed", seed))
    return seed


@pytest.fixture
def disk_image(tmp_path: Path) -> Callable[..., Path]:
    """``disk_image(format="qcow2", size=..., content=..., options=..., backing=...)`` makes an
    image in the test's folder and returns its path; see :func:`~.images.make_image`."""
    from .images import make_image

    return partial(make_image, tmp_path)


@pytest.fixture
def recording_file() -> type[RecordingFile]:
    """``recording_file(data_or_path, capacity=..., transfer=...)`` makes a
    :class:`~.files.RecordingFile`."""
    from .files import RecordingFile

    return RecordingFile


@pytest.fixture
def crash_states(request: Any) -> Callable[..., Iterator[Crash]]:
    """``crash_states(work, data_or_path)``; see :func:`~.files.crash_states`."""
    from .files import crash_states

    return partial(crash_states, seed=_seed(request))


@pytest.fixture
def seeded_driver(request: Any) -> SeededDriver:
    """A driver that interleaves by ``--diskwright-seed``."""
    from .scheduler import SeededDriver

    return SeededDriver(_seed(request), eager=None)


@pytest.fixture
def recording_leaf(seeded_driver: SeededDriver) -> Callable[..., RecordingNode]:
    """``recording_leaf(data, delay=20, ...)`` on the seeded driver."""
    from .memory import RecordingNode

    return partial(RecordingNode, seeded_driver)


@pytest.fixture
def conformance(tmp_path: Path) -> Callable[[Subject], None]:
    """``conformance(subject)``: every check, on both drivers of the kernel."""
    from .conformance import CHECKS, run_check
    from .subjects import RUNNERS, portable_mode

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
