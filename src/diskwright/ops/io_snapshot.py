"""A temporary overlay for the io language: what is written to it ends with the session."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..engine.kernel import BaseDriver
from ..graph import names
from ..graph.closing import close_disk
from ..graph.gate import Gate
from ..graph.node import Node
from ..graph.opener import create_image, open_disk

if TYPE_CHECKING:
    from .io_disk import Opened


async def open_snapshot(
    driver: BaseDriver, opened: Opened, gate: Gate, secrets: Mapping[str, bytes] | None = None
) -> Node:
    """Open the disk for reading under a new qcow2 overlay in a file that has no name any more."""
    base, plain = names.parse(opened.reference)
    described: dict[str, Any] = {"file": base} if plain else dict(base)
    if opened.format is not None:
        described["driver"] = opened.format
    described = names.merged(described, opened.options)
    below = await open_disk(
        driver,
        described,
        force_share=opened.force_share,
        gate=gate,
        cache="writeback",
        secrets=secrets,
    )
    size = below.size
    await close_disk(below)
    handle, path = tempfile.mkstemp(prefix="diskwright-", suffix=".qcow2")
    os.close(handle)
    try:
        await create_image(driver, path, "qcow2", size)
        return await open_disk(
            driver,
            {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": path, "locking": "off"},
                "backing": described,
            },
            writable=True,
            cache="unsafe",
            gate=gate,
            discard=opened.discard,
            secrets=secrets,
        )
    finally:
        os.unlink(path)
