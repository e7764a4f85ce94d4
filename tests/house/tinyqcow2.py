"""A small qcow2 image written from the specification, byte by byte, without the product.

It holds one of everything that the specification lets a header point at.
"""

from __future__ import annotations

import struct
import zlib

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1


class Tiny:
    """``cluster_bits`` and ``version`` as in the header; ``packed`` adds a compressed cluster,
    ``snapshot`` an internal snapshot, ``backing`` a backing file name."""

    def __init__(
        self,
        cluster_bits: int = 12,
        version: int = 3,
        *,
        packed: bool = False,
        snapshot: bool = False,
        backing: bytes = b"",
        incompatible: int = 0,
    ) -> None:
        self.cluster = cluster = 1 << cluster_bits
        self.version = version
        entries = cluster // 8
        self.guest_clusters = min(entries, 64)
        # header | refcount table | refcount block | L1 | L2 | data ...
        reftable, refblock, l1, l2, data = (cluster * n for n in range(1, 6))
        used = 5
        l2_entries = [0] * entries

        def place(content: bytes) -> int:
            nonlocal used
            self.clusters.append(content.ljust(cluster, b"\0"))
            used += 1
            return (used - 1) * cluster

        self.clusters: list[bytes] = []
        self.model = bytearray(self.guest_clusters * cluster)
        for index in (0, 1, 5, self.guest_clusters - 1):
            content = bytes([index + 1]) * cluster
            l2_entries[index] = COPIED | place(content)
            self.model[index * cluster : (index + 1) * cluster] = content
        if version > 2:
            l2_entries[2] = ZERO
            l2_entries[3] = COPIED | place(b"\xee" * cluster) | ZERO
        if packed:
            content = (b"compressible " * cluster)[:cluster]
            codec = zlib.compressobj(wbits=-12)
            small = codec.compress(content) + codec.flush()
            host = place(small)
            shift = 62 - (cluster_bits - 8)
            sectors = (len(small) - 1) // 512
            l2_entries[7] = COMPRESSED | sectors << shift | host
            self.model[7 * cluster : 8 * cluster] = content
        snapshots = b""
        snapshots_at = 0
        if snapshot:
            shared_l1 = place(struct.pack(">Q", l2))
            snapshots = struct.pack(">QIHHIIQII", shared_l1, 1, 1, 4, 1_600_000_000, 0, 0, 0, 16)
            snapshots += struct.pack(">QQ", 0, len(self.model)) + b"1snap"
            snapshots_at = place(snapshots)
        assert data == 5 * cluster

        header = struct.pack(
            ">4sIQIIQIIQQIIQ",
            b"QFI\xfb",
            version,
            0,
            len(backing),
            cluster_bits,
            len(self.model),
            0,
            1,
            l1,
            reftable,
            1,
            1 if snapshot else 0,
            snapshots_at,
        )
        if version > 2:
            header += struct.pack(">QQQIIQ", incompatible, 0, 0, 4, 112, 0)
        for kind, content in (
            (0xE2792ACA, b"raw" if backing else b""),
            (0x6803F857, struct.pack(">BB46s", 0, 0, b"dirty bit")),
            (0x12345678, b"unknown extension"),
        ):
            if content:
                header += struct.pack(">II", kind, len(content))
                header += content.ljust(-(-len(content) // 8) * 8, b"\0")
        header += bytes(8)
        if backing:
            at = len(header)
            header = header[:8] + struct.pack(">Q", at) + header[16:] + backing
        counts = [1] * used
        if snapshot:  # all that the active L1 reaches is shared; the snapshot's own tables are not
            for index in range(4, used - 2):
                counts[index] = 2
        block = struct.pack(f">{used}H", *counts)
        out = [
            header.ljust(cluster, b"\0"),
            struct.pack(">Q", refblock).ljust(cluster, b"\0"),
            block.ljust(cluster, b"\0"),
            struct.pack(">Q", l2 | (0 if snapshot else COPIED)).ljust(cluster, b"\0"),
            struct.pack(f">{entries}Q", *l2_entries),
            *self.clusters,
        ]
        self.data = b"".join(out)
        if snapshot:  # shared clusters do not carry COPIED
            self.data = bytearray(self.data)
            for index in range(entries):
                at = l2 + index * 8
                value = int.from_bytes(self.data[at : at + 8], "big") & ~COPIED
                self.data[at : at + 8] = value.to_bytes(8, "big")
            self.data = bytes(self.data)

    def with_field(self, offset: int, width: int, value: int) -> bytes:
        return self.data[:offset] + value.to_bytes(width, "big") + self.data[offset + width :]
