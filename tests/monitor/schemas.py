"""What two schemas say differently, as rows of a table: (command or event, member, here, there)."""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]
Row = tuple[str, str, str, str]


class Schema:
    """One answer to ``query-qmp-schema``."""

    def __init__(self, entries: list[Entry]) -> None:
        self.by = {entry["name"]: entry for entry in entries}

    def kind(self, name: str) -> str:
        """What a reader calls the type."""
        entry = self.by[name]
        match entry["meta-type"]:
            case "builtin":
                return str(entry["json-type"])
            case "array":
                return f"[{self.kind(entry['element-type'])}]"
            case "alternate":
                return " or ".join(sorted(self.kind(one["type"]) for one in entry["members"]))
            case other:
                return str(other)


def differences(ours: list[Entry], theirs: list[Entry]) -> list[Row]:
    """Of the commands and events that both have; what only we have comes as a row as well."""
    here, there = Schema(ours), Schema(theirs)
    rows: list[Row] = []
    for name, entry in here.by.items():
        if entry["meta-type"] not in ("command", "event"):
            continue
        other = there.by.get(name)
        if other is None:
            rows.append((name, "", "there", "–"))
            continue
        for what in ("arg-type", "ret-type"):
            if what in entry:
                path = "" if what == "arg-type" else "(result)"
                _compare(here, there, entry[what], other[what], name, path, rows, set())
        for what in ("features", "allow-oob"):
            if entry.get(what) != other.get(what):
                rows.append((name, f"({what})", str(entry.get(what)), str(other.get(what))))
    return rows


def _compare(
    here: Schema, there: Schema, mine: str, their: str, command: str, path: str,
    rows: list[Row], seen: set[tuple[str, str]],
) -> None:  # fmt: skip
    one, other = here.by[mine], there.by[their]
    if one["meta-type"] == other["meta-type"] == "object":
        if (mine, their) in seen:
            return
        seen.add((mine, their))
    kinds = here.kind(mine), there.kind(their)
    if kinds[0] != kinds[1]:
        rows.append((command, path, *kinds))
        return
    match one["meta-type"]:
        case "array":
            inner = one["element-type"], other["element-type"]
            _compare(here, there, *inner, command, path, rows, seen)
        case "enum":
            _only(one["values"], other["values"], command, path, rows)
        case "alternate":
            mines = sorted((here.kind(m["type"]), m["type"]) for m in one["members"])
            theirs = sorted((there.kind(m["type"]), m["type"]) for m in other["members"])
            for (_, a), (_, b) in zip(mines, theirs, strict=True):
                _compare(here, there, a, b, command, path, rows, seen)
        case "object":
            _objects(here, there, one, other, command, path, rows, seen)


def _objects(
    here: Schema, there: Schema, one: Entry, other: Entry, command: str, path: str,
    rows: list[Row], seen: set[tuple[str, str]],
) -> None:  # fmt: skip
    mines = {member["name"]: member for member in one["members"]}
    theirs = {member["name"]: member for member in other["members"]}
    _only(mines, theirs, command, path, rows)
    for name in (name for name in mines if name in theirs):
        inner = f"{path}.{name}" if path else name
        mine, their = mines[name], theirs[name]
        words = ["optional" if "default" in member else "required" for member in (mine, their)]
        if words[0] != words[1]:
            rows.append((command, inner, *words))
        _compare(here, there, mine["type"], their["type"], command, inner, rows, seen)
    if one.get("tag") != other.get("tag"):
        rows.append((command, f"{path} (tag)".strip(), str(one.get("tag")), str(other.get("tag"))))
    variants = {v["case"]: v["type"] for v in other.get("variants", ())}
    for variant in one.get("variants", ()):
        if variant["case"] in variants:
            inner = f"{path} ({variant['case']})".strip()
            pair = variant["type"], variants[variant["case"]]
            _compare(here, there, *pair, command, inner, rows, seen)


def _only(mine: Any, their: Any, command: str, path: str, rows: list[Row]) -> None:
    ours = [name for name in mine if name not in their]
    others = [name for name in their if name not in mine]
    if ours or others:
        rows.append((command, path, ", ".join(ours) or "–", ", ".join(others) or "–"))
