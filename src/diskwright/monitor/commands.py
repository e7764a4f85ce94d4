"""The register of commands and events, and how a request is carried out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import DiskError
from ..records import NamedTuple
from ..wire.qmp import GENERIC, NOT_FOUND, Fault, Request
from . import types
from .types import Struct, Type

if TYPE_CHECKING:
    from .session import Monitor

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Command(NamedTuple):
    """One command.  ``run(monitor, **arguments)`` carries it out; with ``boxed`` the arguments are
    one value of that type, ``run(monitor, arguments)``.  ``oob``: it may be run before earlier
    ones.  Annotations are read when they are first asked for: most commands are never given."""

    name: str
    run: Callable[..., Any]
    boxed: types.Union | None = None
    oob: bool = False
    features: tuple[str, ...] = ()

    @property
    def arguments(self) -> Struct | types.Union:
        """What it takes."""
        return self.boxed or types.arguments(self.run)

    @property
    def result(self) -> Type:
        """What it returns."""
        return types.result(self.run)

    @property
    def help(self) -> str:
        """What it does, in a sentence or more."""
        from inspect import cleandoc

        return cleandoc(self.run.__doc__ or "")


class Event(NamedTuple):
    """One event; ``tells`` is a NamedTuple of what it tells."""

    name: str
    help: str
    tells: type

    @property
    def data(self) -> Struct:
        """The type of what it tells."""
        found = types.of(self.tells)
        assert isinstance(found, Struct)
        return found


class QmpError(DiskError):
    """An error of another class than ``GenericError``."""

    def __init__(self, kind: str, text: str) -> None:
        self.qmp_class = kind
        super().__init__(text)


COMMANDS: dict[str, Command] = {}
EVENTS: dict[str, Event] = {}


def command(
    name: str,
    *,
    boxed: types.Union | None = None,
    oob: bool = False,
    features: tuple[str, ...] = (),
) -> Callable[[Handler], Handler]:
    """Declare the decorated function as a command: its annotations are the command's types, its
    docstring is the documentation."""

    def declare(run: Handler) -> Handler:
        COMMANDS[name] = Command(name, run, boxed, oob, features)
        return run

    return declare


def event(name: str, data: type, help: str) -> None:
    """Declare an event; ``data`` is a NamedTuple of what it tells."""
    EVENTS[name] = Event(name, help, data)


def check(request: Request) -> Command | Fault:
    """The command that is asked for, or why there is none."""
    if request.fault is not None:
        return request.fault
    found = COMMANDS.get(request.command)
    if found is None:
        return Fault(NOT_FOUND, f"The command {request.command} has not been found")
    if request.oob and not found.oob:
        return Fault(GENERIC, f"The command {request.command} does not support OOB")
    return found


async def carry_out(monitor: Monitor, found: Command, request: Request) -> Any:
    """The result of a command as JSON has it, or a :class:`Fault`."""
    from ..graph.closing import explain

    try:
        taken = found.arguments.take(request.arguments, "")
        answer = found.run(monitor, taken) if found.boxed else found.run(monitor, **_python(taken))
        if isinstance(answer, Awaitable):
            answer = await answer
        return {} if answer is None else types.plain(answer)
    except DiskError as error:
        # What is behind a line's end is a hint for people at a terminal.
        return Fault(error.qmp_class, explain(error).partition("\n")[0])
    except OSError as error:
        return Fault(GENERIC, explain(error))


def _python(taken: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in taken.items()}
