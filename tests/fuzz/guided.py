"""Coverage-guided fuzzing of one target, in a process of its own: ``python -m fuzz.guided TARGET
RUNS FOLDER``.

``FOLDER/corpus`` grows by every input that reaches new code; what goes wrong is kept in
``FOLDER/found``, one input for each place where something goes wrong, with what it said; and
``FOLDER/result.json`` tells the rest, also which lines were reached.  It is written now and then,
and the next run counts on from it up to RUNS.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import atheris

ROOMS = ("formats/", "wire/", "ops/inspecting/")
LINES: dict[str, set[int]] = {}
"""Those that were reached, by file below the package."""
SAVED = 30
"""Seconds from one result to the next."""


def watch_lines() -> None:
    """Since Python 3.12 the interpreter says of each line once that it is reached, which costs
    nothing afterwards: the fuzzer hears of new ones."""
    monitoring = sys.monitoring
    tool, event = monitoring.COVERAGE_ID, monitoring.events.LINE

    def reached(code: CodeType, line: int) -> object:
        file = code.co_filename.rpartition("/diskwright/")[2]
        if file.startswith(ROOMS):
            LINES.setdefault(file, set()).add(line)
            atheris._trace_branch(atheris._reserve_counter())
        return monitoring.DISABLE

    monitoring.use_tool_id(tool, "fuzz")
    monitoring.register_callback(tool, event, reached)
    monitoring.set_events(tool, event)


def instrument(name: str) -> None:
    """Before, functions tell each of their branches, and take three times as long; this is for the
    short run of the tests."""
    for module in [found for key, found in sys.modules.items() if f".formats.{name}." in key]:
        for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
            for value in list(vars(owner).values()):
                if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                    atheris.instrument_func(value)


WATCHED = sys.version_info >= (3, 12)
if WATCHED:
    watch_lines()

from fuzz.borders_worker import limit, peak  # noqa: E402
from fuzz.fields import modules  # noqa: E402
from fuzz.machine import Hang, watched  # noqa: E402
from fuzz.scaled import scale  # noqa: E402
from fuzz.targets import TARGETS, Target  # noqa: E402


class Session:
    """All executions of a target."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.before: dict[str, Any] = {}
        if (folder / "result.json").exists():
            self.before = json.loads((folder / "result.json").read_text())
        self.executions: int = self.before.get("executions", 0)
        self.opened: int = self.before.get("opened", 0)
        self.found: dict[str, str] = {}
        self.saved = time.monotonic()
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        (folder / "found").mkdir(exist_ok=True)
        for seed in target.seeds():
            name = hashlib.sha1(seed).hexdigest()
            (folder / "corpus" / name).write_bytes(seed)

    def once(self, data: bytes) -> None:
        """One execution; what goes wrong is noted, and the next one follows."""
        self.executions += 1
        try:
            with watched():
                self.opened += self.target.run(data) > 0
        except (Exception, Hang) as error:
            place = where(error)
            if place not in self.found:
                name = hashlib.sha1(data).hexdigest()
                self.found[place] = name
                (self.folder / "found" / name).write_bytes(data)
                said = f"{self.target.said(data)}\n{traceback.format_exc()}"
                (self.folder / "found" / f"{name}.txt").write_text(said)
        if time.monotonic() > self.saved + SAVED:
            self.save()

    def again(self) -> None:
        """What went wrong before may be mended."""
        for path in sorted((self.folder / "found").glob("*")):
            if path.suffix != ".txt":
                data = path.read_bytes()
                path.unlink()
                path.with_suffix(".txt").unlink(missing_ok=True)
                self.once(data)

    def save(self) -> None:
        """Write what there is to tell."""
        self.saved = time.monotonic()
        result = {
            "executions": self.executions, "opened": self.opened,
            "seconds": self.before.get("seconds", 0) + time.process_time(),
            "peak": max(self.before.get("peak", 0), peak()), "found": self.found,
            "lines": {file: sorted(lines) for file, lines in LINES.items()},
        }  # fmt: skip
        new = self.folder / "result.json.new"
        new.write_text(json.dumps(result))
        new.replace(self.folder / "result.json")


def where(error: BaseException) -> str:
    """The kind of an error, and the innermost line of ours that it went through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "diskwright" in f.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} at {place}"


def custom(mutate: Callable[..., bytes]) -> Callable[[bytes, int, int], bytes]:
    """A mutator as the fuzzer asks for it."""

    def mutated(data: bytes, most: int, seed: int) -> bytes:
        return mutate(data, random.Random(seed), lambda old: atheris.Mutate(old, most))[:most]

    return mutated


def main(name: str, runs: str, folder: str) -> None:
    target = TARGETS[name]
    modules()
    if not WATCHED:
        instrument(name)
    session = Session(target, Path(folder))
    scale()
    limit()
    atexit.register(session.save)
    session.again()
    known = len(list((session.folder / "corpus").iterdir()))
    left = max(int(runs) - session.executions, known + 1)
    arguments = [
        "fuzz", f"-atheris_runs={left}", f"-seed={session.executions + 1}", "-max_len=4096",
        "-timeout=120", "-verbosity=0", "-rss_limit_mb=0", "-reduce_inputs=0", f"{folder}/corpus",
    ]  # fmt: skip
    if target.mutate is None:
        atheris.Setup(arguments, session.once)
    else:
        atheris.Setup(arguments, session.once, custom_mutator=custom(target.mutate))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
