"""Checking an image: do its metadata agree with each other?  And mending what can be mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..engine.kernel import BaseDriver
from ..errors import NotSupported
from ..findings import CheckResult
from ..graph.closing import discard_disk
from ..graph.node import Node
from ..graph.opener import close_disk
from .images import ImageSpec

UNSUPPORTED = 63
"""Exit status of a check of a format that has nothing to check."""
REPAIRS = ("leaks", "all")

OnProgress = Callable[[int, int], None]


class Checked(NamedTuple):
    """A check of the file ``name``: what is wrong with it now (``found``), and, when something was
    repaired, what the check that did so found (``repaired``)."""

    name: str
    format: str
    found: CheckResult
    repaired: CheckResult | None = None


async def check(
    driver: BaseDriver,
    spec: ImageSpec,
    on_progress: OnProgress | None = None,
    *,
    repair: str | None = None,
    on_open: Callable[[Node], None] | None = None,
) -> Checked:
    """Check an image; without ``repair`` it is not changed.

    ``repair`` is ``leaks`` (give back space that nothing refers to) or ``all``; an image that was
    repaired is checked once more.  Raises NotSupported for a format that has nothing to check, and
    for one whose check cannot repair, before anything is written.
    """
    if repair is not None:
        # An image that cannot be repaired is not even opened for writing.
        node = await spec.open(driver, backing=False, check=True)
        try:
            _repairable(node)
        finally:
            await close_disk(node)
    writable = repair is not None
    node = await spec.open(driver, backing=False, check=True, writable=writable, resize=writable)
    try:
        if on_open is not None:
            on_open(node)
        found = await _run(node, on_progress, repair)
        repaired = None
        if found.leaks_fixed or found.corruptions_fixed:
            repaired, found = found, await _run(node, on_progress, None)
        result = Checked(spec.name, node.driver_name, found, repaired)
    except BaseException:
        await discard_disk(node)
        raise
    await close_disk(node)
    return result


async def _run(node: Any, on_progress: OnProgress | None, repair: str | None) -> CheckResult:
    check = _check_of(node)
    procedure = check() if repair is None else check(repair)
    found: CheckResult = await node.run_procedure(procedure, on_progress=on_progress)
    return found


def _check_of(node: Node) -> Callable[..., Any]:
    check: Callable[..., Any] | None = getattr(getattr(node, "format", None), "check", None)
    if check is None:
        raise NotSupported("This image format does not support checks", UNSUPPORTED)
    return check


def _repairable(node: Node) -> None:
    """Raise NotSupported unless the check of the node's format can repair: takes what to mend."""
    check = _check_of(node)
    try:
        check("").close()  # a procedure that is not begun does nothing
    except TypeError:
        raise NotSupported(
            f"Repairing images (--repair) is not supported for the format '{node.driver_name}'"
        ) from None
