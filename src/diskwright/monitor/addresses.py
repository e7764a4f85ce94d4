"""Addresses of sockets as commands and options have them (QAPI's SocketAddress)."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..export.listening import (
    descriptor_of,
    listen_abstract,
    listen_tcp,
    listen_unix,
    listen_vsock,
    listening,
)
from ..protocols.sockets import MEMBERS, family_of
from ..records import NamedTuple
from .types import BOOL, SIZE, STR, Member, Struct


def _member(name: str, needed: bool) -> Member:
    return Member(name, STR if needed else SIZE if name == "to" else BOOL, not needed)


ADDRESSES = {
    kind: Struct(tuple(_member(name, needed) for name, needed in members.items()))
    for kind, members in MEMBERS.items()
}
"""The members of an address by its type."""


class Listening(NamedTuple):
    """Sockets that listen, and the file that is one of them (empty: there is none)."""

    listeners: list[socket.socket]
    path: str = ""


def listen(where: Mapping[str, Any], most: int | None = None) -> Listening:
    """Listen as an address says (its ``type`` among its members), at the first ``most`` of the
    addresses that a name has.  Raises UsageError."""
    kind = where["type"]
    if kind == "inet":
        return Listening(_inet(where, most))
    if kind == "fd":
        return Listening([listening(descriptor_of(where["str"], os.environ, os.getpid()))])
    place = where["path"] if kind == "unix" else f"vsock:{where['cid']}:{where['port']}"
    try:
        if kind == "vsock":
            return Listening([listen_vsock(where["cid"], where["port"])])
        if where.get("abstract"):
            return Listening([listen_abstract(place, where.get("tight", True))])
        return Listening([listen_unix(place)], place)
    except OSError as error:
        raise UsageError(f"Failed to bind socket to {place}: {error.strerror or error}") from error


def _inet(where: Mapping[str, Any], most: int | None) -> list[socket.socket]:
    last = where.get("to")
    if last is not None and not 0 <= last < 1 << 16:
        raise UsageError("Parameter 'to' expects uint16_t")
    try:
        return listen_tcp(
            where["host"],
            where["port"],
            most,
            last=last,
            family=family_of(where.get("ipv4"), where.get("ipv6")),
            numeric=where.get("numeric", False),
            mptcp=where.get("mptcp", False),
        )
    except socket.gaierror as error:
        place = f"{where['host']}:{where['port']}"
        raise UsageError(f"address resolution failed for {place}: {error.strerror}") from error
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        what = "Failed to find an available port" if taken else "Failed to bind socket"
        raise UsageError(f"{what}: {error.strerror or error}") from error
