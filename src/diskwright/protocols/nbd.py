"""Protocol ``nbd``: options, and opening by them."""

from __future__ import annotations

from collections.abc import Mapping

from ..declare import Driver, Option
from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..hints import TYPE_CHECKING, Any
from ..secrets import Secrets, TlsCredentials
from ..wire.nbd_const import BASE_ALLOCATION, MAX_STRING
from ..wire.nbd_negotiation import Negotiation
from ..wire.nbd_uri import PORT
from .nbd_connect import Address, Security
from .nbd_links import Settings
from .nbdnode import NbdNode
from .sockets import MEMBERS, family_of, inherited_socket

if TYPE_CHECKING:
    import socket

CONNECTIONS = 4
_LEGACY = ("path", "host", "port")
_OWN_TLS = ("tls-certificates", "tls-psk-file", "tls-username", "tls-verify-peer")


def normalised(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the server as ``server...`` alone.  Raises UsageError."""
    out = {key: value for key, value in options.items() if key not in _LEGACY}
    old = {key: options[key] for key in _LEGACY if key in options}
    if old:
        if any(key.startswith("server") for key in options):
            raise UsageError("Cannot use 'server' and path/host/port at the same time")
        if "path" in old:
            if "host" in old:
                raise UsageError("path and host may not be used at the same time")
            out |= {"server.type": "unix", "server.path": old["path"]}
        elif "host" in old:
            out |= {"server.type": "inet", "server.host": old["host"]}
            out["server.port"] = old.get("port", PORT)
    kind = out.get("server.type")
    if kind is None:
        raise UsageError("NBD server address missing")
    wanted = MEMBERS[kind]
    for key in dict.fromkeys(name for members in MEMBERS.values() for name in members):
        given = f"server.{key}" in out
        if wanted.get(key) and not given:
            raise UsageError(f"Parameter '{key}' is missing")
        if given and key not in wanted:
            raise UsageError(f"Parameter '{key}' is unexpected")
    if not 0 <= out.get("server.to", 0) < 1 << 16:
        raise UsageError("Parameter 'to' expects uint16_t")
    if "port" in wanted and not 0 < out["server.port"] < (1 << 16 if kind == "inet" else 1 << 32):
        raise UsageError(f"'{out['server.port']}' is no port")
    for name in ("export", "x-dirty-bitmap"):
        if len(out.get(name, "").encode("utf-8", "surrogateescape")) > MAX_STRING:
            raise UsageError(f"'{name}' is longer than {MAX_STRING} bytes")
    return out


def address_of(options: Mapping[str, Any]) -> Address:
    """Where the server of normalised ``options`` listens."""
    kind = options["server.type"]
    if kind == "unix":
        tight = options.get("server.tight", True) if options.get("server.abstract") else None
        return Address(kind, options["server.path"], tight=tight)
    if kind == "fd":
        return Address(kind, options["server.str"], inherited=[_inherited(options["server.str"])])
    if kind == "vsock":
        return Address(kind, str(options["server.cid"]), options["server.port"])
    return Address(
        kind,
        options["server.host"],
        options["server.port"],
        family_of(options.get("server.ipv4"), options.get("server.ipv6")),
        options.get("server.numeric", False),
        options.get("server.keep-alive", True),
        options.get("server.mptcp", False),
    )


def _inherited(text: str) -> socket.socket:
    """The connected socket that whoever started the program left open.  Raises UsageError."""
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(f"Unable to parse FD number {text}")
    return inherited_socket(int(text))


def security_of(options: Mapping[str, Any], secrets: Any) -> Security | None:
    """How the connection is secured; None: it is not.  Raises UsageError and what reading the
    certificates raises."""
    name = options.get("tls-creds")
    if name is None and not options.get("tls"):
        for key in ("tls-hostname", *_OWN_TLS):
            if key in options:
                raise UsageError(f"'{key}' means nothing without TLS")
        return None
    if name is not None:
        known = secrets.credentials if isinstance(secrets, Secrets) else {}
        if name not in known:
            raise UsageError(f"No TLS credentials with id '{name}'")
        credentials = known[name]
    else:
        psk = options.get("tls-psk-file", "")
        credentials = TlsCredentials(
            "nbds",
            "psk" if psk else "x509",
            options.get("tls-certificates", ""),
            verify_peer=options.get("tls-verify-peer", True),
            username=options.get("tls-username", ""),
            key_file=psk,
        )
    from .nbd_tls import client_context

    host = options.get("tls-hostname")
    if host is None:
        host = options["server.host"] if options["server.type"] == "inet" else "localhost"
    return Security(client_context(credentials), host)


async def open_nbd(driver: BaseDriver, options: dict[str, Any]) -> NbdNode:
    """Open by the options of :data:`DRIVER`.  Raises UsageError and PeerError."""
    own = {option.name for option in DRIVER.options}
    given = normalised({key: value for key, value in options.items() if key in own})
    for key in ("reconnect-delay", "open-timeout", "timeout", "connections"):
        if given.get(key, 1) < (key == "connections"):
            raise UsageError(f"'{key}' cannot be {given[key]}")
    export = given.get("export", "").encode("utf-8", "surrogateescape")
    context = given.get("x-dirty-bitmap") or BASE_ALLOCATION.decode()
    security = security_of(given, options.get("secrets"))

    def negotiation() -> Negotiation:
        return Negotiation(export, secure=security is not None, contexts=[context.encode()])

    address = address_of(given)
    settings = Settings(
        address,
        negotiation,
        security,
        1 if address.inherited else given.get("connections", CONNECTIONS),
        given.get("reconnect-delay", 0),
        given.get("open-timeout", 0),
        given.get("timeout", 0),
    )
    node = NbdNode(driver, settings, context)
    await node.open(not options.get("read-only"), bool(options.get("auto-read-only")))
    return node


async def create_nbd(driver: BaseDriver, options: dict[str, Any]) -> NbdNode:
    """Open an export to make an image in it; it has the size that it has."""
    node = await open_nbd(driver, options)
    node.fixed_end = True
    return node


DRIVER = Driver(
    "nbd",
    "protocol",
    options=(
        Option("server.type", "enum", "kind of the server's address", None,
               ("unix", "inet", "vsock", "fd")),
        Option("server.path", "str", "path of its unix socket"),
        Option("server.abstract", "bool", "the path is a name that is no file's", False),
        Option("server.tight", "bool", "no zeroes follow such a name", True),
        Option("server.host", "str", "its name or number"),
        Option("server.port", "int", "its port", PORT),
        Option("server.numeric", "bool", "host and port are numbers", False),
        Option("server.to", "int", "last port of those who listen; connecting does not use it"),
        Option("server.ipv4", "bool", "use IPv4 (default: what the name has)"),
        Option("server.ipv6", "bool", "use IPv6 (default: what the name has)"),
        Option("server.keep-alive", "bool", "probe a silent connection", True),
        Option("server.mptcp", "bool", "use Multipath TCP", False),
        Option("server.cid", "str", "its vsock context"),
        Option("server.str", "str", "number of an inherited descriptor, a connected socket"),
        Option("path", "str", "the same as server.path"),
        Option("host", "str", "the same as server.host"),
        Option("port", "int", "the same as server.port", PORT),
        Option("export", "str", "name of the export", ""),
        Option("tls-creds", "str", "id of TLS credentials (--object tls-creds-x509,...)"),
        Option("tls-hostname", "str", "name that the server's certificate must have"),
        Option("reconnect-delay", "int",
               "seconds that requests wait for a lost connection to be made again", 0),
        Option("open-timeout", "int", "seconds for which connecting is tried", 0),
        Option("x-dirty-bitmap", "str", "metadata context to query for the map",
               "base:allocation"),
        Option("connections", "int", "most connections, where the server allows several",
               CONNECTIONS, own=True),
        Option("timeout", "int", "seconds after which a silent server is given up (0: never)", 0,
               own=True),
        Option("tls", "bool", "use TLS, with the credentials that the options below tell", False,
               own=True),
        Option("tls-certificates", "str",
               "folder of ca-cert.pem and client-cert.pem; without it the system's are trusted",
               own=True),
        Option("tls-psk-file", "str", "file of pre-shared keys", own=True),
        Option("tls-username", "str", "whose pre-shared key is used", "qemu", own=True),
        Option("tls-verify-peer", "bool", "refuse a server whose certificate is not trusted",
               True, own=True),
    ),
    open=open_nbd,
    create=create_nbd,
    capabilities=frozenset({"discard", "zero"}),
)  # fmt: skip
