"""What every task of a driver waits for, told from the frames of its coroutines: it costs nothing
until somebody asks.

A request that is stuck waits for something: I/O on a file, a lease that another request holds, a
flush, a budget.  The frames know: their locals are looked through here, and nowhere else.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType

from ..hints import Any
from ..records import NamedTuple
from .futures import BaseDriver, Future, Task
from .leases import Lease, Leases
from .node import Node

_REQUESTS = frozenset({"read", "write", "zero", "discard", "flush", "extents", "truncate", "close"})
_DEEPEST = 200
"""Coroutines within each other that are followed."""


class Wait(NamedTuple):
    """Something that waits for all that is ``below`` it.  ``seconds``: for how long, where requests
    are traced."""

    what: str
    below: list[Wait]
    seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = {"what": self.what}
        if self.seconds is not None:
            found["seconds"] = round(self.seconds, 6)
        if self.below:
            found["waits-for"] = [part.to_dict() for part in self.below]
        return found


class Report(NamedTuple):
    """``stuck`` wait for work of ours, numbered from 1 as their texts refer to each other; ``idle``
    for clients, signals and the like."""

    stuck: list[Wait]
    idle: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.stuck) or 'no'} request{'s' * (len(self.stuck) != 1)} waiting"]
        for number, wait in enumerate(self.stuck, 1):
            lines += _indented(f"[{number}] ", wait)
        if self.idle:
            lines.append(f"idle: {', '.join(self.idle)}")
        return "\n".join(lines)


def _indented(before: str, wait: Wait) -> Iterator[str]:
    since = "" if wait.seconds is None else f", for {wait.seconds:.3f} s"
    yield f"{before}{wait.what}{since}"
    for part in wait.below:
        yield from _indented(" " * (len(before) + 2), part)


class Frame(NamedTuple):
    """One suspended coroutine of a task."""

    code: CodeType
    line: int
    locals: Mapping[str, Any]


def report(driver: BaseDriver) -> Report:
    """What all tasks of ``driver`` wait for."""
    return _Look(driver).report()


class _Look:
    def __init__(self, driver: BaseDriver) -> None:
        self.driver = driver
        self.now = time.monotonic()
        self.frames: dict[Task[Any], list[Frame]] = {
            task: list(_frames(task.coro))
            for task in driver.tasks
            if not task.coro.cr_running  # type: ignore[attr-defined]
        }
        awaited = {id(one) for task in self.frames for one in self.futures(task)}
        self.roots = [task for task in self.frames if id(task) not in awaited]
        self.roots.sort(key=lambda task: (-(self.age(task) or 0), self.title(task)))
        self.numbers: dict[Task[Any], int] = {}
        for task in self.roots:
            if self.busy(task, set()):
                self.numbers[task] = len(self.numbers) + 1

    def report(self) -> Report:
        idle = (task for task in self.roots if task not in self.numbers)
        return Report(
            [self.tree(task, set()) for task in self.numbers],
            sorted(f"{self.title(task)} ({self.cause(task, task._waiting)})" for task in idle),
        )

    # -- structure
    def futures(self, task: Task[Any]) -> list[Future[Any]]:
        """What a task waits for: one future, or several together."""
        for frame in self.frames.get(task, ()):
            if frame.code.co_qualname == "wait_all":
                return [one for one in frame.locals["futures"] if not one.done]
        return [] if task._waiting is None else [task._waiting]

    def busy(self, task: Task[Any], seen: set[Task[Any]]) -> bool:
        """It carries out a request, or waits for one that does, or for what requests wait for."""
        seen.add(task)
        frames = self.frames.get(task, [])
        if any(map(_label, frames)) or (frames and frames[-1].code.co_qualname in _CAUSES):
            return True
        below = (one for one in self.futures(task) if isinstance(one, Task))
        return any(self.busy(one, seen) for one in below if one not in seen)

    def title(self, task: Task[Any]) -> str:
        """What a task is called."""
        return task.name or getattr(task.coro, "__qualname__", "task")

    def age(self, task: Task[Any]) -> float | None:
        """How long its first request takes so far; None where requests are not traced."""
        began = (frame.locals["began"] for frame in self.frames[task] if _traced(frame))
        first = next(began, None)
        return None if first is None else self.now - first

    # -- description
    def tree(self, task: Task[Any], seen: set[Task[Any]]) -> Wait:
        """The task, what it does, and what that waits for."""
        seen.add(task)
        below = [self.wait(task, one, seen) for one in self.futures(task)]
        steps: list[tuple[str, float | None]] = []
        began: float | None = None
        for frame in self.frames.get(task, ()):
            if _traced(frame):
                began = frame.locals["began"]
                continue
            label = _label(frame)
            if label and (not steps or steps[-1][0] != label):
                steps.append((label, None if began is None else self.now - began))
                began = None
        owner = _owner(task)
        if not steps or owner or (task.name and task in self.numbers):
            steps.insert(0, (owner or self.title(task), None))
        for label, seconds in reversed(steps):
            below = [Wait(label, below, seconds)]
        return below[0]

    def wait(self, task: Task[Any], future: Future[Any], seen: set[Task[Any]]) -> Wait:
        """One of the things that a task waits for."""
        if isinstance(future, Task) and future in self.frames:
            if future in seen:
                return Wait(f"{self.title(future)} (see above)", [])
            return self.tree(future, seen)
        return Wait(self.cause(task, future), [])

    def cause(self, task: Task[Any], future: Future[Any] | None) -> str:
        """Why a future that is no task is not done."""
        if future is None:
            return "its turn"
        frames = self.frames.get(task, [])
        if frames and frames[-1].code.co_qualname == "Condition.wait":
            frames = frames[:-1]
        if frames:
            tell = _CAUSES.get(frames[-1].code.co_qualname)
            if tell is not None and (told := tell(self, frames[-1].locals)):
                return told
        if frames and frames[-1].code.co_qualname == "BaseDriver.sleep":
            return f"a pause of {frames[-1].locals['seconds']:g} s"
        for fd, pair in getattr(self.driver, "_waiters", {}).items():
            if isinstance(pair, list) and future in pair:
                return f"descriptor {fd} to be {('readable', 'writable')[pair.index(future)]}"
        pool = self.driver._pool
        if pool is not None and future in pool._unfinished:
            return "work in a thread"
        maker = self.holder(future, task)
        if maker:
            return (
                f"{maker}, which runs alone" if _gate(frames, future) else f"{maker}, for its end"
            )
        return f"{frames[-1].code.co_qualname}:{frames[-1].line}" if frames else "a result"

    def holder(self, thing: object, but: Task[Any] | None = None) -> str:
        """Which task has ``thing`` among what it works with; empty when none is found."""
        for task, frames in self.frames.items():
            for frame in frames:
                if task is but or frame.code.co_qualname == "Leases.take":
                    continue  # it is what waits, and knows for what
                if any(value is thing for value in frame.locals.values()):
                    return self.reference(task)
        return ""

    def waiter(self, lease: Lease) -> str:
        """Which task waits for a lease that is not granted."""
        for task, frames in self.frames.items():
            if frames and frames[-1].locals.get("lease") is lease:
                return self.reference(task)
        return ""

    def reference(self, task: Task[Any]) -> str:
        """How other texts call a task: by the number of the request that it is a part of."""
        for root, number in self.numbers.items():
            if root is task or self.within(root, task, set()):
                return f"[{number}]"
        return self.title(task)

    def within(self, root: Task[Any], task: Task[Any], seen: set[Task[Any]]) -> bool:
        """Whether ``root`` waits for ``task``."""
        seen.add(root)
        below = [one for one in self.futures(root) if isinstance(one, Task) and one not in seen]
        return task in below or any(self.within(one, task, seen) for one in below)

    def lease(self, locals: Mapping[str, Any]) -> str:
        """Who holds what a lease waits for."""
        lease: Lease = locals["lease"]
        leases: Leases = locals["self"]
        before = [one for one in leases.queue
                  if one.turn < lease.turn and leases._conflict(one, lease)]  # fmt: skip
        start, end = lease.spans[0]
        more = f" and {len(lease.spans) - 1} more ranges" if len(lease.spans) > 1 else ""
        what = "the whole image" if end - start >= 1 << 62 else f"{end - start} bytes at {start}"
        text = f"a lease on {what}{more} ({'exclusive' if lease.exclusive else 'shared'})"
        for word, find, granted in (("held by", self.holder, True), ("behind", self.waiter, False)):
            found = [one for one in before if (one.future is None or one.future.done) is granted]
            tasks = sorted({find(one) or "a request that is not found" for one in found})
            if tasks:
                text += f", {word} {', '.join(tasks)}"
        return text


def _frames(awaitable: Any) -> Iterator[Frame]:
    """The coroutines that wait for each other, from the outermost on."""
    for _ in range(_DEEPEST):
        if isinstance(awaitable, CoroutineType):
            frame, inner = awaitable.cr_frame, awaitable.cr_await
        elif isinstance(awaitable, AsyncGeneratorType):
            frame, inner = awaitable.ag_frame, awaitable.ag_await
        elif isinstance(awaitable, GeneratorType):
            return  # that of a future
        else:  # a step of an asynchronous generator, which only the collector sees through
            found = (one for one in gc.get_referents(awaitable)
                     if isinstance(one, (CoroutineType, AsyncGeneratorType)))  # fmt: skip
            awaitable = next(found, None)
            if awaitable is None:
                return
            continue
        if frame is None:
            return
        yield Frame(frame.f_code, frame.f_lineno, frame.f_locals)
        awaitable = inner


def _traced(frame: Frame) -> bool:
    return frame.code.co_qualname == "Tracer.wrapped.<locals>.traced"


def _label(frame: Frame) -> str:
    """What a coroutine does, if that is something that people know; empty otherwise."""
    name, found = frame.code.co_name, frame.locals
    node = found.get("self")
    if name in _REQUESTS and isinstance(node, Node) and node.name:
        return f"{name} on {told_node(node)}{_columns(found)}"
    tell = _LABELS.get(frame.code.co_qualname)
    return "" if tell is None else tell(found)


def told_node(node: Node) -> str:
    """A node's name, driver and file."""
    file = getattr(node, "filename", "")
    return f"{node.name} ({node.driver_name}{f', {file}' if file else ''})"


def _columns(found: Mapping[str, Any]) -> str:
    """How much a request is about."""
    offsets = found.get("offsets")
    if not isinstance(offsets, (list, tuple)) or not offsets:
        return ""
    lengths = found.get("lengths")
    if lengths is None:
        lengths = [len(one) for one in found.get("buffers", ())]
    count = f", {len(offsets)} parts" if len(offsets) > 1 else ""
    return f": {sum(lengths)} bytes at {min(offsets)}{count}"


def _owner(task: Task[Any]) -> str:
    """Whose request it is, where somebody outside asked."""
    for callback in task.callbacks:
        target = callback.func if isinstance(callback, partial) else callback
        chosen = getattr(getattr(target, "__self__", None), "chosen", None)
        if isinstance(chosen, bytes):
            return f"a client of the NBD export '{chosen.decode('utf-8', 'replace')}'"
    return ""


def _gate(frames: list[Frame], future: Future[Any]) -> bool:
    """Whether a procedure holds what comes now."""
    engine = frames[-1].locals.get("engine", frames[-1].locals.get("self")) if frames else None
    return getattr(engine, "gate", None) is future


def _stop(found: Mapping[str, Any], node: Node, tag: str) -> str:
    """Stopped by a node that listens to events, if it is that."""
    return f"a breakpoint of {told_node(node)} at {tag}" if found.get("pause") is not None else ""


_LABELS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "Monitor._perform": lambda found: f"command {found['request'].command}",
    "Procedures._steps": lambda found: f"procedure {found['procedure'].__qualname__}",
    "Procedures._quiet": lambda found: "procedure that runs alone",
    "Writeback._turn": lambda found: "write-back of metadata",
    "Engine._load": lambda found: f"load of metadata from the slot '{found['slot']}'",
}
"""By qualified names of coroutines: what they do, from their locals."""

_CAUSES: dict[str, Callable[[_Look, Mapping[str, Any]], str]] = {
    "Leases.take": lambda look, found: look.lease(found),
    "Budget._wait": lambda look, found: (
        f"{found['count']} bytes of memory for clients' requests, of which "
        f"{found['self'].used} of {found['self'].limit} are in use"
    ),
    "FileIO._job": lambda look, found: (
        f"{found['function'].__name__}() in a thread, on {found['self'].filename}"
    ),
    "FileIO._counted": lambda look, found: f"I/O in a thread, on {found['self'].filename}",
    "Engine.announce": lambda look, found: _stop(
        found, found["self"].slots[found["slot"]], found["tag"]
    ),
    "Engine._load": lambda look, found: _stop(found, found["child"], found["tag"]),
    "Writeback._announced": lambda look, found: _stop(found, found["child"], found["write"].tag),
    "BlkdebugNode._announce": lambda look, found: _stop(
        {"pause": found["stop"]}, found["self"], found["tag"]
    ),
    "Epochs.quiet": lambda look, found: "the end of all requests on the image",
    "Epochs.passed": lambda look, found: "the end of earlier requests on the image",
    "Backend._pass": lambda look, found: "the end of a change of the graph",
    "Backend.quiet": lambda look, found: f"the end of requests on {told_node(found['self'].node)}",
    "Links._answered": lambda look, found: (
        f"an answer of the NBD server at {found['self'].settings.address}"
    ),
    "Links._pick": lambda look, found: (
        f"a connection to the NBD server at {found['self'].settings.address}"
    ),
}
"""By qualified names of the innermost coroutine: what it waits for, from its locals; empty when it
is something else."""
