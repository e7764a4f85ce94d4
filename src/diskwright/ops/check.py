"""Checking an image: do its metadata agree with each other?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine.kernel import BaseDriver
from ..errors import NotSupported
from ..graph.opener import close_disk
from .images import ImageSpec

UNSUPPORTED = 63
"""Exit status of a check of a format that has nothing to check."""


async def check(
    driver: BaseDriver,
    spec: ImageSpec,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str, Any]:
    """Check an image without changing it.

    Returns the file's name, the format, and what the format found (for qcow2 its CheckResult).
    Raises NotSupported for a format that has nothing to check.
    """
    node = await spec.open(driver, backing=False, check=True)
    try:
        procedure = getattr(getattr(node, "format", None), "check", None)
        if procedure is None:
            raise NotSupported("This image format does not support checks", UNSUPPORTED)
        found = await node.run_procedure(  # type: ignore[attr-defined]
            procedure(), on_progress=on_progress
        )
        return spec.name, node.driver_name, found
    finally:
        await close_disk(node)
