"""Making new images: the file first, then the format's own creation over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..contract import (
    Groups,
    HostRange,
    NeedMeta,
    Plan,
    Procedure,
    Range,
    Request,
    TableStore,
)
from ..declare import Driver
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..extents import Extent
from ..units import SECTOR, align_up
from . import registry
from .closing import close_disk, discard_disk
from .gate import Gate
from .graph import Graph
from .mapped import MappedNode
from .names import Options, parse, resolve
from .node import Node
from .opener import open_disk
from .options import checked, convert
from .perms import ALL, CONSISTENT_READ, RESIZE, WRITE, Use


class _Nothing:
    """The format of a file in which none is yet: procedures run over it, requests do not."""

    name: ClassVar[str] = "none"
    size = 0
    unit = 1
    cipher_unit = 1
    tables: TableStore

    def map(self, ranges: Sequence[Range]) -> tuple[list[Extent], NeedMeta | None]:
        raise NotSupported("the image is being created")

    def plan(self, ranges: Sequence[Range], kind: str) -> Plan | NeedMeta:
        raise NotSupported("the image is being created")

    def commit(self, plan: Plan) -> None: ...

    def abort(self, plan: Plan) -> None: ...

    def freeze(self) -> Groups:
        return Groups([])

    def settle(self, token: Any) -> list[HostRange]:
        return []

    def release(self, ranges: Sequence[HostRange], zeroed: bool) -> None: ...

    def load(self, slot: str, offset: int, data: bytes) -> None: ...


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
) -> int:
    """Make an image at ``filename``; returns its virtual size in bytes.

    ``size`` (bytes, rounded up to 512) may be None where a backing file gives it.  ``options`` are
    the format's creation options, ``backing_file`` and ``backing_fmt`` among them; a backing file
    was typed by the caller, so only what *it* names needs the gate's leave, and nothing of that is
    opened.  ``check_backing=False`` does not look at the backing file at all.

    An existing file is overwritten.  A creation that fails leaves no file where none was.  When it
    returns, file and directory are durable.
    """
    found, given, beside = await prepare(
        driver, filename, fmt, size, options, gate=gate, check_backing=check_backing
    )
    given["size"] = size = align_up(given["size"], SECTOR)
    await write_image(driver, filename, found, given, beside)
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
    complete (``size`` among them, as it was given), and those of the protocol."""
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
    if given.get("backing_file"):
        size = await _look_at_backing(driver, filename, given, size, check_backing, gate)
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
) -> None:
    """Make the file and run the format's creation (``options`` complete, ``size`` among them;
    ``beside`` are creation options of the protocol)."""
    assert found.create is not None
    where, plain = parse(filename)
    if not plain:
        raise UsageError("An image is created by its file name")
    # Whatever can be found wrong with the options is, before the file is touched.
    procedure = primed(found.create(dict(options)))
    graph = Graph(driver)
    file, made = await create_file(graph, where, beside)
    node: Node = file
    try:
        node = MappedNode(driver, found.name, _Nothing(), {"file": file}, graph.tables)
        node.read_only = True  # nothing is left to write back when it is closed
        graph.add(node)
        await node.run_procedure(procedure, whole_image=False)
        await file.flush()
    except BaseException:
        await discard_disk(node)
        if made is not None:
            _remove(made)
        raise
    await close_disk(node)


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


async def create_file(
    graph: Graph, where: Options, beside: Mapping[str, Any] | None = None
) -> tuple[Node, str | None]:
    """Make (or empty) what ``where`` describes and open it for writing.

    Also returns the path to remove when the creation fails later; None when it was there before.
    """
    options = dict(where)
    protocol = registry.driver(str(options["driver"]))
    if protocol.create is None:
        raise NotSupported(f"Protocol driver '{protocol.name}' does not support image creation")
    path = str(options["filename"]) if protocol.name == "file" else None
    existed = path is None or os.path.lexists(path)
    given = checked(protocol, {k: v for k, v in options.items() if k != "driver"})
    node: Node = await protocol.create(
        graph.driver, {"driver": protocol.name, **given, **(beside or {})}
    )
    node.options = {"driver": protocol.name, **given}
    graph.add(node)
    made = None if existed else path
    try:
        graph.use(node, Use(frozenset({CONSISTENT_READ, WRITE, RESIZE}), ALL))
        graph.refresh(node)
        del graph.roots[node]
        if node.size:
            await node.truncate(0)
    except BaseException:
        await discard_disk(node)
        if made is not None:
            _remove(made)
        raise
    return node, made


async def _look_at_backing(
    driver: BaseDriver,
    filename: str,
    given: Options,
    size: int | None,
    look: bool,
    gate: Gate | None,
) -> int | None:
    """Check the backing file that a new image is to have; returns the new image's size."""
    name, fmt = str(given["backing_file"]), given.get("backing_fmt")
    if fmt is not None:
        registry.driver(str(fmt))
    elif not look:
        raise UsageError("Backing file specified without backing format")
    if not look:
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
        error.add_note("Could not open backing image")
        raise
    found, length = backing.driver_name, backing.size
    await close_disk(backing)
    if fmt is None:
        raise UsageError(
            f"Backing file specified without backing format\nDetected format of {found}."
        )
    return length if size is None else size


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
