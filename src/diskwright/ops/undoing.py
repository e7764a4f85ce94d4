"""``check --undo``: takes a repair back to the byte."""

from __future__ import annotations

import os

from ..engine.kernel import BaseDriver
from ..errors import DiskError, UsageError
from ..graph import names, registry
from ..graph.graph import Graph
from ..graph.names import Options
from ..graph.node import Node
from ..graph.opener import close_disk, discard_disk, open_disk
from ..graph.perms import CONSISTENT_READ
from .images import ImageSpec, OpenFailed
from .undo import Undone, bring_back, verify
from .undofile import Reader

_ALONE = frozenset({CONSISTENT_READ})


async def undo(driver: BaseDriver, spec: ImageSpec, undo_file: str) -> Undone:
    """Bring the image back to what it was before the repair that wrote ``undo_file``.

    It may be whole, half repaired or half undone; when it was changed in any other way, or the undo
    file is damaged, ImageError is raised and nothing is written.  Files of the image that lie in
    its own folder are found there; others pass the gate.
    """
    nodes: list[Node] = []
    with open(undo_file, "rb") as file:
        reader = Reader(file, undo_file)
        graph = Graph(driver)
        try:
            for where, within in _files(spec, reader, undo_file):
                nodes.append(await _open(driver, spec, where, within, graph))
            await verify(reader, nodes)
            done = await bring_back(reader, nodes)
        except BaseException:
            for node in nodes:
                await discard_disk(node)
            raise
        for node in nodes:
            await close_disk(node)
    return done._replace(filename=spec.name)


def _files(
    spec: ImageSpec, reader: Reader, undo_file: str
) -> list[tuple[Options, tuple[str, ...]]]:
    """The files of the image, each with the folders that it must be below: its own as the caller
    names it, the others by the undo file."""
    own = _own_file(spec)
    found: list[tuple[Options, tuple[str, ...]]] = [(own, ())]
    seen = {str(own.get("filename"))}
    for state in reader.files[1:]:
        path = state.name
        if not path or os.path.basename(path) != path or path in (".", ".."):
            folder = os.path.dirname(undo_file)
            path, within = spec.gate.admit(
                path, undo_file, role="file of an image", folder=folder
            )
        else:
            folder = os.path.dirname(str(own.get("filename", "")))
            path, within = os.path.join(folder, path), ()
        if path in seen:
            raise UsageError(f"'{undo_file}' names '{path}' twice")
        seen.add(path)
        found.append(({"driver": "file", "filename": path}, within))
    return found


def _own_file(spec: ImageSpec) -> Options:
    """The options of the file that an image is in, without the formats and filters over it."""
    options, _ = names.parse(spec.reference)
    while True:
        below = options.get("file", options.get("image"))
        if isinstance(below, dict):
            options = below
            continue
        if "driver" not in options and isinstance(options.get("filename"), str):
            options = {**options, **names.from_filename(options["filename"])}
            continue
        if registry.kind(str(options.get("driver", "raw"))) != "protocol":
            raise UsageError(f"'{spec.name}' does not say which file the image is in")
        return options


async def _open(
    driver: BaseDriver, spec: ImageSpec, where: Options, within: tuple[str, ...], graph: Graph
) -> Node:
    try:
        return await open_disk(
            driver,
            where,
            writable=True,
            resize=True,
            cache=spec.cache,
            shared=_ALONE,
            graph=graph,
            within=within,
        )
    except (OSError, DiskError) as error:
        raise OpenFailed(str(where.get("filename", spec.name)), error) from error
