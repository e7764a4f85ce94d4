"""The qcow2 header cluster: fields, extensions, backing file name (qcow2 specification,
"Header" and "Header extensions")."""

from __future__ import annotations

import struct

from ...errors import CorruptImage, MalformedImage, UnsupportedFeature, UsageError
from ...ondisk import Fields
from ...units import align_up

MAGIC = b"QFI\xfb"
V2 = Fields(
    ">",
    "magic:4s version:I backing_file_offset:Q backing_file_size:I cluster_bits:I size:Q "
    "crypt_method:I l1_size:I l1_table_offset:Q refcount_table_offset:Q "
    "refcount_table_clusters:I nb_snapshots:I snapshots_offset:Q",
)
"""The header of version 2, and the beginning of version 3's."""
V3 = Fields(
    ">",
    "incompatible_features:Q compatible_features:Q autoclear_features:Q refcount_order:I "
    "header_length:I",
)
"""What follows it in version 3."""
EXTENSION = Fields(">", "type:I length:I")
POINTER = Fields(">", "offset:Q length:Q")
"""The data of the header extension for encryption."""
FEATURE_NAME = Fields(">", "type:B bit:B name:46s")
V2_LENGTH, V3_LENGTH, WRITTEN_LENGTH = V2.size, V2.size + V3.size, 112
LEAST_EXTENDED_BITS = 14  # of a cluster: subclusters have at least 512 bytes
FEATURES_OFFSET = V2.size
REFTABLE_OFFSET = V2.offset_of("refcount_table_offset")
L1_OFFSET = V2.offset_of("l1_size")

INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = 0, 1, 2
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
LAZY_REFCOUNTS = 1
BITMAPS, RAW_DATA_FILE = 1, 2

EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441

MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023
MAX_OFFSET = 1 << 56

_FEATURES = (
    (INCOMPATIBLE, 0, "dirty bit"),
    (INCOMPATIBLE, 1, "corrupt bit"),
    (INCOMPATIBLE, 2, "external data file"),
    (INCOMPATIBLE, 3, "compression type"),
    (INCOMPATIBLE, 4, "extended L2 entries"),
    (COMPATIBLE, 0, "lazy refcounts"),
    (AUTOCLEAR, 0, "bitmaps"),
    (AUTOCLEAR, 1, "raw external data"),
)


def feature_table() -> bytes:
    """The feature-name table of all features that the specification names."""
    return b"".join(
        FEATURE_NAME.pack(kind, bit, name.encode()) for kind, bit, name in _FEATURES
    )


class Header:
    """All fields, in the units of the file (bytes, clusters, entries as the specification has
    them).  ``tail`` holds the header bytes from 104 on, ``extensions`` all but the end mark."""

    def __init__(self) -> None:
        self.version = 3
        self.backing_offset = 0
        self.backing_length = 0
        self.cluster_bits = 16
        self.size = 0
        self.crypt_method = 0
        self.l1_size = 0
        self.l1_offset = 0
        self.reftable_offset = 0
        self.reftable_clusters = 0
        self.nb_snapshots = 0
        self.snapshots_offset = 0
        self.incompatible = 0
        self.compatible = 0
        self.autoclear = 0
        self.refcount_order = 4
        self.tail = bytes(WRITTEN_LENGTH - V3_LENGTH)
        self.extensions: list[tuple[int, bytes]] = []
        self.backing_file: bytes | None = None

    @property
    def length(self) -> int:
        """Bytes of the header proper."""
        return V2_LENGTH if self.version == 2 else V3_LENGTH + len(self.tail)

    @property
    def compression_type(self) -> int:
        """0 for deflate, 1 for zstd."""
        return self.tail[0] if self.version > 2 and self.tail else 0

    def copy(self) -> Header:
        """The same fields, to be changed without changing these."""
        out = Header()
        out.__dict__.update(self.__dict__)
        out.extensions = list(self.extensions)
        return out

    def extension(self, kind: int) -> bytes | None:
        """The data of the last extension of this type, which is the one that counts: the
        specification allows one, and programs that meet more let the later replace the earlier."""
        for found, data in reversed(self.extensions):
            if found == kind:
                return data
        return None

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Replace all extensions of this type by one in the place of the first, add one or, with
        None, remove them."""
        places = [i for i, (found, _) in enumerate(self.extensions) if found == kind]
        place = places[0] if places else len(self.extensions)
        for i in reversed(places):
            del self.extensions[i]
        if data is not None:
            self.extensions.insert(place, (kind, data))

    def fields(self) -> bytes:
        """The header proper, without extensions."""
        out = V2.pack(
            MAGIC,
            self.version,
            self.backing_offset,
            self.backing_length,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.reftable_offset,
            self.reftable_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version > 2:
            out += self.features()
            out += struct.pack(">II", self.refcount_order, self.length) + self.tail
        return out

    def features(self) -> bytes:
        """The three feature fields, which stand at :data:`FEATURES_OFFSET`."""
        return struct.pack(">QQQ", self.incompatible, self.compatible, self.autoclear)

    def encode(self) -> bytes:
        """The header cluster up to the end of the backing file name, which is placed behind the
        extensions.  Raises UsageError when that does not fit into the cluster."""
        extensions = b"".join(
            EXTENSION.pack(kind, len(data)) + data.ljust(align_up(len(data), 8), b"\0")
            for kind, data in self.extensions
        )
        extensions += bytes(8)
        name = self.backing_file or b""
        self.backing_offset = self.length + len(extensions) if name else 0
        self.backing_length = len(name)
        out = self.fields() + extensions + name
        if len(out) > 1 << self.cluster_bits:
            raise UsageError("The header with its extensions and the backing file name does not "
                             f"fit into a cluster of {1 << self.cluster_bits} bytes")
        return out


def parse_fields(head: bytes) -> Header:
    """The fixed fields from the first 512 bytes of the file, bounded.

    Raises MalformedImage naming the field, UnsupportedFeature for another version.
    """
    if len(head) < V2_LENGTH or head[:4] != MAGIC:
        raise MalformedImage("Image is not in qcow2 format", field="magic", offset=0)
    h = Header()
    (
        _,
        h.version,
        h.backing_offset,
        h.backing_length,
        h.cluster_bits,
        h.size,
        h.crypt_method,
        h.l1_size,
        h.l1_offset,
        h.reftable_offset,
        h.reftable_clusters,
        h.nb_snapshots,
        h.snapshots_offset,
    ) = V2.unpack_from(head)
    if h.version not in (2, 3):
        raise _unsupported(f"Unsupported qcow2 version {h.version}", f"version {h.version}")
    if not 9 <= h.cluster_bits <= 21:
        raise MalformedImage(
            f"Unsupported cluster size: 2^{h.cluster_bits}", field="cluster_bits", offset=20
        )
    if h.version > 2:
        if len(head) < V3_LENGTH:
            raise MalformedImage("qcow2 header is cut off", field="header_length", offset=100)
        (h.incompatible, h.compatible, h.autoclear, h.refcount_order, length) = V3.unpack_from(
            head, V2_LENGTH
        )
        if length < V3_LENGTH:
            raise MalformedImage("qcow2 header too short", field="header_length", offset=100)
        if length > 1 << h.cluster_bits:
            raise MalformedImage(
                "qcow2 header exceeds cluster size", field="header_length", offset=100
            )
        if length % 8:
            raise MalformedImage(
                "qcow2 header length is not a multiple of 8", field="header_length", offset=100
            )
        h.tail = bytes(length - V3_LENGTH)
        if h.refcount_order > 6:
            raise MalformedImage(
                "Reference count entry width too large; may not exceed 64 bits",
                field="refcount_order",
                offset=96,
            )
    _bound(h)
    return h


def _bound(h: Header) -> None:
    """Bound every size, count and offset before anything is done with it."""
    cluster = 1 << h.cluster_bits

    def place(what: str, field: str, at: int, offset: int, length: int) -> None:
        if offset % cluster or offset + length > MAX_OFFSET:
            raise MalformedImage(f"{what} offset invalid", field=field, offset=at)

    if h.backing_offset:
        if h.backing_offset > cluster:
            raise MalformedImage(
                "Invalid backing file offset", field="backing_file_offset", offset=8
            )
        room = cluster - h.backing_offset
        if h.backing_length > min(MAX_BACKING_NAME, room):
            raise MalformedImage(
                "Backing file name too long", field="backing_file_size", offset=16
            )
    else:
        h.backing_length = 0  # the field means nothing then, and may hold anything
    if h.size >= 1 << 63:
        raise MalformedImage("Image is too big", field="size", offset=24)
    if h.crypt_method > 2:
        raise _unsupported(
            f"Unsupported encryption method {h.crypt_method}", f"encryption {h.crypt_method}"
        )
    if h.l1_size * 8 > MAX_L1_BYTES:
        raise MalformedImage("Active L1 table too large", field="l1_size", offset=36)
    if h.l1_size < l1_entries(h.size, h.cluster_bits, bool(h.incompatible & EXTENDED_L2)):
        raise MalformedImage("L1 table is too small", field="l1_size", offset=36)
    place("Active L1 table", "l1_table_offset", 40, h.l1_offset, h.l1_size * 8)
    if h.reftable_clusters == 0:
        raise MalformedImage(
            "Image does not contain a reference count table",
            field="refcount_table_clusters",
            offset=56,
        )
    if h.reftable_clusters * cluster > max(MAX_REFTABLE_BYTES, cluster):
        raise MalformedImage(
            "Reference count table too large", field="refcount_table_clusters", offset=56
        )
    place(
        "Reference count table",
        "refcount_table_offset",
        48,
        h.reftable_offset,
        h.reftable_clusters * cluster,
    )
    if h.nb_snapshots > MAX_SNAPSHOTS:
        raise MalformedImage("Snapshot table too large", field="nb_snapshots", offset=60)
    if h.snapshots_offset % cluster or h.snapshots_offset >= 1 << 63:
        # Checked by other programs even where there are no snapshots.
        raise MalformedImage("Snapshot table offset invalid", field="snapshots_offset", offset=64)
    if h.nb_snapshots:
        place("Snapshot table", "snapshots_offset", 64, h.snapshots_offset, h.nb_snapshots * 40)


def parse_tail(h: Header, cluster: bytes) -> None:
    """Fill in what follows the fixed fields from the bytes of the header cluster: unknown fields,
    extensions, backing file name.

    The extensions end at the end mark, the backing file name or the end of the cluster.
    """
    limit = min(h.backing_offset or len(cluster), len(cluster))
    h.tail = cluster[V3_LENGTH : h.length] if h.version > 2 else b""
    at = h.length
    while at < limit:
        kind, length = EXTENSION.unpack(cluster[at : at + 8].ljust(8, b"\0"))
        at += 8
        if length > limit - at:  # the end mark has a length, too
            raise MalformedImage("Header extension too large", field=f"{kind:#x}", offset=at - 8)
        if kind == EXT_END:
            break
        h.extensions.append((kind, cluster[at : at + length]))
        at += align_up(length, 8)
    if h.backing_offset and h.backing_length:
        h.backing_file = cluster[h.backing_offset : h.backing_offset + h.backing_length]
    if h.version > 2:
        _refuse_unknown(h)
    if bool(h.compression_type) != bool(h.incompatible & COMPRESSION):
        must = "must be" if h.compression_type else "must not be"
        raise MalformedImage(
            f"qcow2: Compression type incompatible feature bit {must} set",
            field="compression_type",
            offset=V3_LENGTH,
        )
    if h.compression_type > 1:
        raise _unsupported(
            f"qcow2: unknown compression type: {h.compression_type}",
            f"compression type {h.compression_type}",
        )
    if h.incompatible & EXTENDED_L2 and h.cluster_bits < LEAST_EXTENDED_BITS:
        raise MalformedImage(
            "Extended L2 entries need clusters of at least 16 KiB", field="cluster_bits", offset=20
        )


def _refuse_unknown(h: Header) -> None:
    known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
    unknown = h.incompatible & ~known
    if not unknown:
        return
    table = h.extension(EXT_FEATURE_NAMES) or b""
    names = {}
    for i in range(0, len(table) - 47, 48):
        if table[i] == INCOMPATIBLE:
            names[table[i + 1]] = table[i + 2 : i + 48].rstrip(b"\0").decode("utf-8", "replace")
    found = [names.pop(bit) for bit in sorted(names) if bit < 64 and unknown >> bit & 1]
    nameless = unknown
    for i in range(0, len(table) - 47, 48):
        if table[i] == INCOMPATIBLE and table[i + 1] < 64:
            nameless &= ~(1 << table[i + 1])
    if nameless:
        found.append(f"Unknown incompatible feature: {nameless:x}")
    features = ", ".join(found)
    raise _unsupported(f"Unsupported qcow2 feature(s): {features}", features)


def _unsupported(text: str, feature: str) -> UnsupportedFeature:
    error = UnsupportedFeature(feature)
    error.detail = text
    return error


def l1_entries(size: int, cluster_bits: int, extended: bool = False) -> int:
    """L1 entries that a virtual size of ``size`` bytes needs."""
    bits = 2 * cluster_bits - (4 if extended else 3)
    return -(-size >> bits)


def l1_bytes(h: Header, size: int) -> int:
    """Bytes of the L1 table that a virtual size of ``size`` bytes needs in this image."""
    return 8 * l1_entries(size, h.cluster_bits, bool(h.incompatible & EXTENDED_L2))


def check_level(h: Header, level: int | None) -> None:
    """Raise UsageError for a level that the image's compression does not have."""
    name, most = ("zstd", 19) if h.compression_type else ("zlib", 9)
    if level is not None and not 1 <= level <= most:
        raise UsageError(f"The compression level of {name} must be between 1 and {most}")


def check_corrupt(h: Header, writable: bool) -> None:
    """Raise CorruptImage for an image that is marked corrupt and is to be written."""
    if writable and h.incompatible & CORRUPT:
        raise CorruptImage(
            "qcow2: Image is corrupt; cannot be opened read/write",
            field="incompatible_features",
            offset=FEATURES_OFFSET,
        )
