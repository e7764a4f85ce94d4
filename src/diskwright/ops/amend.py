"""Changing an image's creation options in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..declare import Option
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..graph import registry
from ..graph.closing import discard_disk
from ..graph.node import Node
from ..graph.opener import close_disk
from ..graph.options import convert
from .images import ImageSpec


def amend_options(fmt: str) -> tuple[Option, ...]:
    """The options that images of ``fmt`` can have changed.

    Raises NotSupported for a format that has none.
    """
    try:
        found = registry.driver(fmt).amend_options
    except NotSupported:  # a format that has no driver here
        found = ()
    except DiskError:
        raise UsageError(f"Unknown file format '{fmt}'") from None
    if not found:
        raise NotSupported(f"Format driver '{fmt}' does not support option amendment")
    return found


def typed(fmt: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` in the types of the declaration.  Raises UsageError."""
    known = {option.name: option for option in amend_options(fmt)}
    created = {option.name for option in registry.driver(fmt).create_options}
    for name in given:
        if name not in known:
            only = "\nThis option is only supported for image creation"
            raise UsageError(f"Invalid parameter '{name}'{only if name in created else ''}")
    return {name: convert(known[name], value) for name, value in given.items()}


async def format_of(driver: BaseDriver, spec: ImageSpec) -> str:
    """The format of an image, which is opened for that."""
    node = await spec.open(driver, backing=False)
    try:
        return node.driver_name
    finally:
        await close_disk(node)


async def amend(
    driver: BaseDriver,
    spec: ImageSpec,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    on_open: Callable[[Node], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Change ``options`` (those of :func:`amend_options`) of an image.

    What cannot be done is refused before anything is written.  ``force`` allows what may make data
    unreadable for good, such as erasing the last key slot.  Raises UsageError, NotSupported, and
    what opening and writing raise.
    """
    node: Any = await spec.open(driver, writable=True, resize=True)
    try:
        if on_open is not None:
            on_open(node)
        given = typed(node.driver_name, options)
        procedure = node.format.amend(given, force)
        await node.run_procedure(procedure, on_progress=on_progress)
        node.changed()
    except BaseException:
        await discard_disk(node)
        raise
    await close_disk(node)
