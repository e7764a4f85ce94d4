"""Serving until told to stop: the process around exports."""

from __future__ import annotations

import gc
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from ..engine.kernel import BaseDriver, Cancelled

_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if sys.platform != "win32":
    _SIGNALS.append(signal.SIGHUP)


async def until_signalled(
    driver: BaseDriver, work: Coroutine[Any, Any, None], stop: Callable[[], None]
) -> None:
    """Do ``work``; at the first of SIGTERM, SIGINT and SIGHUP (where it exists) ``stop`` is called,
    which must end it.  Main thread only."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    old_descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    old_handlers = [signal.signal(number, _ignore) for number in _SIGNALS]

    async def watch() -> None:
        try:
            while True:
                await driver.readable(reader.fileno())
                if not {*_SIGNALS}.isdisjoint(reader.recv(64)):  # their numbers
                    stop()
        except Cancelled:
            pass

    watcher = driver.spawn(watch(), name="signals")
    try:
        await work
    finally:
        watcher.cancel()
        while not watcher.done:
            await driver.turn()
        signal.set_wakeup_fd(old_descriptor)
        for number, handler in zip(_SIGNALS, old_handlers, strict=True):
            signal.signal(number, handler)
        driver.forget(reader.fileno())
        reader.close()
        writer.close()


def _ignore(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor carries it."""


def tune_collector() -> Callable[[], None]:
    """Take what was built so far out of the garbage collector's sight and let it run seldom:
    a full collection in the middle of a batch is a stall that every client sees.  Returns what
    undoes it."""
    old = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)

    def undo() -> None:
        gc.set_threshold(*old)
        gc.unfreeze()

    return undo
