"""Whole-image operations called with plain arguments: what both Python APIs offer.

A disk is given as the graph takes it: a file name, a ``json:`` or ``proto:`` name, or a dict of
options.  ``format`` is that of the image that is named first; None: it is probed.  ``policy`` is
a word or a :class:`~diskwright.ops.gates.Policy`; ``secrets`` are what options such as
``key-secret`` name (id -> bytes or text).  ``progress`` is called with a
:class:`~diskwright.ops.progress.Progress`; the operation stops (OperationCancelled) where it
answers ``False``.  What cannot be opened raises its own error (OSError, ImageError, Refused, ...).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..engine.kernel import BaseDriver
from ..errors import UsageError
from .gates import Path, Policy, Source, gate_of, kept, name_of, reference_of
from .images import ImageSpec, OpenFailed, close_all
from .progress import OnProgress, reporting

if TYPE_CHECKING:
    from ..findings import CheckReport
    from .check import Checked
    from .compare import Comparison
    from .digest import Digests
    from .info import NodeInfo
    from .inspect import File, Inspection
    from .salvage import Salvaged
    from .undo import Undone

Keys = Mapping[str, bytes | str] | None


def spec_of(
    source: Source,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    *,
    force_share: bool = False,
    cache: str = "writeback",
) -> ImageSpec:
    """The description of a disk that the operations take."""
    reference, gate = reference_of(source), gate_of(policy)
    return ImageSpec(name_of(source), reference, format, cache, force_share, gate, kept(secrets))


@contextmanager
def plain_errors() -> Iterator[None]:
    """The own error of what could not be opened."""
    try:
        yield
    except OpenFailed as error:
        raise error.cause from None


async def info(
    driver: BaseDriver,
    source: Source,
    *,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
) -> NodeInfo:
    """What an image is: format, sizes, backing file, and what its format tells of itself.

    The backing file is named, not opened.
    """
    from .info import info

    with plain_errors():
        return await info(driver, spec_of(source, format, policy, secrets, force_share=force_share))


async def info_chain(
    driver: BaseDriver,
    source: Source,
    *,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
) -> list[NodeInfo]:
    """What ``info`` tells of an image and of everything below it, which passes the gate."""
    from .info import info_chain

    with plain_errors():
        return await info_chain(
            driver, spec_of(source, format, policy, secrets, force_share=force_share)
        )


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
    from .check import REPAIRS, check

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
    from .undoing import undo

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
    from .salvage import salvage

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
    from .convert import SPARSE, Settings, convert

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


async def compare(
    driver: BaseDriver,
    one: Source,
    other: Source,
    *,
    format: str | None = None,
    other_format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    strict: bool = False,
    progress: OnProgress | None = None,
) -> Comparison:
    """Compare what two disks read as; a shorter one counts as followed by zeroes.

    ``strict``: sizes and allocated ranges must be the same, too.
    """
    from .compare import compare

    nodes = []
    try:
        with plain_errors(), reporting(progress) as on_progress:
            for source, kind in ((one, format), (other, other_format)):
                nodes.append(await spec_of(source, kind, policy, secrets).open(driver))
            return await compare(*nodes, strict=strict, on_progress=on_progress)
    finally:
        await close_all(nodes)


async def digest(
    driver: BaseDriver,
    source: Source,
    *,
    algorithms: Sequence[str] = ("sha256",),
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    force_share: bool = False,
    progress: OnProgress | None = None,
) -> Digests:
    """Digests of a disk's content by each of ``algorithms``: ``sha256`` (that of the raw disk),
    ``sha512``, ``sha1``, ``md5``, ``blake2b``, and ``tree`` (see docs/digest.md)."""
    from .digest import digest

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets, force_share=force_share)
        node = await spec.open(driver)
        try:
            found = await digest(driver, node, algorithms, on_progress)
            return found._replace(filename=spec.name)
        finally:
            await close_all([node])


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
    from .commit import commit

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await commit(driver, spec, base=base, keep=keep, on_progress=on_progress)


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
    from .amend import amend

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await amend(driver, spec, options, force=force, on_progress=on_progress)


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
    from .rebase import rebase

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets)
        await rebase(driver, spec, backing, backing_format, unsafe=unsafe, on_progress=on_progress)


async def inspect(driver: BaseDriver, source: File) -> Inspection:
    """What a file (a path, or a binary file object, which may be a stream) is, by its bytes alone:
    nothing that it names is opened, no lock is taken; what is wrong with it is in the result."""
    from .inspect import inspect

    return await inspect(driver, source)
