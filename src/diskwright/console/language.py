"""A line of the shell: ``command key=value a.b=c``, a command with its arguments as JSON, or a
whole message as JSON; and what may stand where the cursor is.

Values are what the server's schema says: ``64M`` is a number where that wants one, ``on`` a boolean
where it wants one of those.  What it does not know is JSON if it is that, and else text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import UsageError
from ..wire.qmp_client import Message
from .schema import Schema

_INTEGER = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)([kKMGTPE]?)")
_TRUE, _FALSE = ("on", "yes", "true"), ("off", "no", "false")
_OPEN = {"{": "}", "[": "]"}
_DEEPEST = 32


def words(line: str) -> list[str]:
    """The words of ``line``, with their quotes.  A quoted part, and JSON in brackets, may contain
    blanks; what is left open ends with the line."""
    found: list[str] = []
    word = ""
    quote = ""
    closing: list[str] = []
    at = 0
    while at < len(line):
        char = line[at]
        at += 1
        if quote:
            if char == "\\" and at < len(line):
                char += line[at]
                at += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in _OPEN and (closing or not word or word.endswith("=")):
            closing.append(_OPEN[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char.isspace() and not closing:
            if word:
                found.append(word)
            word = ""
            continue
        word += char
    return [*found, word] if word else found


def plain(word: str) -> str:
    """``word`` without its quotes, and the backslashes that mean the character behind them."""
    if word[:1] in _OPEN:
        return word
    return re.sub(
        r'"((?:[^"\\]|\\.)*)"?|\'([^\']*)\'?',
        lambda match: match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1]),
        word,
    )


def parse(line: str, schema: Schema) -> Message:
    """The message that ``line`` means.  Raises UsageError."""
    line = line.strip()
    if line.startswith("{"):
        found = _json(line)
        if not isinstance(found, dict):
            raise UsageError("a message is an object")
        return found
    name, *rest = words(line)
    message: Message = {"execute": name}
    if len(rest) == 1 and rest[0].startswith("{"):
        message["arguments"] = _json(rest[0])
    elif rest:
        type = schema.arguments(name)
        message["arguments"] = _value(schema, type, tree(rest), "") if type else _free(tree(rest))
    return message


def tree(assignments: Iterable[str]) -> dict[str, Any]:
    """``key=value`` words as nested objects with text at their ends.  Raises UsageError."""
    found: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            raise UsageError(f"expecting key=value, not '{word}'")
        if len(path) > _DEEPEST:
            raise UsageError(f"'{key[:40]}...' has more than {_DEEPEST} parts")
        at = found
        for part in path[:-1]:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise UsageError(f"'{key}' is within what has a value already")
        if path[-1] in at:
            raise UsageError(f"'{key}' is given twice")
        at[path[-1]] = plain(value)
    return found


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"no JSON: {error}") from None


def _free(value: Any) -> Any:
    """A value of which no schema tells the type."""
    if isinstance(value, dict):
        return {name: _free(part) for name, part in value.items()}
    if value[:1] in _OPEN:
        return _json(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _value(schema: Schema, type: str, value: Any, path: str) -> Any:
    """``value``, a tree with text at its ends, as the type has it."""
    kind = schema.kind(type)
    if isinstance(value, dict):
        return _nested(schema, type, value, path)
    if kind in ("object", "array", "alternate") and value[:1] in _OPEN:
        return _json(value)
    if kind in ("string", "enum"):
        return value
    if kind == "array":
        element = schema.element(type)
        if schema.kind(element) == "array":
            raise UsageError(f"'{path}' is a list of lists: write it as JSON")
        return [_value(schema, element, part, path) for part in value.split(",") if part]
    if kind == "int":
        return _integer(value, path)
    if kind == "boolean":
        if value in _TRUE or value in _FALSE:
            return value in _TRUE
        raise UsageError(f"'{path}' is on or off, not '{value}'")
    if kind == "alternate":
        kinds = {schema.kind(one): one for one in schema.branches(type)}
        if value == "null" and "null" in kinds:
            return None
        if "boolean" in kinds and (value in _TRUE or value in _FALSE):
            return value in _TRUE
        if "int" in kinds and _INTEGER.fullmatch(value):
            return _integer(value, path)
        return value
    return _free(value)


def _nested(schema: Schema, type: str, value: dict[str, Any], path: str) -> Any:
    """An object; or a list, whose parts have numbers for names."""
    kinds = [type, *schema.branches(type)] if schema.kind(type) == "alternate" else [type]
    array = next((one for one in kinds if schema.kind(one) == "array"), "")
    inner = f"{path}." if path else ""
    if array and all(part.isdecimal() for part in value):
        element = schema.element(array)
        if sorted(map(int, value)) != list(range(len(value))):
            raise UsageError(f"the parts of '{path}' are not numbered from 0")
        parts = sorted(value.items(), key=lambda item: int(item[0]))
        return [_value(schema, element, part, f"{inner}{number}") for number, part in parts]
    members = schema.members(schema.object_in(type), value)
    return {
        name: _value(schema, members[name].type, part, inner + name)
        if name in members
        else _free(part)
        for name, part in value.items()
    }


def _integer(text: str, path: str) -> int:
    match = _INTEGER.fullmatch(text)
    if match is None or len(text) > 40:
        raise UsageError(f"'{path}' is a number, not '{text[:40]}'")
    sign, digits, suffix = match.groups()
    number = int(digits, 16 if digits[1:2] in "xX" and len(digits) > 1 else 10)
    if suffix:
        number <<= 10 * ("KMGTPE".index(suffix.upper()) + 1)
    return -number if sign == "-" else number


def complete(
    line: str,
    schema: Schema,
    own: Iterable[str] = (),
    known: Callable[[str, str], Iterable[str]] = lambda command, member: (),
) -> list[str]:
    """What the last word of ``line`` may become (it is empty behind a blank).

    ``own``: commands of the shell itself; ``known(command, member)``: names of what is there.
    """
    found = words(line)
    last = "" if not found or line[-1:].isspace() else found.pop()
    if not found or (found[0] == "help" and len(found) == 1):
        return _fitting(last, [*schema.commands, *(own if not found else ())])
    if found[0] == "help":
        found.pop(0)
    command, *rest = found
    if command == "wait" and not rest:
        return _fitting(last, schema.events)
    if command == "wait":
        command = rest.pop(0)
    try:
        given = tree(rest)
    except UsageError:
        return []
    key, equals, _ = last.partition("=")
    *path, name = key.split(".")
    type = schema.arguments(command)
    for part in path:
        member = schema.members(type, given).get(part)
        if member is None:
            return []
        type = schema.object_in(member.type)
        inner = given.get(part)
        given = inner if isinstance(inner, dict) else {}
    members = schema.members(type, given)
    before = "".join(f"{part}." for part in path)
    if not equals:
        choices = [
            f"{before}{one.name}{end}"
            for one in members.values()
            if one.name not in given or isinstance(given[one.name], dict)
            for end in _ends(schema, one.type)
        ]
        return _fitting(last, choices)
    if name not in members:
        return []
    values = [*_values(schema, members[name].type), *known(command, name)]
    return _fitting(last, [f"{key}={one}" for one in values])


def _ends(schema: Schema, type: str) -> str:
    """What comes behind the name of a member: the name of one of its own, or its value."""
    if schema.kind(type) == "object":
        return "."
    return ".=" if schema.object_in(type) else "="


def _values(schema: Schema, type: str) -> list[str]:
    kind = schema.kind(type)
    if kind == "boolean":
        return ["on", "off"]
    if kind == "alternate":
        branches = (one for one in schema.branches(type) if schema.kind(one) != kind)
        return [word for one in branches for word in _values(schema, one)]
    return schema.words(type) if kind == "enum" else []


def _fitting(beginning: str, choices: Iterable[str]) -> list[str]:
    return sorted({one for one in choices if one.startswith(beginning)})
