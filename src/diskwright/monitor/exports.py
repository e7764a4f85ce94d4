"""Commands about exports: the NBD server and what it offers, and disks as files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..engine.kernel import Future, Task
from ..errors import DiskError, UsageError
from ..export.listening import listen_tcp, listen_unix, listen_vsock, listening
from ..export.nbd_server import Server
from ..graph.backend import Backend
from ..graph.node import Node
from ..graph.perms import ALL, RESIZE, root_use
from ..records import NamedTuple
from .commands import command, event
from .daemon import Daemon
from .nodes import release
from .session import Monitor
from .types import BOOL, INT, STR, Enum, Member, Struct, Union

if TYPE_CHECKING:
    from ..export.fuse_mount import Mount

RemoveMode = Literal["safe", "hard"]
DEFAULT_CONNECTIONS = 100
_HANDSHAKE_SECONDS = 10
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NAME_LIMIT = 4096


_UNIX = Struct((Member("path", STR),))
_INET = Struct((Member("host", STR), Member("port", STR)))
_VSOCK = Struct((Member("cid", STR), Member("port", STR)))
_FD = Struct((Member("str", STR),))
_ADDRESSES = {"inet": _INET, "unix": _UNIX, "vsock": _VSOCK, "fd": _FD}


def _legacy() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    variants = {name: Struct((Member("data", each),)) for name, each in _ADDRESSES.items()}
    return "type", (Member("type", Enum(*variants)),), variants


SocketAddressLegacy = Annotated[dict[str, Any], Union(_legacy)]


def _export_options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    nbd = Struct((Member("name", STR, True), Member("description", STR, True)))
    members = (
        Member("type", Enum("nbd", "fuse")),
        Member("id", STR),
        Member("node-name", STR),
        Member("writable", BOOL, True),
    )
    fuse = Struct(
        (
            Member("mountpoint", STR),
            Member("growable", BOOL, True),
            Member("allow-other", Enum("off", "on", "auto"), True),
        )
    )
    return "type", members, {"nbd": nbd, "fuse": fuse}


EXPORT_OPTIONS = Union(_export_options)


class BlockExportInfo(NamedTuple):
    """An export; ``shutting_down``: it is being removed."""

    id: str
    type: Literal["nbd", "fuse"]
    node_name: str
    shutting_down: bool


class Deleted(NamedTuple):
    """Which export it was."""

    id: str


event("BLOCK_EXPORT_DELETED", Deleted, "An export is gone, and its id may be used again.")


class BlockExport:
    """One export of a daemon: of its NBD server under ``name``, or a ``mount``."""

    def __init__(
        self, id: str, disk: Backend, writable: bool, name: bytes = b"", mount: Mount | None = None
    ) -> None:
        self.id, self.name, self.disk = id, name, disk
        self.writable, self.mount = writable, mount
        self.shutting_down = False
        self.removal: Task[None] | None = None

    @property
    def node(self) -> Node:
        """What it shows."""
        return self.disk.node

    @property
    def user(self) -> str:
        """What :meth:`.Daemon.use` knows it by."""
        return f"export {self.id}"


@command("nbd-server-start")
def nbd_server_start(
    monitor: Monitor,
    addr: SocketAddressLegacy,
    handshake_max_seconds: int = _HANDSHAKE_SECONDS,
    max_connections: int = DEFAULT_CONNECTIONS,
) -> None:
    """Listen for NBD clients.  ``handshake-max-seconds`` (default 10) is the time for a client's
    handshake, ``max-connections`` (default 100) how many clients there may be; 0: no limit."""
    where = {"type": addr["type"], **addr["data"]}
    start_server(monitor.daemon, where, handshake_max_seconds, max_connections)


def _address() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    return "type", (Member("type", Enum(*_ADDRESSES)),), _ADDRESSES


SERVER_OPTIONS = Struct(
    (
        Member("addr", Union(_address)),
        Member("handshake-max-seconds", INT, True),
        Member("max-connections", INT, True),
    )
)


def start_with(daemon: Daemon, options: Mapping[str, Any]) -> None:
    """Listen as the command line says, where the address has no ``data``.  Raises UsageError."""
    start_server(
        daemon,
        options["addr"],
        options.get("handshake-max-seconds", _HANDSHAKE_SECONDS),
        options.get("max-connections", DEFAULT_CONNECTIONS),
    )


def start_server(
    daemon: Daemon,
    where: Mapping[str, Any],
    handshake_seconds: int = _HANDSHAKE_SECONDS,
    connections: int = DEFAULT_CONNECTIONS,
) -> None:
    """Listen on ``where`` (``type``, and ``path``, ``host`` and ``port``, ``cid`` and ``port``, or
    ``str``, the number of an inherited descriptor).  Raises UsageError."""
    if daemon.server is not None:
        raise UsageError("NBD server already running")
    if handshake_seconds < 0 or connections < 0:
        raise UsageError("The limits of the NBD server cannot be negative")
    try:
        if where["type"] == "unix":
            place = where["path"]
            listeners = [listen_unix(place)]
        elif where["type"] == "vsock":
            place = f"vsock:{where['cid']}:{where['port']}"
            listeners = [listen_vsock(where["cid"], where["port"])]
        elif where["type"] == "fd":
            place = f"fd:{where['str']}"
            if not where["str"].isdecimal():
                raise UsageError(f"Unable to parse FD number {where['str']}")
            listeners = [listening(int(where["str"]))]
        else:
            place = f"{where['host']}:{where['port']}"
            listeners = listen_tcp(where["host"], where["port"])
    except OSError as error:
        raise UsageError(f"Failed to bind socket to {place}: {error.strerror or error}") from error
    daemon.server = Server(
        daemon.driver, clients=connections, handshake_seconds=handshake_seconds or 1e9
    )
    daemon.server_path = where.get("path")
    daemon.server.start(*listeners)


@command("nbd-server-stop")
async def nbd_server_stop(monitor: Monitor) -> None:
    """Remove all exports of the NBD server, disconnect its clients, and listen no more."""
    await stop_server(monitor.daemon)


async def stop_server(daemon: Daemon) -> None:
    """The same.  What clients have asked for is answered first."""
    server = _server(daemon)
    served = [export for export in daemon.exports.values() if export.mount is None]
    for export in served:
        export.shutting_down = True
    await server.shut_down()
    daemon.server = None
    if daemon.server_path is not None:
        with suppress(FileNotFoundError):
            os.unlink(daemon.server_path)
    await _all_gone(daemon, served)


def _server(daemon: Daemon) -> Server:
    if daemon.server is None:
        raise UsageError("NBD server not running")
    return daemon.server


@command("block-export-add", boxed=EXPORT_OPTIONS)
async def block_export_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Offer a node to clients; unless it is ``writable`` they can only read.  ``nbd``: ``name``
    (default: the node's) is what they ask for.  ``fuse``: the node is the regular file
    ``mountpoint``; where it is ``growable`` it can be truncated and grows by writes behind its end;
    ``allow-other`` (default ``auto``: where the system allows it) lets other users open it, as its
    mode says."""
    await add_export(monitor.daemon, options)


async def add_export(daemon: Daemon, options: Mapping[str, Any]) -> None:
    """Offer what ``options`` describe.  Raises UsageError."""
    if options["type"] == "nbd":
        _add_nbd(daemon, options)
        return
    from .fuse import mount_of

    id, node, writable = _exported(daemon, options)
    disk = Backend(node)
    mount = await mount_of(daemon, disk, options)
    export = BlockExport(id, disk, writable, mount=mount)
    # The kernel knows a size.
    daemon.use(node, export.user, root_use(writable, ALL - {RESIZE}, mount.file.growable))
    try:
        await mount.start()
    except BaseException:
        daemon.use(node, export.user, None)
        raise
    daemon.exports[id] = export
    if mount.ended.done:
        _unmounted(daemon, export)
    mount.ended.callbacks.append(lambda _: _unmounted(daemon, export))


def _unmounted(daemon: Daemon, export: BlockExport) -> None:
    """It was unmounted, by whomever: so it is removed."""
    if not export.shutting_down:
        export.shutting_down = True
        export.removal = daemon.driver.spawn(_remove(daemon, export, []), name="export-del")


def _exported(daemon: Daemon, options: Mapping[str, Any]) -> tuple[str, Node, bool]:
    """Id, node, and whether it can be written to."""
    id = options["id"]
    if not _ID.fullmatch(id):
        raise UsageError("Invalid block export id")
    if id in daemon.exports:
        raise UsageError(f"Block export id '{id}' is already in use")
    node = daemon.find("", options["node-name"])
    writable = options.get("writable", False)
    if writable and node.read_only:
        raise UsageError("Cannot export read-only node as writable")
    return id, node, writable


def _add_nbd(daemon: Daemon, options: Mapping[str, Any]) -> None:
    id, node, writable = _exported(daemon, options)
    server = _server(daemon)
    word = options.get("name", node.name)
    name, text = word.encode(), options.get("description", "").encode()
    for what, value in (("name", name), ("description", text)):
        if len(value) > _NAME_LIMIT:
            raise UsageError(f"export {what} '{value[:32].decode(errors='replace')}...' too long")
    if name in server.exports:
        raise UsageError(f"NBD server already has export named '{word}'")
    export = BlockExport(id, Backend(node), writable, name)
    # Clients were told a size.
    daemon.use(node, export.user, root_use(writable, ALL - {RESIZE}))
    server.offer(name, export.disk, text, not writable)
    daemon.exports[id] = export


@command("block-export-del")
async def block_export_del(monitor: Monitor, id: str, mode: RemoveMode = "safe") -> None:
    """Remove an export: ``safe`` only where no client is connected to it, ``hard`` disconnects
    them.  BLOCK_EXPORT_DELETED tells when it is gone."""
    daemon = monitor.daemon
    export = daemon.exports.get(id)
    if export is None:
        raise UsageError(f"Export '{id}' is not found")
    if export.shutting_down:
        raise UsageError(f"Export '{id}' is already shutting down")
    if export.mount is not None:
        export.shutting_down = True
        await _gone(daemon, export)
        return
    server = _server(daemon)
    clients = server.users(export.name)
    if clients and mode == "safe":
        raise UsageError(f"export '{id}' still in use")
    export.shutting_down = True
    server.withdraw(export.name)
    if not clients:
        await _gone(daemon, export)
        return
    for client in clients:
        client.stop("the export was removed")
    ended = [client.ended for client in clients]
    export.removal = daemon.driver.spawn(_remove(daemon, export, ended), name="export-del")


async def _remove(daemon: Daemon, export: BlockExport, ended: list[Future[None]]) -> None:
    for client in ended:
        if not client.done:
            await client
    async with daemon.alone():
        if export.id in daemon.exports:
            await _gone(daemon, export)


async def _gone(daemon: Daemon, export: BlockExport) -> None:
    """Nobody uses it any more."""
    try:
        if export.mount is not None:
            await export.mount.stop()
        elif export.writable:
            await export.node.flush()
    finally:
        del daemon.exports[export.id]
        daemon.retire(export.disk)
        daemon.use(export.node, export.user, None)
        await release(daemon, export.node)
        daemon.emit("BLOCK_EXPORT_DELETED", Deleted(export.id))


async def _all_gone(daemon: Daemon, exports: list[BlockExport]) -> None:
    first: BaseException | None = None
    for export in exports:
        export.shutting_down = True
        try:
            await _gone(daemon, export)
        except (OSError, DiskError) as error:
            first = first or error
    if first is not None:
        raise first


@command("query-block-exports")
def query_block_exports(monitor: Monitor) -> list[BlockExportInfo]:
    """List the exports."""
    return [
        BlockExportInfo(one.id, "fuse" if one.mount else "nbd", one.node.name, one.shutting_down)
        for one in reversed(monitor.daemon.exports.values())
    ]


@command("nbd-server-add", features=("deprecated",))
def nbd_server_add(
    monitor: Monitor,
    device: str,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
) -> None:
    """Offer a node over NBD under ``name`` (default: ``device``), which is the export's id as
    well.  A node that cannot be written to is offered read-only."""
    node = monitor.daemon.find(device, device)
    _server(monitor.daemon)
    options = {
        "type": "nbd",
        "id": name or device,
        "node-name": node.name,
        "name": name or device,
        "description": description,
        "writable": writable and not node.read_only,
    }
    _add_nbd(monitor.daemon, options)


@command("nbd-server-remove", features=("deprecated",))
async def nbd_server_remove(monitor: Monitor, name: str, mode: RemoveMode = "safe") -> None:
    """Remove an export by its id; see block-export-del."""
    await block_export_del(monitor, name, mode)


async def close_all(daemon: Daemon) -> None:
    """Remove all exports and stop the server."""
    try:
        await _all_gone(daemon, [one for one in daemon.exports.values() if one.mount is not None])
    finally:
        if daemon.server is not None:
            await stop_server(daemon)
