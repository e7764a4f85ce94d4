"""A copy never writes into what it reads."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import ImageInUse
from ..graph.graph import chain, leaf_of
from ..graph.names import parse
from ..graph.node import Node


def refuse_itself(nodes: Sequence[Node], reference: str, name: str) -> None:
    """Raise ImageInUse when a source, or a layer below it, is the very file that ``reference``
    names; ``name`` is what messages call it."""
    where = parse(reference)[0]
    path = where.get("filename") if where.get("driver") in ("file", "host_device") else None
    if path is None:
        return
    try:
        wanted = os.stat(path)
    except OSError:
        return
    for top in nodes:
        for layer in chain(top):
            held = leaf_of(layer).options.get("filename")
            try:
                found = os.stat(held) if held else None
            except OSError:
                continue
            if found is not None and os.path.samestat(found, wanted):
                raise ImageInUse(name, "write")
