"""``nbd-server-start``: where the NBD server of a daemon listens, and whom it admits."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError
from ..export.listening import listen_tcp, listen_unix, listen_vsock, listening
from ..secrets import Secrets
from .commands import command
from .daemon import Daemon
from .session import Monitor
from .types import INT, STR, Enum, Member, Struct, Union

if TYPE_CHECKING:
    from ..export.nbd_server import Server
    from ..export.nbd_tls import ServerTls

_UNIX = Struct((Member("path", STR),))
_INET = Struct((Member("host", STR), Member("port", STR)))
_VSOCK = Struct((Member("cid", STR), Member("port", STR)))
_FD = Struct((Member("str", STR),))
_ADDRESSES = {"inet": _INET, "unix": _UNIX, "vsock": _VSOCK, "fd": _FD}


def _legacy() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    variants = {name: Struct((Member("data", each),)) for name, each in _ADDRESSES.items()}
    return "type", (Member("type", Enum(*variants)),), variants


SocketAddressLegacy = Annotated[dict[str, Any], Union(_legacy)]


_LIMITS = {"handshake-max-seconds": 10, "max-connections": 100}
_MOST = 1 << 32


@command("nbd-server-start")
def nbd_server_start(
    monitor: Monitor,
    addr: SocketAddressLegacy,
    handshake_max_seconds: int | None = None,
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: int | None = None,
) -> None:
    """Listen for NBD clients.  ``handshake-max-seconds`` (default 10) is the time for a client's
    handshake, ``max-connections`` (default 100) how many clients there may be; 0: no limit.
    ``tls-creds``: the object with the server's credentials, without which nothing is said before
    TLS has begun; ``tls-authz``: the object that says whose certificates are admitted."""
    options = {
        "addr": {"type": addr["type"], **addr["data"]},
        "handshake-max-seconds": handshake_max_seconds,
        "max-connections": max_connections,
        "tls-creds": tls_creds,
        "tls-authz": tls_authz,
    }
    start_server(monitor.daemon, {key: one for key, one in options.items() if one is not None})


def _address() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    return "type", (Member("type", Enum(*_ADDRESSES)),), _ADDRESSES


SERVER_OPTIONS = Struct(
    (
        Member("addr", Union(_address)),
        Member("handshake-max-seconds", INT, True),
        Member("max-connections", INT, True),
        Member("tls-creds", STR, True),
        Member("tls-authz", STR, True),
    )
)
"""As the command line has them, where an address has no ``data``."""


def start_server(daemon: Daemon, options: Mapping[str, Any]) -> None:
    """Listen as :data:`SERVER_OPTIONS` say.  Raises UsageError."""
    if daemon.server is not None:
        raise UsageError("NBD server already running")
    limits = {name: options.get(name, default) for name, default in _LIMITS.items()}
    for name, value in limits.items():
        if not 0 <= value < _MOST:
            raise UsageError(f"Parameter '{name}' expects uint32_t")
    tls = server_tls(daemon.secrets, options.get("tls-creds"), options.get("tls-authz"))
    where = options["addr"]
    from ..export.nbd_server import Server

    listeners = _listen(where)
    daemon.server = Server(
        daemon.driver,
        clients=limits["max-connections"],
        handshake_seconds=limits["handshake-max-seconds"] or 1e9,
        tls=tls,
    )
    daemon.server_path = where.get("path")
    daemon.server.start(*listeners)


def _listen(where: Mapping[str, Any]) -> list[socket.socket]:
    try:
        if where["type"] == "unix":
            place = where["path"]
            return [listen_unix(place)]
        if where["type"] == "vsock":
            place = f"vsock:{where['cid']}:{where['port']}"
            return [listen_vsock(where["cid"], where["port"])]
        if where["type"] == "fd":
            place = f"fd:{where['str']}"
            if not where["str"].isdecimal():
                raise UsageError(f"Unable to parse FD number {where['str']}")
            return [listening(int(where["str"]))]
        place = f"{where['host']}:{where['port']}"
        return listen_tcp(where["host"], where["port"])
    except OSError as error:
        raise UsageError(f"Failed to bind socket to {place}: {error.strerror or error}") from error


def server_tls(secrets: Secrets, creds: str | None, authz: str | None) -> ServerTls | None:
    """What the objects with these ids say of how clients are secured.  Raises UsageError."""
    if creds is None:
        if authz is not None:
            raise UsageError("tls-authz is not permitted without tls-creds")
        return None
    from ..export.nbd_tls import secured_by

    found = secrets.credentials.get(creds)
    if found is None:
        known = creds in secrets or creds in secrets.authz
        raise UsageError(
            f"Object with id '{creds}' is not TLS credentials"
            if known
            else f"No TLS credentials with id '{creds}'"
        )
    admits = None
    if authz is not None:
        admits = secrets.authz.get(authz)
        if admits is None:
            raise UsageError(f"No authorization with id '{authz}'")
    return secured_by(found, admits)


def server_of(daemon: Daemon) -> Server:
    """The server that is running.  Raises UsageError."""
    if daemon.server is None:
        raise UsageError("NBD server not running")
    return daemon.server
