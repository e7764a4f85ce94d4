"""Commands about the monitor itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ..records import NamedTuple
from .commands import COMMANDS, command
from .introspect import schema
from .session import Monitor
from .types import ANY, BOOL, STR, Array, Enum, Member, Struct, Union


class VersionTriple(NamedTuple):
    """A version in three numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(NamedTuple):
    """The version of QEMU that is followed, and which program this is."""

    qemu: VersionTriple
    package: str


class CommandInfo(NamedTuple):
    """A command that can be used."""

    name: str


def _schema_info() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    kinds = ("builtin", "enum", "array", "object", "alternate", "command", "event")
    jsons = ("string", "number", "int", "boolean", "null", "object", "array", "value")
    features = Member("features", Array(STR), True)
    name, of = Member("name", STR), Member("type", STR)
    member = Struct((name, of, Member("default", ANY, True), features))
    variant = Struct((Member("case", STR), of))
    return (
        "meta-type",
        (name, Member("meta-type", Enum(*kinds)), features),
        {
            "builtin": Struct((Member("json-type", Enum(*jsons)),)),
            "enum": Struct(
                (
                    Member("members", Array(Struct((name, features)))),
                    Member("values", Array(STR)),
                )
            ),
            "array": Struct((Member("element-type", STR),)),
            "object": Struct(
                (
                    Member("members", Array(member)),
                    Member("tag", STR, True),
                    Member("variants", Array(variant), True),
                )
            ),
            "alternate": Struct((Member("members", Array(Struct((of,)))),)),
            "command": Struct(
                (
                    Member("arg-type", STR),
                    Member("ret-type", STR),
                    Member("allow-oob", BOOL, True),
                )
            ),
            "event": Struct((Member("arg-type", STR),)),
        },
    )


SCHEMA_INFO = Union(_schema_info)


@command("qmp_capabilities")
def qmp_capabilities(monitor: Monitor, enable: list[Literal["oob"]] | None = None) -> None:
    """Enter command mode, and enable the named capabilities (``oob``: out-of-band commands)."""
    monitor.session.negotiated = frozenset(enable or ())


@command("query-version")
def query_version(monitor: Monitor) -> VersionInfo:
    """Tell the version of QEMU whose commands these are; ``package`` names this program."""
    version: dict[str, Any] = monitor.daemon.version
    return VersionInfo(VersionTriple(**version["qemu"]), version["package"])


@command("query-commands")
def query_commands(monitor: Monitor) -> list[CommandInfo]:
    """List the commands that can be used."""
    return [CommandInfo(name) for name in COMMANDS]


@command("query-qmp-schema")
def query_qmp_schema(
    monitor: Monitor,
) -> Annotated[list[dict[str, Any]], Array(SCHEMA_INFO)]:
    """Tell every command and event with its members and their types."""
    return schema()


@command("quit")
def quit(monitor: Monitor) -> None:
    """Close everything, and end."""
    monitor.daemon.stop()
