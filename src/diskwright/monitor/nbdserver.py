"""``nbd-server-start``: where the NBD server of a daemon listens, and whom it admits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError
from ..secrets import Secrets
from .addresses import ADDRESSES, listen
from .commands import command
from .daemon import Daemon
from .session import Monitor
from .types import INT, STR, Enum, Member, Struct, Union

if TYPE_CHECKING:
    from ..export.nbd_server import Server
    from ..export.nbd_tls import ServerTls

def _legacy() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    variants = {name: Struct((Member("data", each),)) for name, each in ADDRESSES.items()}
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
    return "type", (Member("type", Enum(*ADDRESSES)),), ADDRESSES


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

    found = listen(where)
    daemon.server = Server(
        daemon.driver,
        clients=limits["max-connections"],
        handshake_seconds=limits["handshake-max-seconds"] or 1e9,
        tls=tls,
    )
    daemon.server.keep_alive = where.get("keep-alive", True)
    daemon.server_path = found.path
    daemon.server.start(*found.listeners)


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
