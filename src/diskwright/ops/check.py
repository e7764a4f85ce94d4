"""Checking an image: do its metadata agree with each other?  And mending what can be mended."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.kernel import BaseDriver
from ..errors import NotSupported, UsageError
from ..findings import CheckReport, CheckResult
from ..graph.closing import discard_disk
from ..graph.node import Node
from ..graph.opener import close_disk
from ..hints import TYPE_CHECKING, Any
from ..records import NamedTuple
from .images import ImageSpec

if TYPE_CHECKING:
    from .repairing import Plan

UNSUPPORTED = 63
"""Exit status of a check of a format that has nothing to check."""
REPAIRS = ("leaks", "all")

OnProgress = Callable[[int, int], None]
OnOpen = Callable[[Node], None] | None


class Checked(NamedTuple):
    """A check: what is wrong now (``found``, with the counts of what was repaired), and, when
    something was repaired, what the check that did so found (``repaired``).

    ``plan`` is what a repair that was only rehearsed would write; ``found`` then is what is wrong
    without it, ``repaired`` what it would find, ``after`` what would be wrong with it.
    ``undo_size``: bytes of the undo file, 0 when none was needed, None when none was asked for.
    """

    found: CheckReport
    repaired: CheckReport | None = None
    plan: Plan | None = None
    after: CheckReport | None = None
    undo_size: int | None = None

    def to_dict(self, *, stats: bool = False) -> dict[str, Any]:
        """That of ``found``, and behind it what the repair, or its plan, has to tell."""
        out = self.found.to_dict()
        if self.undo_size is not None:
            out["undo-file-size"] = self.undo_size
        if self.plan is not None:
            assert self.repaired is not None and self.after is not None
            fixed = self.repaired.corruptions_fixed, self.repaired.leaks_fixed
            out["dry-run"] = True
            out["repairable"] = dict(zip(("corruptions", "leaks"), fixed, strict=True))
            out["findings"] = list(self.repaired.findings)
            out |= self.plan.to_dict()
            after = self.after
            left = after.corruptions, after.leaks, after.check_errors
            out["after"] = dict(zip(("corruptions", "leaks", "check-errors"), left, strict=True))
        return out | self.found.to_dict(stats=stats)  # those come last


async def check(
    driver: BaseDriver,
    spec: ImageSpec,
    on_progress: OnProgress | None = None,
    *,
    repair: str | None = None,
    on_open: OnOpen = None,
    dry_run: bool = False,
    undo_file: str | None = None,
    force: bool = False,
) -> Checked:
    """Check an image; without ``repair`` it is not changed.

    ``repair`` is ``leaks`` (give back space that nothing refers to) or ``all``; an image that was
    repaired is checked once more.  ``dry_run`` tells what would be written and writes nothing.
    ``undo_file`` is the path of a new file (``force``: it may exist) that keeps the old bytes, see
    :func:`.undo.undo`.  Raises NotSupported for a format that has nothing to check, and
    for one whose check cannot repair, before anything is written.
    """
    if repair is None and (dry_run or undo_file is not None):
        raise UsageError("--dry-run and --undo-file need --repair (-r)")
    if dry_run and undo_file is not None:
        raise UsageError("--dry-run changes nothing, so there is nothing for --undo-file")
    now: CheckReport | None = None
    if repair is not None:
        if undo_file is not None:
            from .repairing import check_undo_file

            check_undo_file(undo_file, force)
        # An image that cannot be repaired is not even opened for writing; the lock is asked for by
        # who will write.
        first = spec if dry_run else spec._replace(force_share=True)
        node = await first.open(driver, backing=False, check=True)
        try:
            _repairable(node)
            if dry_run:
                now = await _run(node, spec, on_progress, None)
        finally:
            await close_disk(node)
    if dry_run or undo_file is not None:
        assert repair is not None
        return await _rehearsed(driver, spec, on_progress, repair, on_open, now, undo_file, force)
    writable = repair is not None
    node = await spec.open(driver, backing=False, check=True, writable=writable, resize=writable)
    try:
        if on_open is not None:
            on_open(node)
        result = await _checked(node, spec, on_progress, repair)
    except BaseException:
        await discard_disk(node)
        raise
    await close_disk(node)
    return result


async def _rehearsed(
    driver: BaseDriver,
    spec: ImageSpec,
    on_progress: OnProgress | None,
    repair: str,
    on_open: OnOpen,
    now: CheckReport | None,
    undo_file: str | None,
    force: bool,
) -> Checked:
    """A repair of which all is known before anything is written: only shown without
    ``undo_file``."""
    from ..filters.rehearsal import Rehearsal
    from .repairing import carry_out, plan_of, rehearse

    async def work(node: Node) -> Checked:
        if on_open is not None:
            on_open(node)
        return await _checked(node, spec, on_progress, repair)

    rehearsal = Rehearsal(writable=undo_file is not None)
    try:
        done = await rehearse(driver, spec, rehearsal, work)
        if undo_file is not None:
            size = await carry_out(rehearsal, undo_file, force)
            done = done._replace(undo_size=size)
        else:
            assert now is not None
            repaired = done.repaired or done.found
            done = done._replace(
                found=now, repaired=repaired, plan=plan_of(rehearsal), after=done.found
            )
    except BaseException:
        await rehearsal.give_up()
        raise
    await rehearsal.close()
    return done


async def _checked(
    node: Node, spec: ImageSpec, on_progress: OnProgress | None, repair: str | None
) -> Checked:
    found = await _run(node, spec, on_progress, repair)
    if not (found.leaks_fixed or found.corruptions_fixed):
        return Checked(found)
    again = await _run(node, spec, on_progress, None)
    again = again._replace(
        leaks_fixed=found.leaks_fixed, corruptions_fixed=found.corruptions_fixed
    )
    return Checked(again, found)


async def _run(
    node: Any, spec: ImageSpec, on_progress: OnProgress | None, repair: str | None
) -> CheckReport:
    check = _check_of(node)
    procedure = check() if repair is None else check(repair)
    found: CheckResult = await node.run_procedure(procedure, on_progress=on_progress)
    return found.report(spec.name, node.driver_name)


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
