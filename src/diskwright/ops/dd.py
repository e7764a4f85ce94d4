"""Copying a part of a disk into a new image."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from ..engine.copy import CopyFailed, CopyOptions, Segment, copy
from ..engine.kernel import BaseDriver
from ..errors import DiskError
from ..graph.creating import remove
from ..graph.graph import leaf_of
from ..graph.node import Node
from ..graph.opener import close_disk, discard_disk
from ..graph.perms import CONSISTENT_READ, WRITE_UNCHANGED
from ..graph.status import block_status
from ..records import NamedTuple
from ..units import SECTOR, align_up
from .create import create
from .images import ImageSpec, close_all
from .itself import refuse_itself
from .sources import SPARSE

BLOCK = 512
"""Bytes of a block when nobody says."""
_LEAST_HOLE = 64 << 10
_UNCHANGED = frozenset({CONSISTENT_READ, WRITE_UNCHANGED})


class OutputFailed(DiskError):
    """The new image ``name`` could not be made; ``cause`` says why."""

    def __init__(self, name: str, cause: OSError | DiskError) -> None:
        self.name, self.cause = name, cause
        super().__init__(f"{name}: error while creating output image: {cause}")


class Part(NamedTuple):
    """The part of a disk to copy, in blocks of ``block`` bytes, at least 1.

    ``blocks``: how many of the disk's blocks there are to copy, counted from its beginning; None:
    all.  ``skip``: how many of those are left out at the beginning.
    """

    block: int = BLOCK
    blocks: int | None = None
    skip: int = 0

    def range(self, size: int) -> tuple[int, int, bool]:
        """First byte and end of the part in a disk of ``size`` bytes, and whether there is that
        much to be skipped (otherwise the part is empty)."""
        end = size if self.blocks is None else min(size, self.blocks * self.block)
        start = self.skip * self.block
        return min(start, end), end, start <= end


async def dd(
    driver: BaseDriver,
    source: ImageSpec,
    target: ImageSpec,
    part: Part,
    *,
    on_source: Callable[[], None] | None = None,
    on_short: Callable[[], None] | None = None,
) -> int:
    """Copy ``part`` of ``source`` into the new image ``target``; returns its size in bytes.

    ``target.format`` is the format to make.  The image's size is that of the part, rounded up to
    whole sectors, and what it has more reads as zeroes; zeroes of the source are not written.
    ``on_source`` is called when the source is open, ``on_short`` when more is to be skipped than
    there is: the image is empty then.  File and directory are durable when this returns.  Raises
    OpenFailed, OutputFailed, CopyFailed; an image that was not there before is taken back then.
    """
    assert target.format is not None and isinstance(target.reference, str)
    nodes: list[Node] = []
    new: list[str] = []
    try:
        nodes.append(await source.open(driver, shared=_UNCHANGED))
        if on_source is not None:
            on_source()
        start, end, enough = part.range(align_up(nodes[0].size, SECTOR))
        if not enough and on_short is not None:
            on_short()
        size = align_up(end - start, SECTOR)
        try:
            refuse_itself(nodes, target.reference, target.name)
            others = await create(
                driver,
                target.reference,
                target.format,
                size,
                {},
                gate=target.gate,
                on_new=new.append,
                secrets=target.secrets,
            )
        except (OSError, DiskError) as error:
            raise OutputFailed(target.name, error) from error
        target = target._replace(gate=target.gate.allowing(*others))
        out = await target.open(driver, writable=True)
        try:
            end = min(end, nodes[0].size)  # behind it the last sector reads as zeroes
            zero = leaf_of(out).driver_name in ("file", "memory")
            options = CopyOptions(sparse=SPARSE, target_zero=zero)
            await copy(driver, out, _segments(nodes[0], start, end), options)
            await out.flush()
        except BaseException:
            await discard_disk(out)
            raise
        await close_disk(out)
        return size
    except (OSError, DiskError):
        for path in new:
            remove(path)
        raise
    finally:
        await close_all(nodes)


async def _segments(node: Node, start: int, end: int) -> AsyncIterator[Segment]:
    offset = start
    while offset < end:
        for part in await block_status(node, offset, end - offset, least_hole=_LEAST_HOLE):
            yield Segment(node, part.start, part.start - start, part.length, part.zero)
            offset += part.length


__all__ = ["BLOCK", "CopyFailed", "OutputFailed", "Part", "dd"]
