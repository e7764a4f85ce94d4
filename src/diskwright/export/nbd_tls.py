"""TLS of the NBD server: what a connection does once its client asked for it."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Any

from ..authz import Authz
from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..protocols.nbd_connect import patiently
from ..protocols.nbd_tls import explained, server_context
from ..records import NamedTuple
from ..secrets import TlsCredentials


class ServerTls(NamedTuple):
    """How clients are secured.  ``authz``: whom the distinguished name of a client's certificate
    must please, where not every one that the authority signed is admitted."""

    context: ssl.SSLContext
    authz: Authz | None = None


def secured_by(credentials: TlsCredentials, authz: Authz | None) -> ServerTls:
    """Raises UsageError, and what the files of the credentials raise."""
    if authz is not None and credentials.kind == "psk":
        raise UsageError("'tls-authz' is for certificates; with keys, who has one is admitted")
    return ServerTls(server_context(credentials), authz)


class Secured:
    """The TLS side of a connection.  ``sock`` takes the place of the plain one, which must not be
    used any more; nothing is sent or received over it before :meth:`shake_hands`."""

    def __init__(self, tls: ServerTls, sock: socket.socket) -> None:
        self.tls = tls
        self.sock = tls.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self.pending = self.sock.pending

    async def shake_hands(self, driver: BaseDriver, seconds: float) -> None:
        """The TLS handshake.  Raises OSError for clients that are not let in."""
        deadline = driver.now() + seconds
        try:
            await patiently(driver, self.sock, 0, deadline, self.sock.do_handshake)
        except (ssl.SSLError, ConnectionError) as error:
            raise explained(error) from error
        if self.tls.authz is None:
            return
        name = distinguished_name(self.sock)
        if name is None or not self.tls.authz.allows(name):
            raise PermissionError("TLS x509 authz check failed")

    def receive(self, view: memoryview) -> int:
        """As many records as have come and as there is room for.  Raises BlockingIOError."""
        done = 0
        while done < len(view):
            try:
                count = self.sock.recv_into(view[done:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if not done:
                    raise BlockingIOError from None
                break
            if not count:
                break
            done += count
        return done

    def leave(self) -> None:
        """Tell the client that nothing more comes, without waiting for its answer."""
        with suppress(OSError, ValueError):
            self.sock.unwrap()


_SHORT = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "serialNumber": "serialNumber",
    "stateOrProvinceName": "ST",
    "streetAddress": "STREET",
    "userId": "UID",
}


def distinguished_name(sock: ssl.SSLSocket) -> str | None:
    """Whom the client's certificate names, as text; None without a certificate.

    In the order of the certificate, joined by commas, with a backslash before what has a meaning
    in such a text (RFC 4514).
    """
    certificate: Any = sock.getpeercert()
    if not certificate:
        return None
    parts = []
    for relative in certificate.get("subject", ()):
        named = [f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in relative]
        parts.append("+".join(named))
    return ",".join(parts)


def _escaped(value: str) -> str:
    return "".join(f"\\{char}" if char in ',+"\\<>;' else char for char in value)
