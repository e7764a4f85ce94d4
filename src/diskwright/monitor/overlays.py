"""Commands that put an image over a disk while clients use it, and one about what is below."""

from __future__ import annotations

import os
from typing import Any, Literal

from ..engine.node import Node
from ..errors import NotSupported, UsageError
from ..graph import registry
from ..graph.closing import discard_disk
from ..graph.create import prepare, write_image
from ..graph.display import display_name
from ..graph.graph import walk
from ..graph.named import identity_of, sector_size_of
from ..graph.names import resolve
from ..graph.opening import Opening
from ..graph.options import Mode
from ..graph.perms import WRITE
from ..graph.reopen import reopen
from .commands import command
from .daemon import Daemon
from .nodes import release
from .session import Monitor
from .transactions import Transaction, action

NewImageMode = Literal["existing", "absolute-paths"]


@action("blockdev-snapshot", features=("allow-write-only-overlay",))
async def blockdev_snapshot(transaction: Transaction, node: str, overlay: str) -> None:
    """Put ``overlay``, an open image without a backing file, over ``node``: whoever used ``node``
    uses the overlay from then on, without noticing, and ``node`` is only read.  No header is
    changed: the image in ``overlay`` must name its backing file itself."""
    daemon = transaction.daemon
    below = daemon.find(node, node)
    await _flush(below)
    await _put_over(transaction, below, daemon.find(overlay, overlay))


@action("blockdev-snapshot-sync")
async def blockdev_snapshot_sync(
    transaction: Transaction,
    snapshot_file: str,
    device: str = "",
    node_name: str = "",
    snapshot_node_name: str = "",
    format: str = "qcow2",
    mode: NewImageMode = "absolute-paths",
) -> None:
    """Make an image of ``format`` at ``snapshot-file`` (or with ``mode=existing`` take the one that
    is there) and put it over a disk as blockdev-snapshot does.  The new node is
    ``snapshot-node-name``; it is closed when nobody uses it."""
    daemon = transaction.daemon
    below = daemon.find(device, node_name)
    if node_name and not snapshot_node_name:
        raise UsageError("New overlay node-name missing")
    if snapshot_node_name in daemon.graph.nodes:
        raise UsageError("New overlay node-name already in use")
    await _flush(below)
    if not registry.known(format):
        raise UsageError(f"Unknown file format '{format}'")
    if "backing" not in registry.driver(format).capabilities:
        raise NotSupported(f"Backing file not supported for file format '{format}'")
    if mode != "existing":
        await _create(daemon, below, snapshot_file, format)
    options: dict[str, Any] = {
        "driver": format,
        "node-name": snapshot_node_name,
        "file": {"driver": "file", "filename": snapshot_file},
        "backing": None,
    }
    opening = Opening(daemon.graph, daemon.gate, backing=False, check=False)
    overlay = await opening.disk(options, False, None, _mode_of(below), ())
    transaction.undo(lambda: discard_disk(overlay))
    await _put_over(transaction, below, overlay)
    transaction.finish(lambda: release(daemon, overlay))


async def _flush(node: Node) -> None:
    if not node.read_only:
        await node.flush()


async def _put_over(transaction: Transaction, below: Node, overlay: Node) -> None:
    daemon = transaction.daemon
    if overlay.parents or daemon.used(overlay):
        raise UsageError("The overlay is already in use")
    if overlay.child("backing") is not None:
        raise UsageError("The overlay already has a backing image")
    if "backing" not in registry.driver(overlay.driver_name).capabilities:
        raise NotSupported("The overlay does not support backing images")
    if overlay in walk(below):
        raise UsageError(
            f"Making '{below.name}' a backing child of '{overlay.name}' would create a cycle"
        )
    if overlay.read_only and WRITE in daemon.needs(below):
        raise UsageError("Block node is read-only")
    format: Any = getattr(overlay, "format", None)
    had = getattr(format, "has_backing", False)

    def undo() -> None:
        daemon.replace(overlay, below)
        overlay.detach("backing")
        overlay.options.pop("backing", None)
        format.has_backing = had
        daemon.refresh(below)
        daemon.refresh(overlay)

    overlay.attach("backing", below)
    if not getattr(format, "backing_file", None):
        overlay.options["backing"] = "given"
    transaction.undo(undo)
    daemon.replace(below, overlay)
    for node in (overlay, below):
        daemon.refresh(node)
    transaction.finish(lambda: _only_read(daemon, below))


async def _only_read(daemon: Daemon, node: Node) -> None:
    if not node.read_only:
        await reopen(node, writable=False)
        daemon.refresh(node)


def _mode_of(node: Node) -> Mode:
    """How an image over ``node`` is opened: its caches as that one's."""
    mode = node.mode or Mode()
    return Mode(writable=True, direct=mode.direct, no_flush=mode.no_flush, exact=True)


async def _create(daemon: Daemon, below: Node, filename: str, format: str) -> None:
    options = {"backing_file": _name_in(below, filename), "backing_fmt": below.driver_name}
    found, given, beside = await prepare(
        daemon.driver, filename, format, below.size, options, check_backing=False
    )
    # What the new image records of the disk is asked of the node: other programs, and this one as
    # any other, cannot open what it holds.
    given["backing_size"] = below.size
    given["backing_identity"] = identity_of(below)
    given["backing_sector_size"] = sector_size_of(below)
    try:
        await write_image(daemon.driver, filename, found, given, beside, secrets=daemon.secrets)
    except OSError as error:
        raise UsageError(f"Could not create '{filename}': {error.strerror or error}") from error


def _name_in(below: Node, filename: str) -> str:
    """What the image at ``filename`` calls ``below``: its name as it was given, where that means
    the same from there."""
    name = display_name(below)
    if name.startswith("json:") or os.path.isabs(name) or resolve(filename, name) == name:
        return name
    return os.path.abspath(name)


@command("change-backing-file")
async def change_backing_file(
    monitor: Monitor, device: str, image_node_name: str, backing_file: str
) -> None:
    """Have the image in ``image-node-name``, which is ``device`` or in its chain, name another
    backing file.  What is open stays open; the format it records is that of the backing file that
    is."""
    daemon = monitor.daemon
    top = daemon.find(device, device)
    if top.parents:
        raise UsageError("Need a root block node")
    node: Any = daemon.find("", image_node_name)
    below = node.child("backing")
    if below is None:
        raise UsageError(
            "not allowing backing file change on an image without a backing file"
        )
    if node not in walk(top):
        raise UsageError(f"'{device}' and image file are not in the same chain")
    if "change_backing" not in registry.driver(node.driver_name).capabilities:
        raise NotSupported(f"Could not change backing file to '{backing_file}'")
    before = node.read_only
    if before:
        await reopen(node, writable=True)
    try:
        change = node.format.change_backing(backing_file, below.driver_name)
        await node.run_procedure(change)
    finally:
        if before:
            await reopen(node, writable=False)
        daemon.refresh(node)
