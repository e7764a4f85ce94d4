"""Commands about objects: secrets, TLS credentials, who is admitted, and threads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..ops.secrets import read_file
from ..records import NamedTuple
from .commands import QmpError, command
from .daemon import Daemon
from .session import Monitor
from .types import BOOL, INT, STR, Array, Enum, Member, Struct, Union

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def _optional(of: Any, *names: str) -> tuple[Member, ...]:
    return tuple(Member(name, of, True) for name in names)


def _properties() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    texts = ("data", "file", "keyid", "iv")
    secret = (*_optional(STR, *texts), Member("format", Enum("raw", "base64"), True))
    tls = (
        *_optional(BOOL, "verify-peer"),
        *_optional(STR, "dir", "priority"),
        Member("endpoint", Enum("client", "server"), True),
    )
    policy = Enum("deny", "allow")
    rule = Struct(
        (
            Member("match", STR),
            Member("policy", policy),
            Member("format", Enum("exact", "glob"), True),
        )
    )
    threads = ("aio-max-batch", "thread-pool-min", "thread-pool-max")
    polling = ("poll-max-ns", "poll-grow", "poll-shrink")
    variants = {
        "authz-list": (Member("policy", policy, True), Member("rules", Array(rule), True)),
        "authz-listfile": (Member("filename", STR), *_optional(BOOL, "refresh")),
        "authz-simple": (Member("identity", STR),),
        "iothread": _optional(INT, *threads, *polling),
        "secret": secret,
        "tls-creds-psk": (*tls, *_optional(STR, "username")),
        "tls-creds-x509": (*tls, *_optional(BOOL, "sanity-check"), *_optional(STR, "passwordid")),
    }
    members = (Member("qom-type", Enum(*variants)), Member("id", STR))
    return "qom-type", members, {name: Struct(each) for name, each in variants.items()}


OBJECT_OPTIONS = Union(_properties)


class ObjectPropertyInfo(NamedTuple):
    """A property: for an object below another, ``child<TYPE>``."""

    name: str
    type: str


@command("object-add", boxed=OBJECT_OPTIONS)
def object_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Define an object that options then name: a secret, TLS credentials (whose files are read when
    they are used, and must be there), or who is admitted by the NBD server.  An ``iothread`` can be
    named, and has no effect: nodes are served by one thread, and system calls that wait are made by
    up to seven others."""
    define(monitor.daemon, options)


def define(daemon: Daemon, options: Mapping[str, Any]) -> None:
    """Define the object that ``options`` (:data:`OBJECT_OPTIONS`) describe.  Raises UsageError,
    DiskError and OSError."""
    id, kind = options["id"], options["qom-type"]
    if id in daemon.objects:
        raise UsageError(f"attempt to add duplicate property '{id}' to object (type 'container')")
    if not _ID.fullmatch(id):
        raise UsageError("Parameter 'id' expects an identifier")
    if kind != "iothread":
        daemon.secrets.define(options, read_file)
        if kind.startswith("tls-creds-"):
            try:
                _look_at(daemon, id)
            except BaseException:
                daemon.secrets.forget(id)
                raise
    daemon.objects[id] = kind


def _look_at(daemon: Daemon, id: str) -> None:
    """Raise unless the files of credentials can be used."""
    from ..protocols.nbd_tls import client_context, server_context

    found = daemon.secrets.credentials[id]
    try:
        (server_context if found.endpoint == "server" else client_context)(found)
    except OSError as error:
        raise UsageError(
            f"Unable to access credentials {error.filename or found.folder}: {error.strerror}"
        ) from error


@command("object-del")
def object_del(monitor: Monitor, id: str) -> None:
    """Forget an object.  Nodes that are open and a server that runs keep what they have of it."""
    daemon = monitor.daemon
    kind = daemon.objects.pop(id, None)
    if kind is None:
        raise UsageError(f"object '{id}' not found")
    if kind != "iothread":
        daemon.secrets.forget(id)


@command("qom-list")
def qom_list(monitor: Monitor, path: str) -> list[ObjectPropertyInfo]:
    """List what is at a path; the objects are at ``/objects``."""
    own = ObjectPropertyInfo("type", "string")
    match path.strip("/").split("/"):
        case ["objects"]:
            known = monitor.daemon.objects.items()
            return [own, *(ObjectPropertyInfo(id, f"child<{kind}>") for id, kind in known)]
        case [""]:
            return [own, ObjectPropertyInfo("objects", "child<container>")]
    raise QmpError("DeviceNotFound", f"Device '{path}' not found")
