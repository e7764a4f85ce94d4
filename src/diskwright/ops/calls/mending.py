"""Whether an image is sound, and what is done when it is not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...engine.kernel import BaseDriver
from ...errors import UsageError
from ..gates import Path, Policy, Source
from ..images import ImageSpec
from ..progress import OnProgress, reporting
from .given import Keys, plain_errors, spec_of

if TYPE_CHECKING:
    from ...findings import CheckReport
    from ..check import Checked
    from ..salvage import Salvaged
    from ..undo import Undone


async def check(
    driver: BaseDriver,
    source: Source,
    *,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
    repair: str | None = None,
    undo_file: Path | None = None,
    progress: OnProgress | None = None,
) -> CheckReport:
    """Check an image; returns what its format found (leaks, corruptions).

    ``repair`` (``leaks`` or ``all``) mends it: what is returned is found by a second check, with
    the counts of what was repaired by the first.  ``undo_file``, which must not exist, keeps what
    ``undo`` needs to take it back; ``plan_repair`` tells what a repair would do.
    Raises NotSupported for a format that has nothing to check, or that cannot be repaired.
    """
    done = await _check(
        driver,
        spec_of(source, format, policy, secrets, force_share=force_share),
        repair,
        progress,
        False,
        None if undo_file is None else os.fsdecode(undo_file),
    )
    return done.found


async def _check(
    driver: BaseDriver,
    spec: ImageSpec,
    repair: str | None,
    progress: OnProgress | None,
    dry_run: bool,
    undo_file: str | None = None,
) -> Checked:
    from ..check import REPAIRS, check

    if repair not in (None, *REPAIRS):
        raise UsageError(f"repair is one of {', '.join(REPAIRS)}, not '{repair}'")
    with plain_errors(), reporting(progress) as on_progress:
        return await check(
            driver, spec, on_progress, repair=repair, dry_run=dry_run, undo_file=undo_file
        )


async def plan_repair(
    driver: BaseDriver,
    source: Source,
    *,
    repair: str = "all",
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    progress: OnProgress | None = None,
) -> Checked:
    """What a repair would find and write, without writing anything: ``found`` is wrong now,
    ``repaired`` what the repair would say, ``plan`` its writes, ``after`` what would be left."""
    spec = spec_of(source, format, policy, secrets)
    return await _check(driver, spec, repair, progress, True)


async def undo(
    driver: BaseDriver,
    source: Source,
    undo_file: Path,
    *,
    policy: str | Policy | None = None,
) -> Undone:
    """Take a repair back to the byte by the file that ``check(..., undo_file=...)`` wrote.

    Also one that was interrupted, and again after it was interrupted itself.  Raises ImageError,
    and nothing is written, when the image was changed in another way since.
    """
    from ..undoing import undo

    with plain_errors():
        spec = spec_of(source, None, policy)
        return await undo(driver, spec, os.fsdecode(undo_file))


async def salvage(
    driver: BaseDriver,
    source: Source,
    target: Path,
    *,
    target_format: str = "raw",
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    options: Mapping[str, Any] | None = None,
    assume: Mapping[str, Any] | None = None,
    force: bool = False,
    force_share: bool = False,
    progress: OnProgress | None = None,
) -> Salvaged:
    """Copy what can be read out of a damaged image into the new image ``target``.

    ``options`` are creation options of the target; ``assume`` are those of the source that it does
    not tell any more.  With ``force`` the target may exist.  The result's ``map`` has the parts
    that are lost or guessed, and why.  The source is never written to.
    """
    from ..salvage import salvage

    with plain_errors(), reporting(progress) as on_progress:
        return await salvage(
            driver,
            spec_of(source, format, policy, secrets, force_share=force_share),
            spec_of(target, target_format, policy, secrets),
            options,
            assume=assume,
            force=force,
            on_progress=on_progress,
        )
