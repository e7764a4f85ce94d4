"""Opening disks: from a name or a description to a graph of nodes, and back."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.kernel import BaseDriver
from ..hints import TYPE_CHECKING, Any
from . import names
from .closing import close_disk, discard_disk, explain
from .gate import Gate
from .graph import Graph
from .names import Options, Reference
from .node import Node
from .opening import Opening
from .options import discard_mode, mode_of
from .perms import ALL, root_use

if TYPE_CHECKING:
    from .stage import Stage


async def open_disk(
    driver: BaseDriver,
    reference: Reference,
    *,
    format: str | None = None,
    writable: bool = False,
    options: Mapping[str, Any] | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    gate: Gate | None = None,
    backing: bool = True,
    check: bool = False,
    metadata_only: bool = False,
    discard: str = "unmap",
    detect_zeroes: str = "off",
    shared: frozenset[str] = ALL,
    resize: bool = False,
    graph: Graph | None = None,
    secrets: Mapping[str, bytes] | None = None,
    stage: Stage | None = None,
    within: tuple[str, ...] = (),
) -> Node:
    """Open a disk and everything below it; returns its top node.

    ``reference`` is a file name, ``proto:`` name, ``json:`` object or a dict of options (dotted or
    nested); it is the caller's own, so what it names needs no leave, while what the *images* name
    passes ``gate`` (by default one that admits nothing).  Without ``format`` (and without
    ``driver`` among the options) the image is probed; the node's ``probed`` says that this ended
    in the guess ``raw``.  ``options`` win over what the reference says.

    ``backing=False`` leaves backing files out; ``check`` also opens images that are marked corrupt
    or dirty, as they are; ``metadata_only`` opens no data file, so that nothing but what an image
    tells of itself can be asked.  ``shared`` is what others may do to the disk meanwhile
    (permissions), ``resize`` asks for the right to change its size.  ``secrets`` are what options
    such as ``key-secret`` name (id -> bytes).  With a ``stage`` nothing is written to the files
    themselves (:mod:`diskwright.filters.rehearsal`).  ``within``: folders that the disk's own files
    must be below, for a reference that something else than the caller made.
    Use :func:`close_disk` on the result.

    Raises OSError (with the file's name), DiskError and its kinds; :func:`explain` words them.
    """
    graph = graph or Graph(driver)
    if secrets is not None:
        graph.secrets = secrets
    mode = mode_of(
        cache,
        writable=writable,
        force_share=force_share,
        discard=discard_mode(discard),
        detect_zeroes=detect_zeroes,
        within=within,
    )
    opening = Opening(graph, gate or Gate(), backing, check, stage, metadata_only)
    parsed, plain = names.parse(reference)
    if options:
        parsed, plain = _override(parsed, plain, options)
    node = await opening.disk(parsed, plain, format, mode, ())
    try:
        await opening.finish()
        graph.use(node, root_use(not node.read_only, shared, resize and not node.read_only))
        graph.refresh(node)
    except BaseException:
        await discard_disk(node)
        raise
    return node


def _override(parsed: Options, plain: bool, options: Mapping[str, Any]) -> tuple[Options, bool]:
    """Explicit options over a reference; over a file name they describe the format above it."""
    if plain and not names.nest(names.flatten(options)).keys() <= parsed.keys():
        return names.merged({"file": parsed}, options), False
    return names.merged({"file": parsed} if plain else parsed, options), False


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
    """Make an image; see :func:`diskwright.graph.create.create_image` (imported when needed)."""
    from .create import create_image as make

    return await make(
        driver,
        filename,
        fmt,
        size,
        options,
        gate=gate,
        check_backing=check_backing,
        secrets=secrets,
    )


__all__ = ["close_disk", "create_image", "discard_disk", "explain", "open_disk"]
