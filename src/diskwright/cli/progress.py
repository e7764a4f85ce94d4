"""Progress: qemu-img's line for ``-p``, a live line for people at a terminal, JSON for programs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from ..hints import TYPE_CHECKING, Any
from ..units import human
from .options import Args
from .output import Call

if TYPE_CHECKING:
    from typing import TextIO

_INTERVAL = 0.2
_STEP = 1.0
"""Percent that must be gained before qemu-img's line is printed again."""


class Progress:
    """What a long verb reports while it works; call it with bytes done and in all.

    ``mode``: ``off``, ``percent`` (the line of ``qemu-img -p`` on standard output), ``live``
    (percent, rate and time left on standard error) or ``json`` (lines there).  A reader that goes
    away ends the reports, not the work.  SIGUSR1 (and SIGINFO) has it reported once.
    """

    def __init__(self, call: Call, mode: str, stream: TextIO | None = None) -> None:
        self.call = call
        self.mode = mode
        self.stream = stream or sys.stdout
        self.done = 0
        self.total = 0
        self._shown = 0.0
        self._started = time.monotonic()
        self._before = 0
        self._last = 0.0
        self._width = 0
        self._handlers: dict[int, Any] = {}
        if mode == "percent":
            self._percent(0.0)

    @classmethod
    def wanted(cls, call: Call, args: Args, stream: TextIO | None = None) -> Progress:
        """The mode that ``-p``, ``-q`` and the terminal ask for; ``stream`` takes qemu-img's line
        instead of standard output."""
        if "progress" in args:
            mode = "json" if args.get("progress") == "json" else "percent"
            if call.quiet and mode == "percent":
                mode = "off"
        else:
            try:
                mode = "live" if not call.quiet and sys.stderr.isatty() else "off"
            except ValueError:
                mode = "off"
        progress = cls(call, mode, stream)
        progress._hear()
        return progress

    def _hear(self) -> None:
        import signal

        for name in ("SIGUSR1", "SIGINFO"):
            number = getattr(signal, name, None)
            if number is not None:
                with suppress(ValueError):  # this is not the main thread
                    self._handlers[number] = signal.signal(number, self._asked)

    def _asked(self, number: int, frame: object) -> None:
        """Tell once how far it is, where nobody is told anyway."""
        if self.mode == "off":
            percent = self.done * 100 / self.total if self.total else 0.0
            with suppress(OSError, ValueError, RuntimeError):  # closed, or being written to
                sys.stderr.write(f"    ({percent:3.2f}/100%)\n")
                sys.stderr.flush()

    def begun(self, done: int) -> None:
        """So much was done before: the rate is that of what comes now."""
        self._before = self.done = done
        self._started = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < self.done:  # another part of the work begins
            self.begun(0)
        self.done, self.total = done, total
        if self.mode == "off":
            return
        if self.mode == "percent":
            if total:
                self._percent(done * 100 / total)
            return
        now = time.monotonic()
        if now - self._last < _INTERVAL:
            return
        self._last = now
        self._report(now)

    def finish(self, complete: bool = True) -> None:
        """End: on success everything is done."""
        if self._handlers:
            import signal

            while self._handlers:
                signal.signal(*self._handlers.popitem())
        if self.mode == "percent":
            if complete:
                self._percent(100.0)
            self._write(self.stream, "\n")
        elif self.mode == "live":
            if self._width:
                self._write(sys.stderr, "\r" + " " * self._width + "\r")
        elif self.mode == "json" and complete:
            self.done = self.total = self.total or self.done
            self._report(time.monotonic())

    def _percent(self, percent: float) -> None:
        if percent in (0.0, 100.0) or percent > self._shown + _STEP or percent < self._shown:
            self._shown = percent
            self._write(self.stream, f"    ({percent:3.2f}/100%)\r")

    def _report(self, now: float) -> None:
        seconds = max(now - self._started, 1e-6)
        rate = (self.done - self._before) / seconds
        left = (self.total - self.done) / rate if rate and self.total else None
        if self.mode == "json":
            eta = "null" if left is None else f"{left:.1f}"
            self._write(
                sys.stderr,
                f'{{"done": {self.done}, "total": {self.total}, "rate": {int(rate)}, '
                f'"seconds": {seconds:.1f}, "left": {eta}}}\n',
            )
            return
        if self.total:
            percent = self.done * 100 / self.total
            line = f"{percent:6.2f}%  {human(self.done)} of {human(self.total)}"
        else:  # nobody knows
            line = human(self.done)
        line += f"  {human(int(rate))}/s"
        if left is not None and seconds > 1:
            line += f"  {clock(left)} left"
        pad = max(0, self._width - len(line))
        self._width = len(line)
        self._write(sys.stderr, f"\r{line}{' ' * pad}")

    def _write(self, target: TextIO, text: str) -> None:
        try:
            target.write(text)
            target.flush()
        except (OSError, ValueError):
            self.mode = "off"
            if target is sys.stdout:
                from .output import hush

                hush()


def clock(seconds: float) -> str:
    """A duration: ``0:07``, ``1:02:03``."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
