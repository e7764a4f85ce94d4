"""A driver for each test, closed behind it: the plain one, and the bridge to asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from diskwright.engine.aio_driver import AsyncioDriver
from diskwright.engine.kernel import BaseDriver, Driver


class Bridged(AsyncioDriver):
    """The asyncio driver with the plain one's ``run``."""

    def run(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(self.bridge(coro))


@pytest.fixture(params=["plain", "asyncio"])
def driver(request: pytest.FixtureRequest) -> Iterator[BaseDriver]:
    if request.param == "plain":
        plain = Driver()
        yield plain
        plain.close()
        return
    loop = asyncio.new_event_loop()
    bridged = Bridged(loop)
    yield bridged
    bridged.stop_pool()
    loop.close()
