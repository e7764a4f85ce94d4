"""Listening sockets: made here, or inherited from whoever started the program."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError
from ..protocols.sockets import abstract_address, check_port, inherited_socket, tcp_socket
from ..records import NamedTuple

BACKLOG = 128
_FIRST_INHERITED = 3
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


if sys.platform == "win32":

    def listen_unix(path: str) -> socket.socket:
        """Python has no unix sockets there: raises OSError (``EAFNOSUPPORT``)."""
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

else:

    def listen_unix(path: str) -> socket.socket:
        """A listening socket that appears under ``path`` only once it can be connected to.

        A socket that is there already and that nobody listens to is replaced, any other file is not
        (``EADDRINUSE``).
        """
        temporary = os.path.join(os.path.dirname(path), f".nbd{os.getpid():x}")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(temporary)
            try:
                listener.listen(BACKLOG)
                _take_name(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except BaseException:
            listener.close()
            raise
        return listener

    def _take_name(temporary: str, path: str) -> None:
        try:
            os.link(temporary, path)  # unlike a rename this cannot take a name away from anybody
        except FileExistsError:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.rename(temporary, path)
                    return
            raise
        os.unlink(temporary)


def listen_abstract(name: str, tight: bool = True) -> socket.socket:
    """A listening unix socket under a name that is no file's (Linux alone).  Raises OSError."""
    if sys.platform != "linux":
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(abstract_address(name, tight))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_tcp(
    address: str,
    port: int | str,
    most: int | None = None,
    *,
    last: int | None = None,
    family: int = 0,
    numeric: bool = False,
    mptcp: bool = False,
) -> list[socket.socket]:
    """Listening TCP sockets on every address that ``address`` (a name or a number; empty for all)
    has, of both families or of one ``family`` (on the first ``most`` of them), and one ``port`` (a
    number or a service's name; 0: any), or the first one from there to ``last`` that is free on
    all of them.  ``numeric``: nothing is a name.  Raises OSError, and UsageError for a ``last``
    below ``port``."""
    flags = socket.AI_PASSIVE
    if numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    check_port(port)
    found = socket.getaddrinfo(address or None, port, family, socket.SOCK_STREAM, flags=flags)
    places = [(family, where) for family, _, _, _, where in dict.fromkeys(found[:most])]
    first = int(places[0][1][1])
    if last is None or not first:
        return _listen_at(places, first, mptcp)
    if last < first:
        raise UsageError(f"There is no port from {first} to {last}")
    while True:
        try:
            return _listen_at(places, first, mptcp)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or first == last:
                raise
            first += 1


def _listen_at(
    places: Sequence[tuple[int, tuple[Any, ...]]], port: int, mptcp: bool
) -> list[socket.socket]:
    """Listen on all of them: at ``port``, or (0) at one that is free."""
    listeners: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, where in places:
            if listeners and not port:
                port = listeners[0].getsockname()[1]
            try:
                listener = tcp_socket(family, mptcp)
            except OSError as error:
                missing = error
                continue
            listeners.append(listener)
            try:
                _bind(listener, (where[0], port, *where[2:]))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error  # a name may have addresses of a family that is switched off
                listeners.pop().close()
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    if not listeners and missing is not None:
        raise missing
    return listeners


def _bind(listener: socket.socket, where: tuple[object, ...]) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:  # the other family has a socket of its own
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(where)
    listener.listen(BACKLOG)


def listen_vsock(cid: str, port: str) -> socket.socket:
    """A listening vsock socket of the context ``cid`` (a number; empty for any).  Raises UsageError
    and OSError."""
    limit = 1 << 32
    for what, text in (("context", cid or "0"), ("port", port)):
        if not (text.isascii() and text.isdecimal() and int(text) < limit):
            raise UsageError(f"Failed to parse vsock {what} '{text}'")
    if sys.platform != "linux":
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((int(cid) if cid else socket.VMADDR_CID_ANY, int(port)))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class Inherited(NamedTuple):
    """A listening socket that was inherited, and what its unit calls it (may be empty)."""

    listener: socket.socket
    name: str


def inherited(environment: Mapping[str, str], pid: int) -> list[Inherited]:
    """The sockets that the environment of the process ``pid`` announces (sd_listen_fds(3)): from
    descriptor 3 on, ``LISTEN_FDS`` of them, if ``LISTEN_PID`` is that process.  ``LISTEN_FDNAMES``
    are their names, joined by colons.  Raises UsageError."""
    if environment.get("LISTEN_PID") != str(pid):
        return []
    text = environment.get("LISTEN_FDS", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 4):
        raise UsageError(f"LISTEN_FDS is no number of sockets: '{text}'")
    names = environment.get("LISTEN_FDNAMES", "").split(":") + [""] * int(text)
    return [
        Inherited(listening(_FIRST_INHERITED + i, f" ({names[i]})" if names[i] else ""), names[i])
        for i in range(int(text))
    ]


def descriptor_of(text: str, environment: Mapping[str, str], pid: int) -> int:
    """The inherited descriptor that ``text`` names: its number, or what ``LISTEN_FDNAMES`` calls
    it.  Raises UsageError."""
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    if environment.get("LISTEN_PID") == str(pid):
        names = environment.get("LISTEN_FDNAMES", "").split(":")
        if text and text in names:
            return _FIRST_INHERITED + names.index(text)
    raise UsageError(f"Unable to parse FD number {text}")


def listening(descriptor: int, called: str = "") -> socket.socket:
    """The inherited stream socket ``descriptor``, listening.  ``called`` follows its number in
    errors.  Raises UsageError."""
    listener = inherited_socket(descriptor, called)
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        listener.detach()
        why = error.strerror or error
        raise UsageError(f"Failed to listen on fd socket: {why}{called}") from error
    return listener


def notify(environment: Mapping[str, str], state: str) -> None:
    """Tell who supervises this process its ``state`` (sd_notify(3): ``READY=1``, ``STOPPING=1``),
    at the address in ``NOTIFY_SOCKET``.  Without one, or if nobody is there, nothing happens."""
    address = environment.get("NOTIFY_SOCKET", "")
    if sys.platform == "win32" or address[:1] not in ("/", "@"):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(state.encode(), address)
        except OSError:
            pass  # it is told, not asked
