"""What those who connect and those who listen have in common: kinds of sockets and addresses."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping

from ..errors import UsageError

MEMBERS: Mapping[str, Mapping[str, bool]] = {
    "inet": {
        "host": True, "port": True, "numeric": False, "to": False, "ipv4": False, "ipv6": False,
        "keep-alive": False, "mptcp": False,
    },
    "unix": {"path": True, "abstract": False, "tight": False},
    "vsock": {"cid": True, "port": True},
    "fd": {"str": True},
}  # fmt: skip
"""What an address has by its type, and whether it must."""

_PATH = 108
"""Bytes of a unix socket's address on Linux."""


def abstract_address(name: str, tight: bool) -> bytes:
    """The address of an abstract unix socket: ``name`` alone, or (not ``tight``) with zeroes
    behind it to the full length.  Raises UsageError."""
    found = b"\0" + os.fsencode(name)
    if len(found) > _PATH:
        raise UsageError(f"UNIX socket path '{name}' is too long")
    return found if tight else found.ljust(_PATH, b"\0")


def family_of(ipv4: bool | None, ipv6: bool | None) -> int:
    """The family of TCP addresses that is wanted; None: nothing was said.  Raises UsageError."""
    if ipv4 is False and ipv6 is False:
        raise UsageError("Cannot disable IPv4 and IPv6 at same time")
    if ipv4 is ipv6:
        return socket.AF_UNSPEC
    wants_ipv6 = ipv4 is False or (bool(ipv6) and not ipv4)
    return socket.AF_INET6 if wants_ipv6 else socket.AF_INET


def tcp_socket(family: int, mptcp: bool) -> socket.socket:
    """A TCP socket, or one of Multipath TCP.  Raises OSError."""
    protocol = 0
    if mptcp:
        protocol = getattr(socket, "IPPROTO_MPTCP", 0)
        if not protocol:
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
    return socket.socket(family, socket.SOCK_STREAM, protocol)


def check_port(port: int | str) -> None:
    """Raise ``socket.gaierror`` for a number that is too large: resolving takes its last bits."""
    if str(port).isdecimal() and int(port) > 65535:
        raise socket.gaierror(socket.EAI_SERVICE, "Servname not supported for ai_socktype")


def inherited_socket(descriptor: int, called: str = "") -> socket.socket:
    """The socket that whoever started the program left open as ``descriptor``, which is nobody
    else's from now on.  What the program opened itself is not inheritable, and not given.
    ``called`` follows its number in errors.  Raises UsageError."""
    try:
        ours = not os.get_inheritable(descriptor)
        sock = None if ours else socket.socket(fileno=descriptor)
    except (OSError, OverflowError) as error:
        raise UsageError(f"File descriptor '{descriptor}'{called} is not a socket") from error
    if sock is None:
        raise UsageError(f"File descriptor '{descriptor}'{called} was not inherited")
    sock.set_inheritable(False)
    return sock
