"""``transaction``: several actions, all of them or none.

An action is an asynchronous function of a :class:`Transaction` and the action's members.  What it
does takes effect at once, so that later actions build on it; it says how that is taken back
(:meth:`Transaction.undo`), and what is left to do when no action can fail any more
(:meth:`Transaction.finish`).  The command of the same name is a transaction of that one action.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar

from ..errors import DiskError, UsageError
from ..graph.closing import explain
from ..graph.node import Node
from ..jobs.groups import Group
from ..jobs.job import Job
from ..jobs.work import Work
from ..records import NamedTuple
from . import types
from .commands import command
from .daemon import Daemon
from .session import Monitor
from .types import Array, Enum, Member, Struct, Union

Act = TypeVar("Act", bound=Callable[..., Awaitable[None]])
Step = Callable[[], Awaitable[None] | None]
Mode = Literal["individual", "grouped"]


class Transaction:
    """What is done together, in a moment without requests.  ``grouped``: the jobs that it begins
    succeed together or not at all."""

    def __init__(self, daemon: Daemon, mode: Mode = "individual") -> None:
        self.daemon = daemon
        self._group = Group() if mode == "grouped" else None
        self._undo: list[Step] = []
        self._finish: list[Step] = []

    def undo(self, step: Step) -> None:
        """Call ``step`` if an action fails; those that were named later are called before."""
        self._undo.append(step)

    def finish(self, step: Step) -> None:
        """Call ``step``, which does not fail, when all actions have succeeded."""
        self._finish.append(step)

    def begin(self, id: str, work: Work, **options: Any) -> Job:
        """A job (``options`` as :class:`.Job` has them) that starts when all have succeeded."""
        job = Job(self.daemon.jobs, id, work, group=self._group, **options)

        async def drop() -> None:
            job.stop()
            await job.until_ended()

        self.undo(drop)
        self.finish(job.start)
        return job

    async def run(
        self, work: Callable[[], Awaitable[None]], actions: Iterable[Mapping[str, Any]] = ({},)
    ) -> None:
        """Do ``work``, which tells :meth:`undo` and :meth:`finish`, as a whole or not at all.

        No request is on its way meanwhile to the nodes that the members of ``actions`` name; where
        one names none, to no node at all.
        """
        nodes = [self._named(members) for members in actions]
        found = [node for node in nodes if node is not None]
        whole = len(found) < len(nodes)
        drain = self.daemon.draining_all() if whole else self.daemon.draining(found)
        await drain.begin()
        try:
            try:
                await work()
            except BaseException as error:
                await self._take_back(error)
                raise
            for step in self._finish:
                await _done(step)
        finally:
            drain.end()

    def _named(self, members: Mapping[str, Any]) -> Node | None:
        names = [members.get(name) for name in ("node", "node_name", "device")]
        nodes = self.daemon.graph.nodes
        return next((nodes[name] for name in names if name in nodes), None)

    async def _take_back(self, error: BaseException) -> None:
        for step in reversed(self._undo):
            try:
                await _done(step)
            except (OSError, DiskError) as second:
                error.add_note(f"Could not be taken back ({explain(second)})")


async def _done(step: Step) -> None:
    answer = step()
    if isinstance(answer, Awaitable):
        await answer


class Action(NamedTuple):
    """An action.  ``grouped``: it begins a job, so that it can be done with the others'."""

    run: Callable[..., Awaitable[None]]
    grouped: bool

    @property
    def members(self) -> Struct:
        """What it takes."""
        return types.arguments(self.run)


ACTIONS: dict[str, Action] = {}


def action(
    name: str, *, grouped: bool = False, plain: bool = True, features: tuple[str, ...] = ()
) -> Callable[[Act], Act]:
    """Declare the decorated function, ``run(transaction, **members)``, as an action and, if
    ``plain``, as a command."""

    def declare(run: Act) -> Act:
        ACTIONS[name] = Action(run, grouped)

        @wraps(run)
        async def alone(monitor: Monitor, **members: Any) -> None:
            one = Transaction(monitor.daemon)
            await one.run(lambda: run(one, **members), [members])

        if plain:
            command(name, features=features)(alone)
        return run

    return declare


def _actions() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    variants = {name: Struct((Member("data", one.members),)) for name, one in ACTIONS.items()}
    return "type", (Member("type", Enum(*variants)),), variants


ACTION = Union(_actions)


class Properties(NamedTuple):
    """``grouped``: the jobs of a transaction end together, and one that fails ends them all."""

    completion_mode: Mode = "individual"


@action("abort", plain=False)
async def abort(transaction: Transaction) -> None:
    """Fail, so that nothing is done."""
    raise UsageError("Transaction aborted using Abort action")


@command("transaction")
async def transaction(
    monitor: Monitor,
    actions: Annotated[list[dict[str, Any]], Array(ACTION)],
    properties: Properties | None = None,
) -> None:
    """Carry out actions in their order, each with the arguments of the command of its name; when
    one fails, nothing has been done.  ``abort`` always fails."""
    mode = properties.completion_mode if properties else "individual"
    if mode == "grouped":
        for one in actions:
            if not ACTIONS[one["type"]].grouped:
                raise UsageError(
                    f"Action '{one['type']}' does not support transaction property "
                    "completion-mode = grouped"
                )

    whole = Transaction(monitor.daemon, mode)

    given = [{k.replace("-", "_"): value for k, value in one["data"].items()} for one in actions]

    async def work() -> None:
        for one, members in zip(actions, given, strict=True):
            await ACTIONS[one["type"]].run(whole, **members)

    await whole.run(work, given)
