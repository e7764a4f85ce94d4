"""Maps and new images, called with plain arguments: what both Python APIs offer beside
:mod:`.calls`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..engine.kernel import BaseDriver
from ..errors import UsageError
from ..graph.opener import close_disk, create_image
from .calls import Keys, plain_errors, spec_of
from .gates import Path, Policy, Source, gate_of, kept

if TYPE_CHECKING:
    from .map import Extent
    from .measure import Measured
    from .picture import Picture


async def map(
    driver: BaseDriver,
    source: Source,
    *,
    offset: int = 0,
    length: int | None = None,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
) -> list[Extent]:
    """What is where in a range of a disk (None: to its end), through its whole chain."""
    from .map import extents

    with plain_errors():
        node = await spec_of(source, format, policy, secrets, force_share=force_share).open(driver)
    try:
        return await extents(node, offset, length)
    finally:
        await close_disk(node)


async def picture(
    driver: BaseDriver,
    source: Source,
    *,
    columns: int = 456,
    offset: int = 0,
    length: int | None = None,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
) -> Picture:
    """What each layer of a disk holds of a range (None: to its end), and which of them is read
    where, summed up in at most so many ``columns``; ``svg()`` draws it."""
    from .picture import picture

    with plain_errors():
        node = await spec_of(source, format, policy, secrets, force_share=force_share).open(driver)
    try:
        return await picture(node, columns, offset, length)
    finally:
        await close_disk(node)


async def create(
    driver: BaseDriver,
    path: Path,
    *,
    format: str,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
) -> int:
    """Make an image of ``size`` bytes (rounded up to 512) and return its virtual size.

    ``options`` are the format's creation options.  With ``backing_file`` and ``backing_fmt``
    among them ``size`` may be left out (``overlay`` says it shorter); what that file names in
    turn passes the gate, as when a disk is opened.  An existing file is overwritten.
    """
    name, gate = os.fsdecode(path), gate_of(policy)
    return await create_image(driver, name, format, size, options, gate=gate, secrets=kept(secrets))


async def overlay(
    driver: BaseDriver,
    base: Path,
    path: Path,
    *,
    format: str | None = None,
    target_format: str = "qcow2",
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
) -> int:
    """Make an image at ``path`` that holds nothing yet and shows what ``base`` does; returns its
    virtual size (None: that of the base).

    Both are paths from here.  The image names its base relative to its own folder where that is
    the base's or above it, so that they can be moved together, and absolutely otherwise.  It
    records the format of the base, which is probed without ``format``.
    """
    source, target = os.fsdecode(base), os.fsdecode(path)
    with plain_errors():
        node = await spec_of(source, format, policy, secrets).open(driver, backing=False)
    length, driver_name = node.size, node.driver_name
    await close_disk(node)
    if os.path.exists(target) and os.path.samefile(source, target):
        raise UsageError(f"'{target}' is the base itself")
    given = {**(options or {}), "backing_file": _named(source, target), "backing_fmt": driver_name}
    return await create_image(
        driver,
        target,
        target_format,
        length if size is None else size,
        given,
        gate=gate_of(policy),
        check_backing=False,
        secrets=kept(secrets),
    )


def _named(base: str, path: str) -> str:
    """What the image at ``path`` calls its base."""
    whole = os.path.realpath(base)
    inside = os.path.relpath(whole, os.path.dirname(os.path.realpath(path)))
    return whole if inside.split(os.sep, 1)[0] == os.pardir else inside


async def measure(
    driver: BaseDriver,
    source: Source | None = None,
    *,
    size: int | None = None,
    target_format: str = "raw",
    options: Mapping[str, Any] | None = None,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
) -> Measured:
    """How large a new image will be: one that ``source`` is converted into, or one of ``size``
    bytes with nothing in it."""
    from . import measure as ops

    complete = ops.check(target_format, options or {}, kept(secrets))
    if (source is None) is (size is None):
        raise UsageError("measure takes either a disk or a size")
    if source is None:
        return ops.of_size(target_format, complete, size or 0)
    spec = spec_of(source, format, policy, secrets, force_share=force_share)
    with plain_errors():
        return await ops.measure(driver, target_format, complete, spec)
