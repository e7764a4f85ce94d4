"""What a server says about its commands (``query-qmp-schema``), for help, completion and the types
of values.  It is not trusted: what makes no sense is left out, and types may contain themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ..records import NamedTuple

_DEEPEST = 3
"""Levels of members that help shows,"""
_MOST_ROWS = 2000
"""and how many members."""


class Member(NamedTuple):
    """A member of an object."""

    name: str
    type: str
    optional: bool


class Schema:
    """The answer ``entries``; empty for a server that has none."""

    def __init__(self, entries: Any = ()) -> None:
        self._by: dict[str, Mapping[str, Any]] = {}
        for entry in _dicts(entries):
            if isinstance(entry.get("name"), str) and isinstance(entry.get("meta-type"), str):
                self._by[entry["name"]] = entry
        self.commands = sorted(n for n, e in self._by.items() if e["meta-type"] == "command")
        self.events = sorted(n for n, e in self._by.items() if e["meta-type"] == "event")

    def arguments(self, name: str) -> str:
        """The type of a command's arguments, or of an event's data; empty when that is not
        known."""
        return self._text(name, "command", "arg-type") or self._text(name, "event", "arg-type")

    def kind(self, type: str) -> str:
        """``string``, ``int``, ``number``, ``boolean``, ``null``, ``value``, ``enum``, ``array``,
        ``object``, ``alternate``; ``value`` for what is not known."""
        entry = self._by.get(type, {})
        if entry.get("meta-type") == "builtin":
            return str(entry.get("json-type", "value"))
        found = entry.get("meta-type")
        return found if found in ("enum", "array", "object", "alternate") else "value"

    def element(self, type: str) -> str:
        """The type of an array's elements."""
        return self._text(type, "array", "element-type")

    def words(self, type: str) -> list[str]:
        """The values of an enumeration."""
        values = self._by.get(type, {}).get("values")
        return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []

    def branches(self, type: str) -> list[str]:
        """The types of an alternate."""
        found = _dicts(self._by.get(type, {}).get("members"))
        return [part["type"] for part in found if isinstance(part.get("type"), str)]

    def members(self, type: str, given: Mapping[str, Any] | None = None) -> dict[str, Member]:
        """The members of an object by name; of one whose members depend on one of them, those
        that are there for what is ``given``."""
        entry = self._by.get(type, {})
        if entry.get("meta-type") != "object":
            return {}
        found: dict[str, Member] = {}
        for part in _dicts(entry.get("members")):
            name, of = part.get("name"), part.get("type")
            if isinstance(name, str) and isinstance(of, str):
                found[name] = Member(name, of, "default" in part)
        return found | self.members(chosen) if (chosen := self._chosen(type, given)) else found

    def _chosen(self, type: str, given: Mapping[str, Any] | None) -> str:
        """The object that has the further members for what is ``given``; empty when nothing
        chooses one."""
        value = (given or {}).get(self.tag(type))
        return self.cases(type).get(value, "") if isinstance(value, str) else ""

    def tag(self, type: str) -> str:
        """The member on which others depend; empty when there is none."""
        return self._text(type, "object", "tag")

    def cases(self, type: str) -> dict[str, str]:
        """By each value of the tag, the object that has the further members."""
        found = _dicts(self._by.get(type, {}).get("variants"))
        return {
            part["case"]: part["type"]
            for part in found
            if isinstance(part.get("case"), str) and isinstance(part.get("type"), str)
        }

    def object_in(self, type: str) -> str:
        """``type`` itself when it is an object, or the object that an alternate may be; empty
        without."""
        kind = self.kind(type)
        if kind == "object":
            return type
        branches = self.branches(type) if kind == "alternate" else []
        return next((one for one in branches if self.kind(one) == "object"), "")

    def word(self, type: str) -> str:
        """What a type is called in help."""
        kind = self.kind(type)
        if kind == "enum":
            return " | ".join(self.words(type))
        if kind == "array":
            element = self.element(type)
            inner = self.kind(element)
            return f"list of {inner if inner in ('array', 'alternate') else self.word(element)}"
        if kind == "alternate":
            words = (self.word(one) for one in self.branches(type) if self.kind(one) != kind)
            return " or ".join(words)
        return "any value" if kind == "value" else kind

    def help(self, command: str, given: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Rows about a command: a heading with nothing behind it; or an argument, or a member of
        what is returned, and what it is.  ``given`` chooses among arguments."""
        type = self.arguments(command)
        rows = list(islice(self._rows(type, "", given, {type}), _MOST_ROWS))
        rows = [("Arguments:", ""), *rows] if rows else [("No arguments.", "")]
        returned = self._text(command, "command", "ret-type")
        inner = self._inner(returned)
        results = list(islice(self._rows(inner, "", {}, {inner}), _MOST_ROWS))
        if results:
            listed = " (a list)" if self.kind(returned) == "array" else ""
            rows += [(f"Returns{listed}:", ""), *results]
        features = self._by.get(command, {}).get("features")
        if isinstance(features, list) and features:
            rows.append((f"Features: {', '.join(str(one) for one in features)}", ""))
        return rows

    def _inner(self, type: str) -> str:
        return self.element(type) if self.kind(type) == "array" else type

    def _rows(
        self, type: str, path: str, given: Mapping[str, Any], seen: set[str]
    ) -> Iterator[tuple[str, str]]:
        """A row for each member, and for those of objects in it."""
        for member in self.members(type, given).values():
            name = f"{path}{member.name}"
            yield name, f"{self.word(member.type)}{', optional' if member.optional else ''}"
            below = self.object_in(self._inner(member.type))
            inner = given.get(member.name)
            asked = inner if isinstance(inner, dict) else {}
            deeper = name.count(".") + 1 < _DEEPEST and below not in seen
            if below and (asked or (deeper and len(self.cases(below)) < 4)):
                yield from self._rows(below, f"{name}.", asked, seen | {below})
        tag = self.tag(type)
        if tag and not self._chosen(type, given):
            yield f"{path}...", f"others, with {path}{tag}=..."

    def _text(self, name: str, meta: str, key: str) -> str:
        entry = self._by.get(name, {})
        found = entry.get(key)
        return found if entry.get("meta-type") == meta and isinstance(found, str) else ""


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
