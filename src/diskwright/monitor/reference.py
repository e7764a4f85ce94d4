"""The part of docs/qmp.md that is made from the declarations: ``python -m
diskwright.monitor.reference docs/qmp.md`` brings it up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from . import all_commands
from .blockdev import OPTIONS, REF, REF_OR_NULL
from .commands import COMMANDS, EVENTS, Command
from .transactions import ACTION, ACTIONS
from .types import Alternate, Array, Builtin, Enum, Member, Struct, Type, Union

BEGIN, END = "<!-- made from the declarations -->", "<!-- until here -->"
_NAMED: dict[Type, str] = {
    OPTIONS: "node options",
    REF: "node options or a node's name",
    REF_OR_NULL: "node options, a node's name or null",
    ACTION: "`type` (`abort`, or a command that is an *action*) and `data` (its arguments)",
}


def updated(page: str) -> str:
    """``page`` with the made part as it has to be."""
    all_commands()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{_text()}\n{END}{after}"


def _text() -> str:
    lines = ["## Commands", ""]
    for command in sorted(COMMANDS.values(), key=lambda one: one.name):
        lines += _command(command)
    lines += ["## Events", ""]
    for event in EVENTS.values():
        lines += [f"### {event.name}", "", event.help, "", *_table(event.data)]
    lines += ["## Node options", "", *_table(OPTIONS)]
    return "\n".join(lines).replace("``", "`")


def _command(command: Command) -> Iterator[str]:
    yield from (f"### {command.name}", "")
    marks = [*command.features, *(["oob"] if command.oob else [])]
    marks += ["action"] if command.name in ACTIONS else []
    if marks:
        yield from (f"*{', '.join(marks)}*", "")
    yield from (command.help, "")
    if isinstance(command.arguments, Union) and command.arguments is OPTIONS:
        yield from ("Arguments: [node options](#node-options).", "")
    else:
        yield from _table(command.arguments)
    result = command.result
    inner = result.of if isinstance(result, Array) else result
    if isinstance(inner, Struct | Union) and inner.members:
        word = "Returns a list of:" if isinstance(result, Array) else "Returns:"
        yield from (word, "", *_table(inner))


def _table(of: Type) -> Iterator[str]:
    rows = list(_rows(of))
    if rows:
        yield from ("| member | type | |", "|---|---|---|", *rows, "")


def _rows(of: Type, inside: str = "", case: str = "") -> Iterator[str]:
    if isinstance(of, Array):
        yield from _rows(of.of, f"{inside}[]", case)
        return
    if not isinstance(of, Struct | Union):
        return
    for member in of.members:
        yield from _member(member, inside, case)
    if isinstance(of, Union):
        for value, struct in of.variants.items():
            yield from _rows(struct, inside, f"{of.tag}={value}")


def _member(member: Member, inside: str, case: str) -> Iterator[str]:
    name = f"{inside}.{member.name}" if inside else member.name
    notes = [f"`{case}`"] if case else []
    if member.optional:
        notes.append("optional")
    yield f"| `{name}` | {_word(member.type)} | {', '.join(notes)} |"
    inner = member.type.of if isinstance(member.type, Array) else member.type
    if inner not in _NAMED:
        yield from _rows(member.type, name, case)


def _word(of: Type) -> str:
    if of in _NAMED:
        return _NAMED[of]
    if isinstance(of, Enum):
        return " ".join(f"`{value}`" for value in of.values)
    if isinstance(of, Array):
        return f"list of {_word(of.of)}"
    if isinstance(of, Alternate):
        return " or ".join(map(_word, of.branches))
    return (
        of.word
        if isinstance(of, Builtin) and of.kind != "value"
        else ("any" if isinstance(of, Builtin) else "object")
    )


def main(path: str) -> None:
    """Bring the page at ``path`` up to date."""
    with open(path, encoding="utf-8") as file:
        page = file.read()
    with open(path, "w", encoding="utf-8") as file:
        file.write(updated(page))


if __name__ == "__main__":
    main(sys.argv[1])
