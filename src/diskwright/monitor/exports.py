"""Commands about exports: the NBD server and what it offers, and disks as files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from ..bitmaps import DirtyBitmap
from ..engine.kernel import Future, Task
from ..errors import DiskError, UsageError
from ..graph.backend import Backend
from ..graph.node import Node
from ..graph.perms import ALL, RESIZE, root_use
from ..records import NamedTuple
from .commands import command, event
from .daemon import Daemon
from .nbdserver import server_of
from .nodes import release
from .session import Monitor
from .types import BOOL, STR, Array, Enum, Member, Struct, Union

if TYPE_CHECKING:
    from ..export.fuse_mount import Mount

RemoveMode = Literal["safe", "hard"]
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_NAME_LIMIT = 4096


def _export_options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    from .bitmaps import BITMAP

    nbd = Struct(
        (
            Member("name", STR, True),
            Member("description", STR, True),
            Member("bitmaps", Array(BITMAP), True),
            Member("allocation-depth", BOOL, True),
        )
    )
    members = (
        Member("type", Enum("nbd", "fuse")),
        Member("id", STR),
        Member("fixed-iothread", BOOL, True),
        Member("iothread", STR, True),
        Member("node-name", STR),
        Member("writable", BOOL, True),
        Member("writethrough", BOOL, True),
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
        self.bitmaps: dict[bytes, DirtyBitmap] = {}
        """Those that clients may ask for, by their contexts."""
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


@command("nbd-server-stop")
async def nbd_server_stop(monitor: Monitor) -> None:
    """Remove all exports of the NBD server, disconnect its clients, and listen no more."""
    await stop_server(monitor.daemon)


async def stop_server(daemon: Daemon) -> None:
    """The same.  What clients have asked for is answered first."""
    server = server_of(daemon)
    served = [export for export in reversed(daemon.exports.values()) if export.mount is None]
    for export in served:
        export.shutting_down = True
    await server.shut_down()
    daemon.server = None
    if daemon.server_path:
        with suppress(FileNotFoundError):
            os.unlink(daemon.server_path)
    await _all_gone(daemon, served)


@command("block-export-add", boxed=EXPORT_OPTIONS)
async def block_export_add(monitor: Monitor, options: dict[str, Any]) -> None:
    """Offer a node to clients; unless it is ``writable`` they can only read.  With
    ``writethrough`` each write is durable when it is answered.  ``iothread`` names an object, and
    like ``fixed-iothread`` has no effect.  ``nbd``: ``name`` (default: the node's) is what they ask
    for; they may ask in which layer of the chain a range is (``allocation-depth``), and what the
    ``bitmaps`` of the node or of its chain call dirty, which cannot be changed or removed
    meanwhile.  ``fuse``: the node is the regular file
    ``mountpoint``; where it is ``growable`` it can be truncated and grows by writes behind its end;
    ``allow-other`` (default ``auto``: where the system allows it) lets other users open it, as its
    mode says."""
    await add_export(monitor.daemon, options)


async def add_export(daemon: Daemon, options: Mapping[str, Any]) -> None:
    """Offer what ``options`` describe.  Raises UsageError."""
    if options["type"] == "nbd":
        await _add_nbd(daemon, options)
        return
    from .fuse import mount_of

    id, disk, writable = _exported(daemon, options)
    node = disk.node
    mount = await mount_of(daemon, disk, options)
    export = BlockExport(id, disk, writable, mount=mount)
    daemon.use(node, export.user, root_use(writable, resize=mount.file.growable))
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


def _exported(daemon: Daemon, options: Mapping[str, Any]) -> tuple[str, Backend, bool]:
    """Id, disk, and whether it can be written to."""
    id = options["id"]
    if not _ID.fullmatch(id):
        raise UsageError("Invalid block export id")
    if id in daemon.exports:
        raise UsageError(f"Block export id '{id}' is already in use")
    node = daemon.find("", options["node-name"])
    writable = options.get("writable", False)
    if writable and node.read_only:
        raise UsageError("Cannot export read-only node as writable")
    iothread = options.get("iothread")
    if iothread is not None and daemon.objects.get(iothread) != "iothread":
        raise UsageError(f'iothread "{iothread}" not found')
    return id, Backend(node, options.get("writethrough", False)), writable


async def _add_nbd(daemon: Daemon, options: Mapping[str, Any]) -> None:
    id, disk, writable = _exported(daemon, options)
    node = disk.node
    server = server_of(daemon)
    word = options.get("name", node.name)
    name, text = word.encode(), options.get("description", "").encode()
    for what, value in (("name", name), ("description", text)):
        if len(value) > _NAME_LIMIT:
            raise UsageError(f"export {what} '{value[:32].decode(errors='replace')}...' too long")
    if name in server.exports:
        raise UsageError(f"NBD server already has export named '{word}'")
    export = BlockExport(id, disk, writable, name)
    for which in options.get("bitmaps", ()):
        await _add_bitmap(daemon, export, which)
    # Clients were told a size.
    daemon.use(node, export.user, root_use(writable, ALL - {RESIZE}))
    depth = options.get("allocation-depth", False)
    server.offer(name, disk, text, not writable, depth=depth, bitmaps=export.bitmaps)
    daemon.exports[id] = export
    for bitmap in export.bitmaps.values():
        bitmap.busy = True


async def _add_bitmap(daemon: Daemon, export: BlockExport, which: Any) -> None:
    from ..export.nbd_status import find_bitmap
    from ..ops.bitmap import engine_of

    node = export.node
    if isinstance(which, dict):
        named = daemon.graph.nodes.get(which["node"])
        if named is None:
            raise UsageError(f"Node '{which['node']}' not found")
        engine_of(named).bitmaps.get(which["name"])
        context, bitmap = await find_bitmap(named, which["name"])
    else:
        context, bitmap = await find_bitmap(node, which)
    bitmap.check()
    if bitmap.enabled and not export.writable and not node.read_only:
        raise UsageError(f"Enabled bitmap '{bitmap.name}' incompatible with readonly export")
    export.bitmaps[context] = bitmap


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
    server = server_of(daemon)
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
        for bitmap in export.bitmaps.values():
            bitmap.busy = False
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
async def nbd_server_add(
    monitor: Monitor,
    device: str,
    name: str | None = None,
    description: str = "",
    writable: bool = False,
    bitmap: str | None = None,
) -> None:
    """Offer a node over NBD under ``name`` (default: ``device``), which is the export's id as
    well, with at most one ``bitmap``.  A node that cannot be written to is offered read-only."""
    node = monitor.daemon.find(device, device)
    server_of(monitor.daemon)
    options = {
        "type": "nbd",
        "id": name or device,
        "node-name": node.name,
        "name": name or device,
        "description": description,
        "writable": writable and not node.read_only,
        "bitmaps": [] if bitmap is None else [bitmap],
    }
    await _add_nbd(monitor.daemon, options)


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
