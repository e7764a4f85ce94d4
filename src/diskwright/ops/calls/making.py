"""New images, and what changes an image as a whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...engine.kernel import BaseDriver
from ...errors import UsageError
from ...graph.opener import close_disk, create_image
from ..gates import Path, Policy, Source, gate_of, kept
from ..progress import OnProgress, reporting
from .given import Keys, plain_errors, spec_of

if TYPE_CHECKING:
    from ..digest import Digests


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
    given = {**(options or {}), "backing_file": named(source, target), "backing_fmt": driver_name}
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


def named(base: str, path: str) -> str:
    """What the image at ``path`` calls its base."""
    whole = os.path.realpath(base)
    inside = os.path.relpath(whole, os.path.dirname(os.path.realpath(path)))
    return whole if inside.split(os.sep, 1)[0] == os.pardir else inside


async def convert(
    driver: BaseDriver,
    source: Source,
    target: Source,
    *,
    target_format: str = "raw",
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    options: Mapping[str, Any] | None = None,
    create: bool = True,
    cache: str = "writeback",
    force_share: bool = False,
    sparse: int | None = None,
    target_is_zero: bool = False,
    resume: bool | Literal["verify"] = False,
    also: Mapping[str, str] | None = None,
    digests: Sequence[str] = (),
    on_digests: Callable[[Digests], None] | None = None,
    progress: OnProgress | None = None,
) -> int:
    """Copy a disk to ``target``, which is made (or, with ``create=False``, written into).

    ``options`` are creation options; ``sparse`` is the size in bytes of the blocks in which zeroes
    are looked for (0: allocate everything).  ``resume`` goes on with a conversion that was stopped
    (``"verify"``: see docs/resume.md).  Returns the bytes of data that were copied.  File and
    directory are durable when it returns, unless ``cache`` is ``unsafe``.
    ``also`` are further targets (file name -> format) made by the same reading; ``on_digests`` is
    told the ``digests`` (see ``digest``) of what was copied.  A target that was made and is not
    complete is removed where ``resume`` cannot go on with it.
    """
    from ..convert import SPARSE, Settings, convert

    settings = Settings(
        options=options or {}, create=create, sparse=SPARSE if sparse is None else sparse,
        target_is_zero=target_is_zero, resume=bool(resume), verify=resume == "verify",
    )  # fmt: skip
    with plain_errors(), reporting(progress) as on_progress:
        return await convert(
            driver,
            [spec_of(source, format, policy, secrets, force_share=force_share)],
            spec_of(target, target_format, policy, secrets, cache=cache),
            settings,
            also=[
                spec_of(name, kind, policy, secrets, cache=cache)
                for name, kind in (also or {}).items()
            ],
            digests=digests,
            on_digests=on_digests,
            on_progress=on_progress,
        )


async def commit(
    driver: BaseDriver,
    source: Source,
    *,
    base: str | None = None,
    keep: bool = False,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    progress: OnProgress | None = None,
) -> None:
    """Write what an overlay holds into its backing file (or into ``base`` further down), and
    empty it unless ``keep`` is set or ``base`` is named.  Raises UsageError without one."""
    from ..commit import commit

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await commit(driver, spec, base=base, keep=keep, on_progress=on_progress)


async def rebase(
    driver: BaseDriver,
    source: Source,
    backing: str | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    progress: OnProgress | None = None,
) -> None:
    """Give an image another backing file (None: none) without changing what the disk reads.

    What both backing files do not have in common is copied into the image first; ``unsafe``
    changes the name alone.
    """
    from ..rebase import rebase

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await rebase(driver, spec, backing, backing_format, unsafe=unsafe, on_progress=on_progress)


async def amend(
    driver: BaseDriver,
    source: Source,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    progress: OnProgress | None = None,
) -> None:
    """Change creation options of an image in place (``{"compat": "1.1"}``).

    What cannot be done is refused before anything is written; ``force`` allows what may make data
    unreadable for good.
    """
    from ..amend import amend

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await amend(driver, spec, options, force=force, on_progress=on_progress)
