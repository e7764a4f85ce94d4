"""A driver for each test, closed behind it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from diskwright.engine.kernel import Driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@pytest.fixture
def run(driver: Driver) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return driver.run
