"""A socket to an NBD server, from its address to the agreement."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from ..engine.kernel import BaseDriver, Future
from ..errors import PeerError
from ..hints import TYPE_CHECKING, Any, TypeVar
from ..records import NamedTuple
from ..wire.nbd_negotiation import Agreement, Negotiation
from .sockets import abstract_address, tcp_socket

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

CONNECT_SECONDS = 30.0
"""How long connecting and the handshake may take."""
_RETRY = 0.05  # a unix socket whose queue is full says so at once, and does not tell when it is not
_IDLE, _INTERVAL, _PROBES = 30, 10, 3
"""Seconds until a silent TCP connection is probed, between probes, and how many may be lost."""


class Address(NamedTuple):
    """Where a server listens: ``kind`` is ``unix`` (``host`` is the path), ``inet``, ``vsock``
    (``host`` is the number of the context) or ``fd`` (``host`` is what the descriptor is called;
    ``inherited`` is the connection, until it is used).

    ``family``, ``numeric`` (``host`` is no name), ``keep_alive`` (silence is probed) and ``mptcp``
    are for ``inet``.  ``tight`` for an abstract unix socket: no zeroes follow its name.
    """

    kind: str
    host: str
    port: int = 0
    family: int = 0
    numeric: bool = False
    keep_alive: bool = True
    mptcp: bool = False
    tight: bool | None = None
    inherited: list[socket.socket] | None = None

    def __str__(self) -> str:
        return self.host if self.kind in ("unix", "fd") else f"{self.host}:{self.port}"


class Security(NamedTuple):
    """TLS: with which context, and which host the certificate must name."""

    context: ssl.SSLContext
    hostname: str


class Established(NamedTuple):
    """A connection on which transmission has begun (or that has listed what there is)."""

    sock: socket.socket
    agreed: Agreement
    negotiation: Negotiation


async def establish(
    driver: BaseDriver, address: Address, negotiation: Negotiation, security: Security | None
) -> Established:
    """Connect to ``address`` and negotiate.  Raises PeerError that names the address, and OSError.

    What a cancellation or an error finds open is closed.
    """
    deadline = driver.now() + CONNECT_SECONDS
    try:
        sock = await _connect(driver, address, deadline)
        sock = await _agree(driver, sock, negotiation, security, deadline)
    except TimeoutError as error:
        raise PeerError(f"'{address}' does not answer", errno.ETIMEDOUT) from error
    except PeerError:
        raise
    except OSError as error:
        raise _ended(error, address) from error
    assert negotiation.agreed is not None
    return Established(sock, negotiation.agreed, negotiation)


def _ended(error: OSError, address: Address) -> OSError:
    """Why a connection ended in the handshake.  With TLS 1.3 servers look at a client's certificate
    when the client thinks that TLS stands already."""
    ssl: Any = sys.modules.get("ssl")
    secured = ssl is not None and isinstance(error, ssl.SSLError)
    if secured and not isinstance(error, ssl.SSLEOFError):
        from .nbd_tls import explained

        return explained(error)
    if not secured and not isinstance(error, ConnectionError):
        return error
    text = f"the NBD server at '{address}' closed the connection"
    return PeerError(text, errno.ECONNRESET if secured else error.errno or errno.ECONNRESET)


# -- connecting
async def _connect(driver: BaseDriver, address: Address, deadline: float) -> socket.socket:
    if address.kind == "fd":
        return _inherited(address)
    failed: OSError | None = None
    try:
        places = await _places(driver, address)
    except socket.gaierror as error:
        raise PeerError(
            f"address resolution failed for {address}: {error.strerror}", errno.EHOSTUNREACH
        ) from error
    for family, where in places:
        sock = tcp_socket(family, address.mptcp)
        sock.setblocking(False)
        try:
            await _connected(driver, sock, where, deadline)
            tune(sock, address.keep_alive)
            return sock
        except OSError as error:
            failed = error
            driver.forget(sock.fileno())
            sock.close()
        except BaseException:
            driver.forget(sock.fileno())
            sock.close()
            raise
    number = (failed.errno if failed is not None else None) or errno.EHOSTUNREACH
    if isinstance(failed, TimeoutError):
        number = errno.ETIMEDOUT
    raise PeerError(f"Failed to connect to '{address}': {os.strerror(number)}", number)


def _inherited(address: Address) -> socket.socket:
    """The one connection that there is."""
    if not address.inherited:
        raise PeerError(f"the descriptor {address} was used before", errno.ECONNREFUSED)
    sock = address.inherited.pop()
    sock.setblocking(False)
    return sock


async def _places(driver: BaseDriver, address: Address) -> list[tuple[int, Any]]:
    """(family, address) to try, in order."""
    if address.kind == "unix":
        if not hasattr(socket, "AF_UNIX"):
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        if address.tight is not None:
            return [(socket.AF_UNIX, abstract_address(address.host, address.tight))]
        return [(socket.AF_UNIX, address.host)]
    if address.kind == "vsock":
        family = getattr(socket, "AF_VSOCK", None)
        if family is None:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return [(family, (int(address.host), address.port))]
    named = (address.host, address.port, address.family, socket.SOCK_STREAM)
    try:  # a number needs nobody's answer, and so no thread
        found = socket.getaddrinfo(*named, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        if address.numeric:
            raise
        found = await driver.call(socket.getaddrinfo, *named)
    return [(family, where) for family, _, _, _, where in found]


async def _connected(driver: BaseDriver, sock: socket.socket, where: Any, deadline: float) -> None:
    while (number := sock.connect_ex(where)) == errno.EAGAIN and sock.family == _UNIX:
        if driver.now() >= deadline:
            raise TimeoutError
        await driver.sleep(_RETRY)
    if number in (errno.EINPROGRESS, errno.EWOULDBLOCK):
        await _until(driver, driver.writable(sock.fileno()), deadline)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


_UNIX = getattr(socket, "AF_UNIX", None)


def tune(sock: socket.socket, keep_alive: bool = True) -> None:
    """Small requests leave at once, and with ``keep_alive`` a host that is gone is noticed while
    nothing is sent (else after what the system allows).  A peer that lives may read nothing for as
    long as it likes."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not keep_alive:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)


async def _until(driver: BaseDriver, future: Future[T], deadline: float) -> T:
    """Wait for ``future``; TimeoutError after ``deadline``."""
    timer = driver.later(
        max(0.0, deadline - driver.now()), lambda: future.set(error=TimeoutError())
    )
    try:
        return await future
    finally:
        timer.cancel()


# -- the handshake
async def _agree(
    driver: BaseDriver,
    sock: socket.socket,
    negotiation: Negotiation,
    security: Security | None,
    deadline: float,
) -> socket.socket:
    """Carry the handshake out; returns the socket, which TLS may have replaced."""
    try:
        while True:
            await _send(driver, sock, memoryview(negotiation.take()), deadline)
            if negotiation.agreed is not None:
                return sock
            if negotiation.upgrade:
                assert security is not None
                sock = _wrapped(driver, sock, security)
                await _shake_hands(driver, sock, deadline)
                negotiation.secured()
            else:
                negotiation.received(await _receive(driver, sock, negotiation.wanted, deadline))
    except BaseException:
        with suppress(OSError):
            sock.send(negotiation.take())
        driver.forget(sock.fileno())
        sock.close()
        raise


async def _send(driver: BaseDriver, sock: socket.socket, data: memoryview, deadline: float) -> None:
    while data:
        data = data[await patiently(driver, sock, 1, deadline, sock.send, data) :]


async def _receive(driver: BaseDriver, sock: socket.socket, count: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = await patiently(driver, sock, 0, deadline, sock.recv, count - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        data += part
    return bytes(data)


async def patiently(
    driver: BaseDriver,
    sock: socket.socket,
    direction: int,
    deadline: float,
    call: Callable[..., T],
    *arguments: Any,
) -> T:
    """Repeat ``call`` until the socket lets it through; it waits to read (0) or write (1)."""
    while True:
        try:
            return call(*arguments)
        except (BlockingIOError, InterruptedError):
            waits = direction
        except OSError as error:
            waits = tls_wants(error)
            if waits < 0:
                raise
        fd = sock.fileno()
        await _until(driver, driver.writable(fd) if waits else driver.readable(fd), deadline)


def tls_wants(error: OSError) -> int:
    """What TLS waits for: 0 to read, 1 to write, -1: this is another error."""
    ssl = sys.modules.get("ssl")
    if ssl is None:
        return -1
    if isinstance(error, ssl.SSLWantReadError):
        return 0
    return 1 if isinstance(error, ssl.SSLWantWriteError) else -1


def _wrapped(driver: BaseDriver, sock: socket.socket, security: Security) -> socket.socket:
    driver.forget(sock.fileno())
    return security.context.wrap_socket(
        sock, do_handshake_on_connect=False, server_hostname=security.hostname or None
    )


async def _shake_hands(driver: BaseDriver, sock: Any, deadline: float) -> None:
    import ssl

    from .nbd_tls import explained

    try:
        await patiently(driver, sock, 0, deadline, sock.do_handshake)
    except (ssl.SSLError, ConnectionError) as error:
        raise explained(error) from error
