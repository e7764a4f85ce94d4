"""Commands about objects: secrets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records import NamedTuple
from .commands import QmpError, command
from .session import Monitor
from .types import STR, Enum, Member, Struct, Union


def _properties() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    secret = Struct(
        (
            Member("data", STR, True),
            Member("file", STR, True),
            Member("format", Enum("raw", "base64"), True),
            Member("keyid", STR, True),
            Member("iv", STR, True),
        )
    )
    return "qom-type", (Member("qom-type", Enum("secret")), Member("id", STR)), {"secret": secret}


OBJECT_OPTIONS = Union(_properties)


class ObjectPropertyInfo(NamedTuple):
    """A property: for an object below another, ``child<TYPE>``."""

    name: str
    type: str


@command("object-add", boxed=OBJECT_OPTIONS)
def object_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Define a secret, which options such as ``key-secret`` then name."""
    monitor.daemon.secrets.define(options, lambda path: Path(path).read_bytes())


@command("object-del")
def object_del(monitor: Monitor, id: str) -> None:
    """Forget an object.  Nodes that are open keep what they have of it."""
    if id not in monitor.daemon.secrets:
        raise UsageError(f"object '{id}' not found")
    monitor.daemon.secrets.forget(id)


@command("qom-list")
def qom_list(monitor: Monitor, path: str) -> list[ObjectPropertyInfo]:
    """List what is at a path; the objects are at ``/objects``."""
    kind = ObjectPropertyInfo("type", "string")
    match path.strip("/").split("/"):
        case ["objects"]:
            found = (ObjectPropertyInfo(name, "child<secret>") for name in monitor.daemon.secrets)
            return [kind, *found]
        case [""]:
            return [kind, ObjectPropertyInfo("objects", "child<container>")]
    raise QmpError("DeviceNotFound", f"Device '{path}' not found")
