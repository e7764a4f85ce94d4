"""Tracing of requests: each is timed, at every node; a signal, or one that takes too long, has what
all of them wait for told.  Without a tracer none of this exists."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType

from ..hints import Any
from .futures import BaseDriver, Timer
from .node import Node
from .waiting import report

_TRACED = ("read", "write", "zero", "discard", "flush", "truncate")
_PACKAGE = __package__.partition(".")[0]


def to_stderr(text: str) -> None:
    """Write a report, also from within a signal's handler."""
    os.write(2, f"{text}\n".encode("utf-8", "replace"))


class Tracer:
    """Follows the nodes that are opened for ``driver``.

    ``path``: requests are written there, a line of JSON when one begins and one when it ends.
    ``slow``: what waits is told by ``out`` once a request takes longer than so many seconds.
    SIGUSR2, where there is one, has it told at once.  ``worker``: which of several processes this
    is, that write to one file (which is there) and to one standard error; 0 is their front.
    """

    def __init__(
        self,
        driver: BaseDriver,
        path: str | None = None,
        slow: float | None = None,
        out: Callable[[str], None] = to_stderr,
        worker: int | None = None,
    ) -> None:
        self.driver = driver
        self.out = out
        self.pass_on: Callable[[int], None] = lambda number: None
        """Called with the number of a signal that has everything told."""
        self._of = {} if worker is None else {"worker": worker}
        self._file = None
        if path is not None:
            mode = "w" if worker is None else "a"
            self._file = open(path, mode, buffering=1, encoding="utf-8")
        self._serial = 0
        self._start = time.monotonic()
        self._line(event="trace", unix=round(time.time(), 6), pid=os.getpid())
        self._slow = slow
        self._open: dict[int, float] = {}
        """When requests began that have not ended, by their numbers."""
        self._told = 0
        """The last request that was told to be slow."""
        self._timer: Timer | None = None
        self._before: Any = None
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._signalled)
        if slow is not None:
            self._look()

    def close(self) -> None:
        """Trace no more."""
        if self._timer is not None:
            self._timer.cancel()
        if sys.platform != "win32" and self._before is not None:
            signal.signal(signal.SIGUSR2, self._before)
            self._before = None
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- requests
    def follow(self, node: Node) -> None:
        """Trace the requests of ``node``."""
        for name in _TRACED:
            setattr(node, name, self.wrapped(node, name, getattr(node, name)))

    def wrapped(
        self, node: Node, name: str, method: Callable[..., Coroutine[Any, Any, Any]]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """``method``, traced."""

        async def traced(*given: Any, **named: Any) -> Any:
            self._serial = serial = self._serial + 1
            self._open[serial] = began = time.monotonic()
            if self._file is not None:
                self._line(event="begin", id=serial, node=node.name, driver=node.driver_name,
                           request=name, **_measures(name, given))  # fmt: skip
            error: BaseException | None = None
            try:
                return await method(*given, **named)
            except BaseException as caught:
                error = caught
                raise
            finally:
                del self._open[serial]
                if self._file is not None:
                    failed = {} if error is None else {"error": repr(error)}
                    seconds = round(time.monotonic() - began, 6)
                    self._line(event="end", id=serial, seconds=seconds, **failed)

        return traced

    def _line(self, **facts: Any) -> None:
        if self._file is not None:
            at = round(time.monotonic() - self._start, 6)
            self._file.write(json.dumps({"t": at, **self._of, **facts}) + "\n")

    # -- reports
    def _look(self) -> None:
        assert self._slow is not None
        now = time.monotonic()
        late = [one for one, began in self._open.items() if now - began >= self._slow]
        if late and max(late) > self._told:
            self._told = max(late)
            self._tell(f"a request takes more than {self._slow:g} s: {report(self.driver)}")
        self._timer = self.driver.later(self._slow / 2, self._look)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.pass_on(number)
        self._tell(f"{report(self.driver)}\nrunning: {_running(frame)}")

    def _tell(self, text: str) -> None:
        if self._of:  # lines of several processes may come together
            who = f"worker {number}" if (number := self._of["worker"]) else "front"
            text = "\n".join(f"{who}: {line}" for line in text.split("\n"))
        self.out(text)


def _measures(name: str, given: Sequence[Any]) -> dict[str, Any]:
    if name == "truncate":
        return {"size": given[0]}
    if name == "flush" or len(given) < 2:
        return {}
    offsets, columns = given[:2]
    lengths = [len(one) for one in columns] if name == "write" else columns
    return {"offset": min(offsets, default=0), "bytes": sum(lengths), "count": len(offsets)}


def _running(frame: FrameType | None) -> str:
    """Where the thread of the driver is: it may itself be what all wait for."""
    found: list[str] = []
    while frame is not None and len(found) < 4:
        if frame.f_globals.get("__name__", "").startswith(f"{_PACKAGE}."):
            found.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "elsewhere"
