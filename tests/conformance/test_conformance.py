"""The public suite, under pytest: every driver.  `make test` runs it on the kernel's driver of
asyncio from the wheel, on another interpreter (tools/check-wheel); ``--long`` runs it here as well.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from diskwright.testing.conformance import CHECKS, Session, Subject, Unavailable, run_check
from diskwright.testing.subjects import RUNNERS, portable_mode, subjects


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kernel", ["plain", pytest.param("asyncio", marks=pytest.mark.long)])
@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.name)
def test_driver(subject: Subject, kernel: str, tmp_path: Path) -> None:
    for check in CHECKS:
        folder = tmp_path / check.__name__
        folder.mkdir()
        with portable_mode(subject.portable):
            try:
                RUNNERS[kernel](partial(_one, check, subject, folder))
            except Unavailable as why:
                pytest.skip(str(why))


def _one(check, subject, folder, driver):  # type: ignore[no-untyped-def]
    return run_check(check, driver, subject, folder)


def test_it_runs_without_development_tools() -> None:
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "from diskwright.testing.__main__ import main; sys.exit(main(['memory: new_disk']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("2 passed, 0 failed")


def test_it_finds_a_node_that_forgets(tmp_path: Path) -> None:
    subject = next(s for s in subjects() if s.name == "memory")

    async def broken(driver, folder, fresh):  # type: ignore[no-untyped-def]
        node = await subject.open(driver, folder, fresh)
        original = node.write

        async def write(offsets, buffers, flags=0):  # type: ignore[no-untyped-def]
            await original(offsets[:4], buffers[:4], flags)

        node.write = write  # type: ignore[method-assign]
        return node

    async def both(driver):  # type: ignore[no-untyped-def]
        session = await Session(driver, subject._replace(open=broken), tmp_path).open()
        with pytest.raises(AssertionError, match="byte 0x"):
            await next(c for c in CHECKS if c.__name__ == "batches")(session)

    RUNNERS["plain"](both)
