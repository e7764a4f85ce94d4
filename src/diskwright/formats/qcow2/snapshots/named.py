"""What L2 tables of snapshots and the disk refer to, by runs of clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ....contract import Compute, Procedure, Progress, Read
from ....errors import CorruptImage
from ....hints import TYPE_CHECKING
from ....records import NamedTuple
from ..check.scan import Loose, Piece, Run, pieces_of
from ..machine.core import OFFSET, PACKED, SLOT

if TYPE_CHECKING:
    from ..image import Image

# Bytes of L2 tables that are read at once.
_BATCH = 1 << 20

Claim = tuple[int, int, int]
"""Clusters [start, end), each named so many times."""


class Found(NamedTuple):
    """An L2 table."""

    offset: int
    raw: bytes
    pieces: list[Piece]


def tables_of(image: Image, l1: Sequence[int]) -> list[int]:
    """Where the L2 tables of these L1 entries are.  Raises CorruptImage."""
    out = [entry & OFFSET for entry in l1 if entry & OFFSET]
    for offset in out:
        if offset & image.cluster_mask:
            raise CorruptImage(f"L2 table offset {offset:#x} unaligned", field="L1 entry")
    return out


def each_batch(
    image: Image, offsets: Sequence[int], look: Callable[[list[Found]], Procedure]
) -> Procedure:
    """Run ``look`` for the tables at ``offsets``, a few at a time."""
    size = image.cluster_size
    batch = max(1, _BATCH // size)
    for start in range(0, len(offsets), batch):
        part = offsets[start : start + batch]
        raws = yield Read(SLOT, [(offset, size) for offset in part], "l2_load")
        pieces = yield Compute(pieces_of, (raws, size, image.stride == 2))
        yield from look([Found(*found) for found in zip(part, raws, pieces, strict=True)])
        yield Progress(start, len(offsets))


def claims(image: Image, found: Found) -> Iterator[list[Claim]]:
    """What a table refers to, itself included, a few thousand entries at a time: runs of clusters
    and how often each cluster of the run is named.  Raises CorruptImage for an entry that means
    nothing."""
    own = found.offset >> image.cluster_bits
    yield [(own, own + 1, 1)]
    for piece in found.pieces:
        if isinstance(piece, Run):
            first = (piece.entry & OFFSET) >> image.cluster_bits
            yield [(first, first + piece.length, 1)]
        else:
            yield _loose(image, found.offset, piece)


def _loose(image: Image, offset: int, piece: Loose) -> list[Claim]:
    bits, mask = image.cluster_bits, image.cluster_mask
    named: dict[int, int] = {}
    for index, entry in enumerate(piece.entries, piece.at):
        if entry & PACKED:
            for cluster in range(*image.hosts_of(entry)):
                named[cluster] = named.get(cluster, 0) + 1
            continue
        host = entry & OFFSET
        if not host:
            continue
        if host & mask:
            image.host_of(entry, offset, index)
        named[host >> bits] = named.get(host >> bits, 0) + 1
    out: list[Claim] = []
    for cluster in sorted(named):
        times = named[cluster]
        if out and out[-1][1] == cluster and out[-1][2] == times:
            out[-1] = (out[-1][0], cluster + 1, times)
        else:
            out.append((cluster, cluster + 1, times))
    return out
