"""Where monitors talk: sockets that are listened on, and the standard streams."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import Any, Literal

from ..engine.kernel import BaseDriver, Cancelled
from ..errors import NotSupported, UsageError
from ..export.listening import descriptor_of, listening
from ..graph.options import boolean
from ..protocols.sockets import inherited_socket
from ..records import NamedTuple
from . import keyval
from .addresses import ADDRESSES, listen
from .daemon import Daemon
from .session import Monitor

_READ = 64 << 10


class Chardev(NamedTuple):
    """One of them: a ``listener``, a ``client`` that is there already, or the standard streams;
    and the unix socket's path."""

    id: str
    listener: socket.socket | None = None
    path: str = ""
    client: socket.socket | None = None

    def close(self) -> None:
        """Listen no more."""
        for sock in (self.listener, self.client):
            if sock is not None:
                sock.close()
        if self.path:
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass


def chardev(text: str) -> Chardev:
    """The device of ``socket,id=ID,path=PATH`` (or ``host=`` and ``port=``, and what else
    :data:`_ADDRESS` has) with ``server=on``, or of ``stdio,id=ID``; it is listening.  Raises
    UsageError."""
    given = keyval.split(text, "backend")
    backend = given.pop("backend", "")
    id = given.pop("id", "")
    if not id:
        raise UsageError("chardev: no id specified")
    if backend == "stdio":
        given.pop("signal", None)
        _nothing_else(backend, given)
        return Chardev(id)
    if backend != "socket":
        raise NotSupported(f"chardev backend '{backend}' is not supported: use socket or stdio")
    named = [name for name in ("path", "fd", "host") if name in given]
    if len(named) > 1:
        raise UsageError("None or one of 'path', 'fd' or 'host' option required.")
    if "fd" in given:
        return _inherited(id, given)
    if not boolean("server", given.pop("server", "off")):
        raise NotSupported("a chardev that connects is not supported: say server=on")
    boolean("wait", given.pop("wait", "off"))  # clients are served whenever they come
    for name in ("nodelay", "delay"):
        boolean(name, given.pop(name, "off"))  # replies leave at once
    if not named:
        raise UsageError("chardev: socket: one of 'path', 'fd' or 'host' is required")
    kind = "unix" if named == ["path"] else "inet"
    if kind == "inet" and "port" not in given:
        raise UsageError("chardev: socket: no port given")
    members = {member.name: member.type for member in ADDRESSES[kind].members}
    where: dict[str, Any] = {"type": kind}
    for name in _ADDRESS:
        if name in members and name in given:
            where[name] = keyval.typed(members[name], given.pop(name), name)
    _nothing_else(backend, given)
    found = listen(where, 1)
    return Chardev(id, found.listeners[0], found.path)


_ADDRESS = ("path", "abstract", "tight", "host", "port", "to", "ipv4", "ipv6")


def _inherited(id: str, given: dict[str, str]) -> Chardev:
    """A socket that whoever started the program opened; listening or connected."""
    text = given.pop("fd")
    listens = boolean("server", given.pop("server", "off"))
    boolean("wait", given.pop("wait", "off"))
    _nothing_else("socket", given)
    descriptor = descriptor_of(text, os.environ, os.getpid())
    if listens:
        return Chardev(id, listener=listening(descriptor))
    return Chardev(id, client=inherited_socket(descriptor))


def _nothing_else(backend: str, given: Mapping[str, str]) -> None:
    for name in given:
        raise UsageError(f"Invalid parameter '{name}' of chardev backend '{backend}'")


class MonitorOptions(NamedTuple):
    """How a monitor is set up: its ``chardev``, and whether its output is indented."""

    chardev: str
    mode: Literal["control"] = "control"
    pretty: bool = False
    id: str = ""


class Socket:
    """A client on a socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    def read(self) -> bytes | None:
        try:
            return self._sock.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return None

    def write(self, data: bytes) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def fileno(self) -> int:
        return self._sock.fileno()

    output = fileno


class Standard:
    """A client on standard input and output."""

    def __init__(self) -> None:
        if sys.platform == "win32":
            raise NotSupported("a monitor on the standard streams is not supported on this system")
        self._before = [(fd, os.get_blocking(fd)) for fd in (0, 1)]
        for fd in (0, 1):
            os.set_blocking(fd, False)

    def restore(self) -> None:
        """Leave the streams as they were: others have them, too."""
        if sys.platform != "win32":
            for fd, blocking in self._before:
                os.set_blocking(fd, blocking)

    def read(self) -> bytes | None:
        try:
            return os.read(0, _READ)
        except (BlockingIOError, InterruptedError):
            return None

    def write(self, data: bytes) -> int:
        try:
            return os.write(1, data)
        except (BlockingIOError, InterruptedError):
            return 0

    def fileno(self) -> int:
        return 0

    def output(self) -> int:
        return 1


async def run(daemon: Daemon, device: Chardev, pretty: bool) -> None:
    """Serve the clients of a monitor one after the other, until this is cancelled."""
    monitor = Monitor(daemon, pretty)
    driver = daemon.driver
    try:
        if device.client is not None:
            await _client(driver, monitor, device.client)
            return
        if device.listener is None:
            await _standard(driver, monitor)
            return
        device.listener.setblocking(False)
        while True:
            sock = await _accepted(driver, device.listener)
            await _client(driver, monitor, sock)
    except Cancelled:
        pass
    finally:
        if device.listener is not None:
            driver.forget(device.listener.fileno())


async def _client(driver: BaseDriver, monitor: Monitor, sock: socket.socket) -> None:
    with sock:
        try:
            await monitor.serve(Socket(sock))
        finally:
            driver.forget(sock.fileno())


async def _standard(driver: BaseDriver, monitor: Monitor) -> None:
    stream = Standard()
    try:
        await monitor.serve(stream)
    finally:
        driver.forget(0)
        driver.forget(1)
        stream.restore()


async def _accepted(driver: BaseDriver, listener: socket.socket) -> socket.socket:
    while True:
        try:
            return listener.accept()[0]
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            await driver.readable(listener.fileno())
        except OSError:  # no descriptors left
            await driver.sleep(0.1)
