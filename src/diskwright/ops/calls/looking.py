"""What a disk is and holds: operations that change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...engine.kernel import BaseDriver
from ...errors import UsageError
from ...graph.opener import close_disk
from ..gates import Policy, Source, kept
from ..images import close_all
from ..progress import OnProgress, reporting
from .given import Keys, plain_errors, spec_of

if TYPE_CHECKING:
    from ..compare import Comparison
    from ..digest import Digests
    from ..info import NodeInfo
    from ..inspect import File, Inspection
    from ..map import Extent
    from ..measure import Measured
    from ..picture import Picture


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
    from ..info import info

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
    from ..info import info_chain

    with plain_errors():
        return await info_chain(
            driver, spec_of(source, format, policy, secrets, force_share=force_share)
        )


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
    from ..map import extents

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
    from ..picture import picture

    with plain_errors():
        node = await spec_of(source, format, policy, secrets, force_share=force_share).open(driver)
    try:
        return await picture(node, columns, offset, length)
    finally:
        await close_disk(node)


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
    from .. import measure as ops

    complete = ops.check(target_format, options or {}, kept(secrets))
    if (source is None) is (size is None):
        raise UsageError("measure takes either a disk or a size")
    if source is None:
        return ops.of_size(target_format, complete, size or 0)
    spec = spec_of(source, format, policy, secrets, force_share=force_share)
    with plain_errors():
        return await ops.measure(driver, target_format, complete, spec)


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
    from ..compare import compare

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
    from ..digest import digest

    with plain_errors(), reporting(progress) as on_progress:
        spec = spec_of(source, format, policy, secrets, force_share=force_share)
        node = await spec.open(driver)
        try:
            found = await digest(driver, node, algorithms, on_progress)
            return found._replace(filename=spec.name)
        finally:
            await close_all([node])


async def inspect(driver: BaseDriver, source: File) -> Inspection:
    """What a file (a path, or a binary file object, which may be a stream) is, by its bytes alone:
    nothing that it names is opened, no lock is taken; what is wrong with it is in the result."""
    from ..inspect import inspect

    return await inspect(driver, source)
