"""The declarations, the page that is made from them, and the schema of qemu-storage-daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diskwright.monitor import all_commands, commands
from diskwright.monitor.basics import SCHEMA_INFO
from diskwright.monitor.introspect import schema
from diskwright.monitor.reference import updated
from diskwright.monitor.types import Array
from monitor.running import THEIRS, daemon, needs_qsd
from monitor.schemas import Row, differences

PAGE = Path(__file__).parents[2] / "docs" / "qmp.md"

all_commands()


def test_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert updated(page) == page, "python -m diskwright.monitor.reference docs/qmp.md"


def test_schema_is_what_it_says_of_itself() -> None:
    entries = schema()
    Array(SCHEMA_INFO).take(entries, "")
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    used = {
        value
        for entry in entries
        for value in _types(entry)
    }  # fmt: skip
    assert used <= set(names)
    assert set(commands.COMMANDS) <= set(names)


def _types(entry: dict[str, Any]) -> list[str]:
    found = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
    parts = [*entry.get("members", ()), *entry.get("variants", ())]
    return found + [part["type"] for part in parts if "type" in part]


def test_every_command_is_documented() -> None:
    for command in commands.COMMANDS.values():
        assert command.help.endswith("."), command.name


def table(rows: list[Row]) -> list[str]:
    """The rows as the page has them."""
    shown = []
    for command, member, here, there in sorted(set(rows)):
        if command == "blockdev-reopen" or ".file" in member:
            continue  # as blockdev-add
        if member.split(".")[-1] in ("driver", "qom-type", "backing-fmt"):
            continue  # what is told above the table
        shown.append(f"| {command} | {member} | {here} | {there} |")
    return ["| | member | here only | there only |", "|---|---|---|---|", *shown]


@needs_qsd
def test_differences_are_those_of_the_page(tmp_path: Path) -> None:
    with daemon(THEIRS, tmp_path) as (_, (client,)):
        theirs = client.do("query-qmp-schema")
    found = table(differences(schema(), theirs))
    page = PAGE.read_text().split("<!-- differences -->")[1].split()
    assert " ".join(found).split() == page, "\n".join(found)
