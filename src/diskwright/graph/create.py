"""Making new images: the file first, then the format's own creation over it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

from ..contract import (
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Request,
)
from ..declare import Driver
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..extents import Extent
from ..hints import Any, ClassVar
from ..tableless import Tableless
from ..units import SECTOR, align_up
from . import registry
from .closing import close_disk, discard_disk
from .creating import Creations, create_file, remove
from .gate import Gate
from .graph import Graph, own_leaves
from .mapped import MappedNode
from .named import identity_of, sector_size_of
from .names import Options, parse, resolve
from .node import Node
from .opener import open_disk
from .options import convert

DATA_SLOT = "data-file"


class _Nothing(Tableless):
    """The format of a file in which none is yet: procedures run over it, requests do not."""

    name: ClassVar[str] = "none"
    size = 0
    unit = 1

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        raise NotSupported("the image is being created")

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta:
        raise NotSupported("the image is being created")

def create_options(driver: Driver, given: Mapping[str, Any]) -> Options:
    """``given`` converted as the creation options of ``driver`` declare them, with defaults.

    Raises UsageError for an option that it does not have.
    """
    declared = {option.name: option for option in driver.create_options}
    for name in given:
        if name not in declared:
            raise UsageError(f"Invalid parameter '{name}'")
    out = {o.name: o.default for o in driver.create_options if o.default is not None}
    out.update({name: convert(declared[name], value) for name, value in given.items()})
    return out


async def create_image(
    driver: BaseDriver,
    filename: str,
    fmt: str,
    size: int | None,
    options: Mapping[str, Any] | None = None,
    *,
    gate: Gate | None = None,
    check_backing: bool = True,
    secrets: Mapping[str, bytes] | None = None,
) -> int:
    """Make an image at ``filename``; returns its virtual size in bytes.

    ``size`` (bytes, rounded up to 512) may be None where a backing file gives it.  ``options`` are
    the format's creation options, ``backing_file`` and ``backing_fmt`` among them; a backing file
    was typed by the caller, so only what *it* names needs the gate's leave, and nothing of that is
    opened.  ``check_backing=False`` does not look at the backing file at all.  ``secrets`` are what
    options such as ``key-secret`` name (id -> bytes).

    An existing file is overwritten.  A creation that fails leaves no file where none was.  When it
    returns, file and directory are durable.
    """
    found, given, beside = await prepare(
        driver, filename, fmt, size, options, gate=gate, check_backing=check_backing
    )
    given["size"] = size = align_up(given["size"], SECTOR)
    await write_image(driver, filename, found, given, beside, secrets=secrets)
    return size


async def prepare(
    driver: BaseDriver,
    filename: str,
    fmt: str,
    size: int | None,
    options: Mapping[str, Any] | None = None,
    *,
    gate: Gate | None = None,
    check_backing: bool = True,
) -> tuple[Driver, Options, Options]:
    """All that can be said about a creation before anything is written: the format, its options
    complete (``size`` among them, as it was given), and those of the protocol.

    Of a backing file the options also tell ``backing_size`` (bytes) and, where its format has one,
    ``backing_identity`` and ``backing_sector_size``.  Option ``parent`` is another name for
    ``backing_file``, of the format itself where none is given.
    """
    found = registry.driver(fmt)
    if found.create is None or found.kind != "format":
        raise NotSupported(f"Format driver '{fmt}' does not support image creation")
    own = {option.name for option in found.create_options}
    beside: Options = {}
    where, plain = parse(filename)
    if plain:
        protocol = registry.driver(str(where["driver"]))
        asked = {k: v for k, v in (options or {}).items() if k not in own}
        if asked and all(any(o.name == k for o in protocol.create_options) for k in asked):
            declared = {option.name: option for option in protocol.create_options}
            beside = {name: convert(declared[name], value) for name, value in asked.items()}
    given = create_options(found, {k: v for k, v in (options or {}).items() if k not in beside})
    if size is None:
        size = given.get("size")
    if given.get("parent"):
        if given.get("backing_file"):
            raise UsageError("'parent' and 'backing_file' are the same: give one of them")
        given["backing_file"] = given.pop("parent")
        given.setdefault("backing_fmt", found.name)
    if given.get("backing_file"):
        size = await _look_at_backing(driver, filename, found, given, size, check_backing, gate)
    if size is None and given.get("detached-header"):
        size = 0  # the disk is another file
    if size is None:
        raise UsageError("Image creation needs a size parameter")
    given["size"] = size
    return found, given, beside


async def write_image(
    driver: BaseDriver,
    filename: str,
    found: Driver,
    options: Mapping[str, Any],
    beside: Mapping[str, Any] | None = None,
    on_new: Callable[[str], None] | None = None,
    *,
    secrets: Mapping[str, bytes] | None = None,
) -> tuple[str, ...]:
    """Make the file and run the format's creation (``options`` complete, ``size`` among them;
    ``beside`` are creation options of the protocol).

    Returns the other files that the format made beside it, as ``filename`` is given: the caller's
    own, so a gate may be told of them.  ``on_new`` is told the path of each file that was not there
    before.
    """
    assert found.create is not None
    where, plain = parse(filename)
    if not plain:
        raise UsageError("An image is created by its file name")
    # Whatever can be found wrong with the options is, before the file is touched.
    told = {"file-name": where.get("filename"), "secrets": secrets or {}}
    procedure = primed(found.create({**options, **told}))
    graph = Graph(driver)
    graph.secrets = secrets or {}
    file, made = await create_file(graph, where, beside)
    node = MappedNode(driver, found.name, _Nothing(), {"file": file}, graph.tables)
    below = options.get("backing_file")
    keep = [_path(resolve(filename, str(below)))] if below else []
    typed = [str(options["data_file"])] if options.get("data_file") else []
    creations = Creations(node, beside, fresh=False, keep=keep, typed=typed)
    node.engine.creator = creations
    try:
        graph.add(node)
        await node.run_procedure(procedure, whole_image=False)
        for leaf in own_leaves(node):
            await leaf.flush()
        node.read_only = True  # nothing is left to write back when it is closed
    except BaseException:
        node.read_only = True
        await discard_disk(node)
        creations.remove()
        if made is not None:
            remove(made)
        raise
    await close_disk(node)
    for path in (made, *creations.new.values()):
        if path is not None and on_new is not None:
            on_new(path)
    return tuple(creations.names)


async def create_over(
    file: Node,
    found: Driver,
    options: Mapping[str, Any],
    others: Mapping[str, Node] | None = None,
    *,
    secrets: Mapping[str, bytes],
    run: Callable[[MappedNode, Procedure], Awaitable[Any]] | None = None,
) -> None:
    """Make an image in ``file``, a node that stays open and loses what it holds (``options``
    complete, as for :func:`write_image`).  Whoever calls holds the permissions for that.

    ``others`` are the nodes, by slot, of files that the format makes beside its image; they lose
    what they hold as well, but for a data file.  ``run`` carries out the procedure.  When it fails,
    what has lost its content is empty.
    """
    assert found.create is not None
    graph: Graph = file.graph
    told = {"file-name": file.options.get("filename"), "secrets": secrets}
    procedure = primed(found.create({**told, **options}))
    await file.truncate(0)
    node = MappedNode(graph.driver, found.name, _Nothing(), {"file": file}, graph.tables)

    async def creator(slot: str, name: str) -> None:
        child = (others or {})[slot]
        if slot != DATA_SLOT:
            await child.truncate(0)
        node.attach(slot, child)

    node.engine.creator = creator
    try:
        graph.add(node)
        if run is None:
            await node.run_procedure(procedure, whole_image=False)
        else:
            await run(node, procedure)
        for leaf in node.children.values():
            await leaf.child.flush()
    except BaseException:
        for slot, edge in node.children.items():
            if slot != DATA_SLOT:
                with suppress(OSError, DiskError):
                    await edge.child.truncate(0)
        raise
    finally:
        node.read_only = True  # nothing is left to write back
        await node.close()
        for slot in list(node.children):
            node.detach(slot)
        graph.remove(node)


def primed(procedure: Procedure) -> Procedure:
    """``procedure``, run up to its first request; raises what it raises until there."""
    return _resumed(next(procedure), procedure)


def _resumed(request: Request, procedure: Procedure) -> Procedure:
    try:
        while True:
            try:
                answer = yield request
            except Exception as error:
                request = procedure.throw(error)
            else:
                request = procedure.send(answer)
    except StopIteration as stop:
        return stop.value


async def _look_at_backing(
    driver: BaseDriver,
    filename: str,
    found: Driver,
    given: Options,
    size: int | None,
    look: bool,
    gate: Gate | None,
) -> int | None:
    """Check the backing file that a new image is to have; returns the new image's size.

    ``given`` is told what the format records of it.  Where nobody asked to look, a backing file
    that cannot be opened is no error, but what a format must record cannot be known then.
    """
    name, fmt = str(given["backing_file"]), given.get("backing_fmt")
    if fmt is not None:
        registry.driver(str(fmt))
    elif not look:
        raise UsageError("Backing file specified without backing format")
    if not look and "identity" not in found.capabilities:
        return size
    resolved = resolve(filename, name)
    if resolved == filename or _same_file(resolved, filename):
        raise UsageError(
            "Error: Trying to create an image with the same filename as the backing file"
        )
    try:
        backing = await open_disk(
            driver, resolved, format=str(fmt) if fmt else None, backing=False, gate=gate
        )
    except (OSError, DiskError) as error:
        if not look:
            return size
        error.add_note("Could not open backing image")
        raise
    name, length = backing.driver_name, backing.size
    given["backing_size"] = length
    given["backing_identity"] = identity_of(backing)
    given["backing_sector_size"] = sector_size_of(backing)
    await close_disk(backing)
    if fmt is None:
        raise UsageError(
            f"Backing file specified without backing format\nDetected format of {name}."
        )
    return length if size is None and look else size


def _path(name: str) -> str:
    """The path in a file name."""
    return name.removeprefix("file:")


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


__all__ = [
    "create_file",
    "create_image",
    "create_over",
    "create_options",
    "prepare",
    "primed",
    "write_image",
]
