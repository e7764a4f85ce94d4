"""Options of the command line, ``key=value,key.inner=value`` or JSON, as the types that commands
declare them with."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..graph.names import nest, pairs
from ..graph.options import boolean, size
from ..wire.qjson import JsonError, loads
from .types import BOOL, INT, SIZE, STR, Alternate, Array, Struct, Type, Union


def take(of: Type, text: str, implied: str = "") -> Any:
    """The value that ``text`` describes; a first part without ``=`` is the value of the member
    ``implied``.  Raises UsageError."""
    if text.startswith("{"):
        try:
            return of.take(loads(text), "")
        except JsonError as error:
            raise UsageError(str(error)) from None
    return of.take(typed(of, nest(split(text, implied)), ""), "")


def split(text: str, implied: str = "") -> dict[str, str]:
    """The parts of ``key=value,...``; a comma in a value is written twice.  Raises UsageError."""
    found: dict[str, str] = {}
    for i, (key, value) in enumerate(pairs(text)):
        if value is None:
            if i or not implied:
                raise UsageError(f"Expected '=' after parameter '{key}'")
            key, value = implied, key
        found[key] = value
    return found


def typed(of: Type, value: Any, path: str) -> Any:
    """``value``, all of whose leaves are text, with numbers and booleans where ``of`` has them."""
    if isinstance(of, Alternate):
        for branch in of.branches:
            if isinstance(value, branch.json):
                return typed(branch, value, path)
    if isinstance(of, Struct | Union) and isinstance(value, dict):
        known = {member.name: member.type for member in of.members}
        if isinstance(of, Union) and value.get(of.tag) in of.variants:
            known |= {m.name: m.type for m in of.variants[value[of.tag]].members}
        return {
            name: typed(known[name], part, f"{path}.{name}" if path else name)
            if name in known
            else part
            for name, part in value.items()
        }
    if isinstance(of, Array) and isinstance(value, list):
        return [typed(of.of, part, f"{path}.{i}") for i, part in enumerate(value)]
    if of is BOOL and isinstance(value, str):
        return boolean(path, value)
    if of in (INT, SIZE) and isinstance(value, str):
        return size(path, value)
    return value if of is not STR or isinstance(value, str) else of.take(value, path)
