"""Names of NBD exports: URIs (NetworkBlockDevice/nbd, doc/uri.md) and QEMU's older ``nbd:`` names.

Options are those of the driver ``nbd``: ``server`` (``type`` and what belongs to it), ``export``,
and for ``nbds`` names ``tls`` with ``tls-...`` from the query.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from ..errors import UsageError

PORT = 10809
"""Where servers listen that were told no port."""
SCHEMES = frozenset(
    f"{first}{second}" for first in ("nbd", "nbds") for second in ("", "+tcp", "+unix", "+vsock")
)
_TLS = ("tls-certificates", "tls-psk-file", "tls-username", "tls-hostname", "tls-verify-peer")
_EXPORT = ":exportname="
_ERRORS = "surrogateescape"

Options = dict[str, Any]


def parse(name: str) -> Options:
    """The options that ``name`` stands for.  Raises UsageError."""
    scheme, _, rest = name.partition(":")
    if not rest.startswith("//"):
        if scheme != "nbd":
            raise _bad(name, "'//' and a server follow the scheme")
        return _legacy(name, rest)
    try:
        parts = urlsplit(name)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _bad(name, str(error)) from None
    if parts.fragment or "#" in name:
        raise _bad(name, "'#' must be written as '%23'")
    query = dict(parse_qsl(parts.query, keep_blank_values=True, errors=_ERRORS))
    options: Options = {"export": unquote(parts.path.removeprefix("/"), errors=_ERRORS)}
    transport = scheme.partition("+")[2]
    if transport == "unix":
        if host is not None or port is not None:
            raise _bad(name, "a unix socket has no host: write three slashes")
        if not query.get("socket"):
            raise _bad(name, "'?socket=PATH' is missing")
        options["server"] = {"type": "unix", "path": query.pop("socket")}
    elif transport == "vsock":
        if host is None or not host.isdecimal():
            raise _bad(name, "a vsock address begins with a number")
        options["server"] = {"type": "vsock", "cid": host, "port": str(port or PORT)}
    else:
        if not host:
            raise _bad(name, "the host is missing")
        options["server"] = {"type": "inet", "host": host, "port": str(port or PORT)}
    if scheme.startswith("nbds"):
        options["tls"] = True
        if parts.username:
            options["tls-username"] = unquote(parts.username, errors=_ERRORS)
        for key in _TLS:
            if key in query:
                options[key] = query.pop(key)
        if options.get("tls-verify-peer") in ("0", "1"):
            options["tls-verify-peer"] = options["tls-verify-peer"] == "1"
    for key in query:
        raise _bad(name, f"'{key}' means nothing here")
    return options


def _legacy(name: str, rest: str) -> Options:
    """``nbd:HOST:PORT[:exportname=NAME]`` and ``nbd:unix:PATH[:exportname=NAME]``."""
    address, _, export = rest.partition(_EXPORT)
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not path:
            raise _bad(name, "the path of the socket is missing")
        return {"server": {"type": "unix", "path": path}, "export": export}
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise _bad(name, f"error parsing address '{address}'")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return {"server": {"type": "inet", "host": host, "port": port}, "export": export}


def _bad(name: str, why: str) -> UsageError:
    return UsageError(f"'{name}' names no NBD export: {why}")


def _quoted(text: object, safe: str) -> str:
    return quote(str(text), safe=safe, errors=_ERRORS)


def uri(options: Mapping[str, Any]) -> str:
    """The shortest name for flat options (``server.type``, ...), all others left out."""
    export = _quoted(options.get("export", ""), "/")
    scheme = "nbds" if options.get("tls") else "nbd"
    query = {key: options[key] for key in _TLS if options.get("tls") and key in options}
    if options.get("server.type") == "unix":
        # As QEMU writes it: no slash before nothing.
        where = f"{scheme}+unix://" + (f"/{export}" if export else "")
        query = {"socket": options["server.path"], **query}
    elif options.get("server.type") == "vsock":
        where = f"{scheme}+vsock://{options['server.cid']}:{options['server.port']}/{export}"
    else:
        host = str(options["server.host"])
        host = f"[{host}]" if ":" in host else host
        where = f"{scheme}://{host}:{options['server.port']}" + (f"/{export}" if export else "")
    said = {True: "1", False: "0"}
    pairs = (key + "=" + _quoted(said.get(value, value), "/:") for key, value in query.items())
    return where + ("?" + "&".join(pairs) if query else "")
