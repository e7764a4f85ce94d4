"""Writing an image from its beginning to its end, through a pipe.

Everything that leads to data stands before them, so it must be known which clusters there will be
and, of compressed ones, how long they are.  A :class:`Survey` is shown the disk for that.  In the
file follow each other, without gaps: header, refcount table, refcount blocks, L1 table, L2 tables,
data in the order of the disk; only behind compressed data a cluster may have an unused rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from itertools import groupby

from ...abilities import Buffer, Codec
from ...errors import ImageError, NotSupported
from ...hints import Any
from ...ondisk import big_endian_bytes, zeros
from ...units import align_up
from .creation import Layout, new_header
from .machine.core import COPIED, PACKED, Core
from .machine.refblock import empty

_MOST = 32 << 20
"""Runs of clusters, or compressed clusters, that are kept in mind: 4 or 8 bytes each."""
_ALL_SUBCLUSTERS = (1 << 32) - 1


def survey(options: Mapping[str, Any], compress: bool) -> Survey | None:
    """What must be shown the disk for an image with these creation options; None for one with a
    backing file, encryption, a data file or preallocation.  Raises UsageError."""
    other = ("backing_file", "data_file", "encrypt", "preallocation")
    given = [options[name] for name in options if name.startswith(other)]
    if any(value not in (None, False, "off") for value in given):
        return None
    return Survey(options, compress)


class Survey:
    """Which clusters hold data; of an image with compressed ones also their lengths, and how many
    share each host cluster."""

    def __init__(self, options: Mapping[str, Any], compress: bool) -> None:
        self.image = Core({"compression-level": options.get("compression_level")})
        self.image.use_header(new_header(options))
        self.unit = self.image.unit
        self.packs = _Smaller(self.image.codec, self.unit) if compress else None
        self.codec: Codec = self.packs or _Nothing()
        self.runs = array("Q")
        """Where each run of clusters begins and ends."""
        self.tables: list[int] = []
        """The entries of the L1 table that are needed."""
        self.lengths = array("I")
        self.counts = array("I")
        self._place = Placing(self.image)

    def head(self) -> Iterator[bytes]:
        return iter(())

    def put(self, index: int, packed: bytes) -> Iterator[bytes]:
        """Cluster ``index``, ascending."""
        runs = self.runs
        if runs and runs[-1] == index:
            runs[-1] = index + 1
        else:
            runs.extend((index, index + 1))
        table = index >> self.image.l2_bits
        if not self.tables or self.tables[-1] != table:
            self.tables.append(table)
        if self.packs is not None:
            self._count(len(packed))
        if len(runs) + len(self.lengths) > _MOST:
            raise NotSupported("The disk has too many parts")
        return iter(())

    def end(self) -> Iterator[bytes]:
        return iter(())

    def writer(self) -> Ordered:
        """What writes the image."""
        return Ordered(self)

    def places(self, base: int) -> Iterator[tuple[int, int, int]]:
        """Of each cluster that holds data the index, the host offset and the length there, in
        order; the data begin at ``base``."""
        place, lengths, done = Placing(self.image), self.lengths, 0
        runs = iter(self.runs)
        for start, stop in zip(runs, runs, strict=True):
            for index in range(start, stop):
                length = lengths[done] if lengths else self.unit
                done += 1
                yield index, base + place.next(length), length

    def _count(self, length: int) -> None:
        bits, counts = self.image.cluster_bits, self.counts
        host = self._place.next(length)
        last = (host + length - 1) >> bits
        counts.extend([0] * (last + 1 - len(counts)))
        for cluster in range(host >> bits, last + 1):
            counts[cluster] += 1
        self.lengths.append(length)

    @property
    def clusters(self) -> int:
        """Host clusters of data."""
        if self.packs is not None:
            return len(self.counts)
        return sum(self.runs[1::2]) - sum(self.runs[::2])


class Placing:
    """Where data of given lengths go, counted in bytes from the first: compressed ones where the
    last ones end, as long as the count of that cluster has room, others at the beginning of one."""

    def __init__(self, image: Core) -> None:
        self.unit, self.most = image.unit, (1 << image.refcount_bits) - 1
        self.end = 0
        self._shared = 0
        """How many the cluster holds that is not full."""

    def next(self, length: int) -> int:
        """The place of the next ``length`` bytes, at most a cluster."""
        unit, at = self.unit, self.end
        if at % unit and (length == unit or self._shared == self.most):
            at = align_up(at, unit)
        self.end = at + length
        goes_on = at % unit and (self.end - 1) // unit == at // unit
        self._shared = self._shared + 1 if goes_on else 1
        return at


class Ordered:
    """The StreamWriter of a disk that was looked at."""

    def __init__(self, seen: Survey) -> None:
        self.seen, self.image = seen, seen.image
        self.unit = seen.unit
        self.codec: Codec = seen.packs or _Copy()
        h = self.image.header
        self.layout = layout = Layout(h, len(seen.tables), seen.clusters)
        h.reftable_offset = layout.reftable * self.unit
        h.reftable_clusters = layout.reftable_clusters
        h.l1_offset = layout.l1 * self.unit if h.l1_size else 0
        self._places = seen.places(layout.data * self.unit)
        self._end = layout.data * self.unit

    def head(self) -> Iterator[bytes]:
        """Everything before the data."""
        unit, layout = self.unit, self.layout
        yield self.image.header.encode().ljust(unit, b"\0")
        reftable = array("Q", range(layout.first_block * unit, layout.l1 * unit, unit))
        yield big_endian_bytes(reftable).ljust(layout.reftable_clusters * unit, b"\0")
        for number in range(layout.blocks):
            yield self._block(number * layout.per_block)
        l1 = zeros(64, layout.l1_clusters * unit // 8)
        for place, index in enumerate(self.seen.tables, layout.l2):
            l1[index] = place * unit | COPIED
        yield big_endian_bytes(l1)
        yield from self._l2_tables()

    def put(self, index: int, packed: bytes) -> Iterator[bytes]:
        """Cluster ``index``, where it was said to be."""
        known, host, length = next(self._places, (-1, 0, 0))
        if (known, length) != (index, len(packed)):
            raise _changed()
        yield bytes(host - self._end)
        yield packed
        self._end = host + length

    def end(self) -> Iterator[bytes]:
        """The rest of the last cluster."""
        if next(self._places, None) is not None:
            raise _changed()
        yield bytes(-self._end % self.unit)

    def _block(self, first: int) -> bytes:
        """The refcount block of the clusters from ``first`` on."""
        layout, counts = self.layout, self.seen.counts
        block = empty(layout.refcount_bits, self.unit)
        plain = layout.data if counts else layout.total
        block.fill(0, max(0, min(layout.per_block, plain - first)), 1)
        for cluster in range(max(first, plain), min(first + layout.per_block, layout.total)):
            block.set(cluster - first, counts[cluster - layout.data])
        return block.encode(0, self.unit)

    def _l2_tables(self) -> Iterator[bytes]:
        image, unit = self.image, self.unit
        shift, stride = image.packed_bits, image.stride
        places = self.seen.places(self.layout.data * unit)
        for _, entries in groupby(places, lambda place: place[0] >> image.l2_bits):
            table = zeros(64, unit // 8)
            for index, host, length in entries:
                at = (index & image.l2_mask) * stride
                if length < unit:
                    sectors = (host + length - 1 >> 9) - (host >> 9)
                    table[at] = PACKED | sectors << shift | host
                    continue
                table[at] = host | COPIED
                if stride > 1:
                    table[at + 1] = _ALL_SUBCLUSTERS
            yield big_endian_bytes(table)


class _Smaller:
    """Compresses what becomes smaller by it, and leaves the rest as it is."""

    def __init__(self, codec: Codec, unit: int) -> None:
        self._codec, self._unit = codec, unit

    def pack(self, data: Buffer) -> bytes:
        packed = self._codec.pack(data)
        return packed if len(packed) < self._unit else bytes(data)

    def unpack(self, data: Buffer, unit: int) -> bytes:
        return bytes(data) if len(data) == unit else self._codec.unpack(data, unit)


class _Copy:
    """Stores data as they are."""

    def pack(self, data: Buffer) -> bytes:
        return bytes(data)

    def unpack(self, data: Buffer, unit: int) -> bytes:
        return bytes(data[:unit])


class _Nothing(_Copy):
    """For who only wants to know where data are."""

    def pack(self, data: Buffer) -> bytes:
        return b""


def _changed() -> ImageError:
    return ImageError("The source was changed while it was read")
