"""Huge qcow2 images whose metadata are all there, made by their bytes: the file is sparse but for
its tables."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

COPIED = 1 << 63
KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


class Layout:
    """Where everything of such an image is.

    Every guest cluster has a host cluster, in the order of the disk, behind all tables.
    ``snapshots`` share all of it with the disk.  Offsets are bytes, counts clusters.
    """

    def __init__(
        self,
        size: int,
        *,
        cluster_bits: int = 16,
        refcount_bits: int = 16,
        snapshots: int = 0,
    ) -> None:
        self.size, self.bits, self.refcount_bits = size, cluster_bits, refcount_bits
        self.snapshots = snapshots
        self.cluster = 1 << cluster_bits
        self.data = -(-size // self.cluster)
        self.per_table = self.cluster // 8
        self.tables = -(-self.data // self.per_table)
        self.per_block = self.cluster * 8 // refcount_bits
        self.l1_clusters = -(-8 * self.tables // self.cluster)
        fixed = 1 + (1 + snapshots) * self.l1_clusters + bool(snapshots)
        blocks = reftable = 1
        while True:
            total = fixed + reftable + blocks + self.tables + self.data
            need = -(-total // self.per_block)
            room = -(-8 * need // self.cluster)
            if (need, room) == (blocks, reftable):
                break
            blocks, reftable = need, room
        self.blocks, self.reftable_clusters, self.total = blocks, reftable, total
        self.l1_at = 1 << cluster_bits
        self.snapshot_l1s = [
            self.l1_at + (i + 1) * self.l1_clusters * self.cluster for i in range(snapshots)
        ]
        end = self.l1_at + (1 + snapshots) * self.l1_clusters * self.cluster
        self.snapshots_at = end if snapshots else 0
        self.reftable_at = end + bool(snapshots) * self.cluster
        self.blocks_at = self.reftable_at + reftable * self.cluster
        self.tables_at = self.blocks_at + blocks * self.cluster
        self.data_at = self.tables_at + self.tables * self.cluster
        self.length = total * self.cluster

    # -- bytes
    def header(self) -> bytes:
        """The header of version 3."""
        order = self.refcount_bits.bit_length() - 1
        return struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            b"QFI\xfb", 3, 0, 0, self.bits, self.size, 0, self.tables, self.l1_at,
            self.reftable_at, self.reftable_clusters, self.snapshots, self.snapshots_at,
            0, 0, 0, order, 104,
        )  # fmt: skip

    def l1(self, flag: int) -> bytes:
        """An L1 table."""
        return self._ramp(self.tables_at | flag, self.tables)

    def snapshot_table(self) -> bytes:
        """The table of snapshots named 1, 2, ..."""
        out = b""
        for number, place in enumerate(self.snapshot_l1s, 1):
            name = str(number).encode()
            out += struct.pack(
                ">QIHHIIQII", place, self.tables, len(name), len(name), 0, 0, 0, 0, 24
            )
            out += struct.pack(">QQQ", 0, self.size, 0) + name * 2
            out = out.ljust(-(-len(out) // 8) * 8, b"\0")
        return out

    def table(self, number: int) -> bytes:
        """An L2 table."""
        first = number * self.per_table
        count = min(self.per_table, self.data - first)
        flag = 0 if self.snapshots else COPIED
        return self._ramp(self.data_at + first * self.cluster | flag, count)

    def block(self, number: int) -> bytes:
        """A refcount block."""
        first = number * self.per_block
        edges = (0, self.tables_at >> self.bits, self.total, 1 << 62)
        out: list[int] = []
        bits, last = self.refcount_bits, first + self.per_block
        raw = b""
        for start, end, count in zip(edges, edges[1:], (1, 1 + self.snapshots, 0), strict=False):
            length = min(end, last) - max(start, first)
            if length <= 0:
                continue
            if bits >= 8 and not out:
                raw += count.to_bytes(bits >> 3, "big") * length
            else:
                out += [count] * length
        if bits >= 8:
            return raw
        per_byte = 8 // bits
        return bytes(
            sum(out[i + j] << j * bits for j in range(per_byte))
            for i in range(0, len(out), per_byte)
        )

    def _ramp(self, first: int, count: int) -> bytes:
        ones = int.from_bytes(b"\0\0\0\0\0\0\0\1" * count, "big")
        ramp = _RAMPS.get((count, self.bits))
        if ramp is None:
            raw = b"".join([(i << self.bits).to_bytes(8, "big") for i in range(count)])
            ramp = _RAMPS[count, self.bits] = int.from_bytes(raw, "big")
        return (first * ones + ramp).to_bytes(8 * count, "big")

    def parts(self) -> Iterator[tuple[int, bytes]]:
        """All bytes that are not zero."""
        yield 0, self.header()
        yield self.l1_at, self.l1(0 if self.snapshots else COPIED)
        for place in self.snapshot_l1s:
            yield place, self.l1(0)
        if self.snapshots:
            yield self.snapshots_at, self.snapshot_table()
        yield self.reftable_at, self._ramp(self.blocks_at, self.blocks)
        plain: tuple[int, bytes] | None = None
        for number in range(self.blocks):
            first = number * self.per_block
            inside = first >= self.tables_at >> self.bits and first + self.per_block <= self.total
            if not inside or plain is None:
                raw = self.block(number)
                plain = (number, raw) if inside else plain
            else:
                raw = plain[1]
            yield self.blocks_at + number * self.cluster, raw
        for number in range(self.tables):
            yield self.tables_at + number * self.cluster, self.table(number)


_RAMPS: dict[tuple[int, int], int] = {}


def make(path: Path, layout: Layout) -> Path:
    """Write the image; only its tables take space."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(fd, layout.length)
        for offset, data in layout.parts():
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)
    return path
