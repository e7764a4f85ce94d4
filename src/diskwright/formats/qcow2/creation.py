"""Writing a new qcow2 image."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping

from ...contract import Barrier, Create, Length, MetaWrite, Procedure, Progress, Truncate, Write
from ...errors import DiskError, UsageError
from ...hints import TYPE_CHECKING, Any
from ...ondisk import big_endian_bytes, zeros
from ...units import align_up, is_power_of_two
from . import header as hd
from .machine.core import COPIED, DATA_SLOT, SLOT, ZERO_FLAG
from .machine.refblock import empty

if TYPE_CHECKING:
    from .encryption import NewEncryption

VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
# Below this cluster size the table of feature names would crowd the header cluster.
FEATURE_TABLE_CLUSTER = 8192
_CHUNK = 1 << 20


def new_header(options: Mapping[str, Any]) -> hd.Header:
    """Check the create options and make a header of them; places are still to be set.

    Raises UsageError with the words that scripts know from qemu-img.
    """
    h = hd.Header()
    size = options.get("size")
    if size is None or size < 0:
        raise UsageError("Image size must be specified")
    h.size = align_up(int(size), 512)
    compat = str(options.get("compat") or "1.1")
    if compat not in VERSIONS:
        raise UsageError(f"Parameter 'version' does not accept value '{compat}'")
    h.version = VERSIONS[compat]
    cluster_size = int(options.get("cluster_size", 65536) or 0)
    if not is_power_of_two(cluster_size) or not 512 <= cluster_size <= 2 << 20:
        raise UsageError("Cluster size must be a power of two between 512 and 2048k")
    h.cluster_bits = cluster_size.bit_length() - 1
    _check_features(h, options)
    h.l1_size = hd.l1_entries(h.size, h.cluster_bits, bool(h.incompatible & hd.EXTENDED_L2))
    data_file = bool(options.get("data_file"))
    if h.l1_size * 8 > hd.MAX_L1_BYTES or (data_file and h.size > hd.MAX_OFFSET):
        raise UsageError(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
        )
    if h.version == 2:
        h.tail = b""
    _check_data_file(h, options)
    _add_extensions(h, options)
    return h


def _check_features(h: hd.Header, options: Mapping[str, Any]) -> None:
    refcount_bits = int(options.get("refcount_bits", 16))
    if not is_power_of_two(refcount_bits) or refcount_bits > 64:
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    h.refcount_order = refcount_bits.bit_length() - 1
    later = " (use version=v3 or greater)"
    if h.version == 2 and refcount_bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above"
            + later
        )
    if options.get("lazy_refcounts"):
        if h.version == 2:
            raise UsageError(
                "Lazy refcounts only supported with compatibility level 1.1 and above" + later
            )
        h.compatible |= hd.LAZY_REFCOUNTS
    compression = options.get("compression_type") or "zlib"
    if compression not in ("zlib", "zstd"):
        raise UsageError(f"Parameter 'compression-type' does not accept value '{compression}'")
    if compression == "zstd":
        if h.version == 2:
            raise UsageError(
                "Non-zlib compression type is only supported with compatibility level 1.1 and "
                "above" + later
            )
        h.incompatible |= hd.COMPRESSION
        h.tail = b"\1" + h.tail[1:]
    if options.get("extended_l2"):
        _check_extended(h)
    hd.check_level(h, options.get("compression_level"))
    preallocation = options.get("preallocation") or "off"
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    extended = h.incompatible & hd.EXTENDED_L2
    if options.get("backing_file") and preallocation != "off" and not extended:
        raise UsageError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )


def _check_data_file(h: hd.Header, options: Mapping[str, Any]) -> None:
    name, raw = options.get("data_file"), bool(options.get("data_file_raw"))
    if raw and name is None:
        raise UsageError("data-file-raw requires data-file")
    if raw and options.get("backing_file"):
        raise UsageError("Backing file and data-file-raw cannot be used at the same time")
    if name is None:
        return
    if h.version == 2:
        raise UsageError(
            "External data files are only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)"
        )
    if not name:
        raise UsageError("Could not create '': No such file or directory")
    h.incompatible |= hd.DATA_FILE
    if raw:
        h.autoclear |= hd.RAW_DATA_FILE


def _check_extended(h: hd.Header) -> None:
    if h.version == 2:
        raise UsageError(
            "Extended L2 entries are only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)"
        )
    if h.cluster_bits < hd.LEAST_EXTENDED_BITS:
        raise UsageError(
            "Extended L2 entries are only supported with cluster sizes of at least "
            f"{1 << hd.LEAST_EXTENDED_BITS} bytes"
        )
    h.incompatible |= hd.EXTENDED_L2


def _add_extensions(h: hd.Header, options: Mapping[str, Any]) -> None:
    name = options.get("backing_file")
    fmt = options.get("backing_fmt")
    if name:
        what = f"Could not assign backing file '{name}' with format '{fmt}'"
        try:
            set_backing(h, name, fmt)
        except UsageError as error:
            raise UsageError(f"{what}: Invalid argument") from error
    if h.incompatible & hd.DATA_FILE:
        h.set_extension(hd.EXT_DATA_FILE, os.fsencode(str(options["data_file"])))
    if h.version > 2 and h.cluster_bits >= FEATURE_TABLE_CLUSTER.bit_length() - 1:
        h.set_extension(hd.EXT_FEATURE_NAMES, hd.feature_table())


def set_backing(h: hd.Header, name: str | None, fmt: str | None) -> None:
    """Put a backing file's name and format into the header (None: none).

    Raises UsageError when the name is longer than 1023 bytes.
    """
    encoded = os.fsencode(name) if name else None
    if encoded is not None and len(encoded) > hd.MAX_BACKING_NAME:
        raise UsageError("Backing file name too long")
    h.backing_file = encoded
    wanted = fmt.encode() if fmt and encoded is not None else None
    if wanted is not None and h.extension(hd.EXT_BACKING_FORMAT) is None:
        h.extensions.insert(0, (hd.EXT_BACKING_FORMAT, wanted))
    else:
        h.set_extension(hd.EXT_BACKING_FORMAT, wanted)


class Layout:
    """Where the structures of a new image are, in clusters.

    Header, refcount table, refcount blocks, L1, encryption header (of ``encryption`` bytes), and
    as many L2 tables and clusters of data as the image has from the beginning; without gaps.
    """

    def __init__(
        self, h: hd.Header, l2_tables: int = 0, data_clusters: int = 0, encryption: int = 0
    ) -> None:
        bits = h.cluster_bits
        size = 1 << bits
        order = h.refcount_order if h.version > 2 else 4
        per_block = size * 8 >> order
        self.l1_clusters = -(-h.l1_size * 8 >> bits)
        self.l2_tables = l2_tables
        self.external = bool(h.incompatible & hd.DATA_FILE)
        self.data_clusters = 0 if self.external else data_clusters
        self.encryption_clusters = -(-encryption >> bits)
        fixed = 1 + self.l1_clusters + self.encryption_clusters + self.l2_tables
        fixed += self.data_clusters
        blocks = table = 1
        while True:
            total = fixed + blocks + table
            wanted_blocks = -(-total // per_block)
            wanted_table = -(-wanted_blocks * 8 >> bits)
            if (wanted_blocks, wanted_table) == (blocks, table):
                break
            blocks, table = max(blocks, wanted_blocks), max(table, wanted_table)
        if table * size > hd.MAX_REFTABLE_BYTES and table > 1:
            raise UsageError("The refcount table of this image would be too large "
                             "(try using a larger cluster size)")
        self.total = total
        self.per_block = per_block
        self.refcount_bits = 1 << order
        self.reftable_clusters, self.blocks = table, blocks
        self.reftable = 1
        self.first_block = 1 + table
        self.l1 = self.first_block + blocks
        self.encryption = self.l1 + self.l1_clusters
        self.l2 = self.encryption + self.encryption_clusters
        self.data = 0 if self.external else self.l2 + self.l2_tables
        """The cluster in the file of the guest data that holds the first of them."""


def _layout(h: hd.Header, preallocated: bool, encryption: NewEncryption | None) -> Layout:
    keys = 0 if encryption is None else encryption.length
    if not preallocated:
        return Layout(h, encryption=keys)
    return Layout(h, h.l1_size, -(-h.size >> h.cluster_bits), keys)


def measure(options: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that an image of ``size`` has beside its data when all of it is allocated, and the size
    of a cluster.  Raises UsageError."""
    h = new_header({**options, "data_file": None, "data_file_raw": False})
    layout = _layout(h, True, _encryption(options))
    return (layout.total - layout.data_clusters) << h.cluster_bits, 1 << h.cluster_bits


def create_image(options: Mapping[str, Any]) -> Procedure:
    """Write an image of ``size`` bytes (rounded up to 512) into slot ``file``.

    The header comes last, so that an interrupted create leaves nothing that looks like an image.
    What the slot held before is cut off where it can be.
    """
    h = new_header(options)
    preallocation = options.get("preallocation") or "off"
    # A raw data file is the disk, so every entry points into it from the beginning.
    mapped = preallocation != "off" or bool(h.autoclear & hd.RAW_DATA_FILE)
    encryption = _encryption(options)
    h.crypt_method = 0 if encryption is None else encryption.method
    if h.crypt_method and h.version == 2 and mapped:
        raise UsageError("Preallocation of an encrypted image requires compat=1.1")
    layout = _layout(h, mapped, encryption)
    bits = h.cluster_bits
    if encryption is not None and encryption.length:
        place = encryption.pointer(layout.encryption << bits)
        h.set_extension(hd.EXT_ENCRYPTION, place)
    h.reftable_offset = layout.reftable << bits
    h.reftable_clusters = layout.reftable_clusters
    h.l1_offset = layout.l1 << bits if h.l1_size else 0
    try:
        header = h.encode()
    except UsageError as error:
        name, fmt = options.get("backing_file"), options.get("backing_fmt")
        raise UsageError(
            f"Could not assign backing file '{name}' with format '{fmt}': No space left on device"
        ) from error
    keys = b"" if encryption is None else (yield from encryption.make())
    kept = False
    if (yield Length(SLOT)):
        try:
            yield Truncate(SLOT, 0)
        except (OSError, DiskError):
            kept = True  # a device keeps its length and what it holds
    mode = preallocation if preallocation in ("falloc", "full") else "off"
    if layout.external:
        yield Create(DATA_SLOT, str(options["data_file"]))
        yield Truncate(DATA_SLOT, h.size, mode)
    elif mode != "off":
        yield Truncate(SLOT, layout.total << bits, mode)
    done = 0
    whole = layout.total - layout.data_clusters << bits
    for batch in _batches(_tables(h, layout, kept)):
        yield Write(batch)
        done += sum(len(write.data) for write in batch)
        yield Progress(done, max(done, whole))
    if keys:
        room = layout.encryption_clusters << bits if kept else len(keys)
        yield Write([MetaWrite(SLOT, layout.encryption << bits, keys.ljust(room, b"\0"))])
    if keys or (preallocation == "metadata" and not layout.external):
        length = yield Length(SLOT)
        if length < layout.total << bits:
            yield Truncate(SLOT, layout.total << bits)
    yield Barrier()
    # Old bytes behind the header would be taken for a name or an extension by some program.
    room = 1 << bits if kept else min(1 << bits, align_up(len(header), 4096))
    yield Write([MetaWrite(SLOT, 0, header.ljust(room, b"\0"))])
    yield Barrier()


def _encryption(options: Mapping[str, Any]) -> NewEncryption | None:
    if not any(name.startswith("encrypt") and options[name] for name in options):
        return None
    from .encryption import new_encryption

    return new_encryption(options)


def _batches(writes: Iterator[MetaWrite]) -> Iterator[list[MetaWrite]]:
    batch: list[MetaWrite] = []
    weight = 0
    for write in writes:
        batch.append(write)
        weight += len(write.data)
        if weight >= _CHUNK:
            yield batch
            batch, weight = [], 0
    if batch:
        yield batch


def _tables(h: hd.Header, layout: Layout, kept: bool) -> Iterator[MetaWrite]:
    """All structures but the header; with ``kept`` each to the end of its last cluster, since a
    larger L1 table would grow into what was there."""
    bits = h.cluster_bits
    size = 1 << bits
    reftable = zeros(64, layout.reftable_clusters * size // 8)
    for i in range(layout.blocks):
        at = (layout.first_block + i) << bits
        reftable[i] = at
        block = empty(layout.refcount_bits, size)
        block.fill(0, min(layout.per_block, layout.total - i * layout.per_block), 1)
        yield MetaWrite(SLOT, at, block.encode(0, size))
    yield MetaWrite(SLOT, h.reftable_offset, big_endian_bytes(reftable))
    l1 = zeros(64, h.l1_size)
    # Of extended entries the bitmap stays empty: there is host space, and a backing file shows.
    stride = 2 if h.incompatible & hd.EXTENDED_L2 else 1
    # Zeroes in the file are none once they are decrypted.
    flags = COPIED | (ZERO_FLAG if h.crypt_method and stride == 1 else 0)
    entries = size // 8 // stride
    for i in range(layout.l2_tables):
        at = (layout.l2 + i) << bits
        l1[i] = at | COPIED
        first = layout.data + i * entries
        count = min(entries, (-(-h.size >> bits)) - i * entries)
        places = array("Q", range(first << bits | flags, first + count << bits | flags, size))
        table = zeros(64, entries * stride)
        table[: count * stride : stride] = places
        yield MetaWrite(SLOT, at, big_endian_bytes(table))
    for start in range(0, h.l1_size, _CHUNK // 8):
        data = big_endian_bytes(l1, start, min(h.l1_size, start + _CHUNK // 8))
        if kept and start + _CHUNK // 8 >= h.l1_size:
            data = data.ljust(align_up(8 * h.l1_size, size) - 8 * start, b"\0")
        yield MetaWrite(SLOT, h.l1_offset + 8 * start, data)
