"""The types that commands and events are declared with, and how a JSON value becomes one.

A command is a typed Python function, a struct a NamedTuple: :func:`of` reads their annotations.
What Python has no words for (a union by discriminator, an alternate by JSON type) is written with
the classes here, in an ``Annotated``.  Errors are worded as QEMU's are.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from ..errors import UsageError
from ..records import NamedTuple

# Members that QAPI spells with an underscore; all others have hyphens.
_UNDERSCORED = frozenset(
    {
        "backing_file_depth", "bps_rd", "bps_wr", "detect_zeroes", "iops_rd",
        "iops_wr",
        *(f"{kind}_{what}" for kind in ("rd", "wr", "unmap", "flush", "zone_append")
          for what in ("bytes", "operations", "total_time_ns", "merged")),
        *(f"{how}_{kind}_operations" for how in ("failed", "invalid")
          for kind in ("rd", "wr", "unmap", "flush", "zone_append")),
        "wr_highest_offset", "account_invalid", "account_failed", "timed_stats", "idle_time_ns",
        "interval_length",
        *(f"{what}_latency_ns" for what in
          (f"{how}_{kind}" for how in ("min", "max", "avg")
           for kind in ("rd", "wr", "flush", "zone_append"))),
        *(f"avg_{kind}_queue_depth" for kind in ("rd", "wr", "zone_append")),
        *(f"{kind}_latency_histogram" for kind in ("rd", "wr", "flush", "zone_append")),
    }
)  # fmt: skip


def spelled(name: str) -> str:
    """What the member that Python calls ``name`` is called in JSON.  Two underscores are one there:
    not every ``write_threshold`` has one."""
    if "__" in name:
        return name.replace("__", "_")
    return name if name in _UNDERSCORED else name.rstrip("_").replace("_", "-")


class Type:
    """What a value may be."""

    word = ""
    """What it is called in errors and in the documentation."""
    json: tuple[type, ...] = ()
    """The JSON values that an alternate takes for it."""

    def take(self, value: Any, path: str) -> Any:
        """``value`` as Python has it; ``path`` is the member's name in errors (empty: the
        arguments themselves).  Raises UsageError."""
        if not isinstance(value, self.json) or (isinstance(value, bool) and bool not in self.json):
            raise self.mistaken(path)
        return value

    def mistaken(self, path: str) -> UsageError:
        """It is of another type."""
        named = path or "null"
        return UsageError(f"Invalid parameter type for '{named}', expected: {self.word}")


class Builtin(Type):
    """A type of JSON's.  ``name``: QAPI's for it, ``kind``: JSON's."""

    def __init__(self, name: str, kind: str, json: tuple[type, ...], word: str = "") -> None:
        self.name, self.kind, self.json = name, kind, json
        self.word = word or kind


class Size(Builtin):
    """An integer that QAPI has without a sign."""

    def mistaken(self, path: str) -> UsageError:
        return UsageError(f"Parameter '{path or 'null'}' expects uint64")


STR = Builtin("str", "string", (str,))
INT = Builtin("int", "int", (int,), "integer")
SIZE = Size("int", "int", (int,), "integer")
NUMBER = Builtin("number", "number", (float, int))
BOOL = Builtin("bool", "boolean", (bool,))
NULL = Builtin("null", "null", (type(None),))
ANY = Builtin("any", "value", (object,))


class Enum(Type):
    """One of some words."""

    word = "string"
    json = (str,)

    def __init__(self, *values: str) -> None:
        self.values = values

    def take(self, value: Any, path: str) -> Any:
        if super().take(value, path) not in self.values:
            name = path.rpartition(".")[2] or "null"
            raise UsageError(f"Parameter '{name}' does not accept value '{value}'")
        return value


class Array(Type):
    """Any number of values of one type."""

    word = "array"
    json = (list,)

    def __init__(self, of: Type) -> None:
        self.of = of

    def take(self, value: Any, path: str) -> Any:
        return [
            self.of.take(item, f"{path}[{i}]" if path else "")
            for i, item in enumerate(super().take(value, path))
        ]


class Member(NamedTuple):
    """One member of an object."""

    name: str
    type: Type
    optional: bool = False


class Struct(Type):
    """An object.  ``make`` builds what Python has of its members (by their Python names); without
    it that is a dict by the names of JSON."""

    word = "object"
    json = (dict,)

    def __init__(self, members: tuple[Member, ...], make: Callable[..., Any] | None = None) -> None:
        self.members = members
        self.make = make

    def take(self, value: Any, path: str) -> Any:
        left = dict(super().take(value, path))
        found = _members(self.members, left, path)
        _nothing_left(left, path)
        if self.make is None:
            return found
        return self.make(**{name.replace("-", "_"): part for name, part in found.items()})


class Union(Type):
    """An object whose further members depend on its member ``tag``: those of one of ``variants``
    (a struct each).  A value is a dict by the names of JSON.

    ``build`` gives tag, members and variants when they are first needed: a union may contain
    itself.
    """

    word = "object"
    json = (dict,)

    def __init__(
        self, build: Callable[[], tuple[str, tuple[Member, ...], Mapping[str, Struct]]]
    ) -> None:
        self._build = build
        self._built: tuple[str, tuple[Member, ...], Mapping[str, Struct]] | None = None

    def _all(self) -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
        if self._built is None:
            self._built = self._build()
        return self._built

    @property
    def tag(self) -> str:
        """The discriminator."""
        return self._all()[0]

    @property
    def members(self) -> tuple[Member, ...]:
        """Those that every variant has; the discriminator among them."""
        return self._all()[1]

    @property
    def variants(self) -> Mapping[str, Struct]:
        """Further members for each value of the discriminator."""
        return self._all()[2]

    def take(self, value: Any, path: str) -> Any:
        left = dict(super().take(value, path))
        found = _members(self.members, left, path)
        found.update(_members(self.variants[found[self.tag]].members, left, path))
        _nothing_left(left, path)
        return found


class Alternate(Type):
    """One of ``branches``, by what JSON value it is."""

    def __init__(self, word: str, *branches: Type) -> None:
        self.word = word
        self.branches = branches

    def take(self, value: Any, path: str) -> Any:
        for branch in self.branches:
            if isinstance(value, branch.json) and isinstance(value, bool) == (branch is BOOL):
                return branch.take(value, path)
        name = path.rpartition(".")[2]
        raise self.mistaken("" if name.endswith("]") else name)


def _members(members: tuple[Member, ...], left: dict[str, Any], path: str) -> dict[str, Any]:
    """The members' values, taken out of ``left``."""
    found: dict[str, Any] = {}
    for member in members:
        name = f"{path}.{member.name}" if path else member.name
        if member.name in left:
            found[member.name] = member.type.take(left.pop(member.name), name)
        elif not member.optional:
            raise UsageError(f"Parameter '{name}' is missing")
    return found


def _nothing_left(left: Mapping[str, Any], path: str) -> None:
    for name in left:
        raise UsageError(f"Parameter '{path}.{name}' is unexpected" if path else
                         f"Parameter '{name}' is unexpected")  # fmt: skip


_BUILTIN: dict[Any, Type] = {
    str: STR, int: INT, float: NUMBER, bool: BOOL, type(None): NULL, Any: ANY, object: ANY,
}  # fmt: skip


def of(annotation: Any) -> Type:
    """The type that an annotation means."""
    found = _BUILTIN.get(annotation)
    return found if found is not None else _of(annotation)


@cache
def _of(annotation: Any) -> Type:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        found: Type = inner[1]
        return found
    if origin is Literal:
        return Enum(*inner)
    if origin in (list, tuple):
        return Array(of(inner[0]))
    if isinstance(annotation, type) and hasattr(annotation, "_fields"):
        hints = get_type_hints(annotation, include_extras=True)
        defaults: Mapping[str, Any] = cast(Any, annotation)._field_defaults
        members = (_member(name, hints[name], defaults) for name in annotation._fields)
        return Struct(tuple(members), annotation)
    raise TypeError(f"no QAPI type for {annotation!r}")


@cache
def arguments(function: Callable[..., Any]) -> Struct:
    """The arguments of a command: those of ``function`` behind its first."""
    hints = get_type_hints(function, include_extras=True)
    function = cast(Any, function)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code, given = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    most = code.co_argcount
    defaults = dict(zip(names[most - len(given) : most], given, strict=True))
    defaults |= function.__kwdefaults__ or {}
    return Struct(tuple(_member(name, hints[name], defaults) for name in names[1:]))


@cache
def result(function: Callable[..., Any]) -> Type:
    """What a command returns; nothing is an object without members."""
    found = get_type_hints(function, include_extras=True)["return"]
    return EMPTY if found is type(None) else of(found)


EMPTY = Struct(())


def _member(name: str, annotation: Any, defaults: Mapping[str, Any]) -> Member:
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is typing.Union:
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    return Member(spelled(name), of(annotation), name in defaults)


def plain(value: Any) -> Any:
    """What JSON has for a command's result.  A member that is None is left out."""
    if hasattr(value, "_fields"):
        pairs: Iterator[tuple[str, Any]] = zip(value._fields, value, strict=True)
        return {spelled(name): plain(part) for name, part in pairs if part is not None}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value
