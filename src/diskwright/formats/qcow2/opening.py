"""The open procedure of qcow2 images."""

from __future__ import annotations

from collections.abc import Mapping

from ...contract import Length, Open, Procedure, Read
from ...errors import MalformedImage, UsageError
from ...hints import TYPE_CHECKING, Any
from ...ondisk import big_endian_array
from ...units import SECTOR, is_power_of_two
from . import header as hd
from .machine.core import DATA_SLOT, SLOT

if TYPE_CHECKING:
    from .format import Qcow2
    from .image import Image

_NO_END = 1 << 62
_LEAST_BLOCKS = 4  # refcount blocks that have room in a cache
_MOST_CACHED = (1 << 31) - 1  # entries of a cache
_MOST_CLEAN_INTERVAL = (1 << 32) - 1  # seconds


def open_image(image: Image) -> Procedure:
    """Read and check the header, L1 and refcount table; open the backing file that it names.

    Options: ``backing`` None switches the backing file off, any other value says that the caller
    fills the slot; ``check`` allows images that are marked corrupt or dirty to be opened writable
    as they are; ``lazy-refcounts`` overrules the header; ``zero_beyond_end`` False says that space
    beyond the end of the file may hold anything.
    Returns ``image``.
    """
    length = yield Length(SLOT)
    h = yield from read_header()
    checking = bool(image.options.get("check"))
    if not checking:
        hd.check_corrupt(h, image.writable)
    check_options(h, image.options)
    image.use_header(h)
    image.refuse_io, image.refuse_write = refusals(h)
    image.keeps = bool(image.options.get("discard-no-unref"))
    bits = h.cluster_bits
    zero_beyond_end = image.options.get("zero_beyond_end", True)
    image.fresh = -(-length >> bits) if zero_beyond_end else _NO_END
    if image.refuse_io is None or checking:
        yield from _read_tables(image)
    if h.nb_snapshots:
        yield from _read_snapshots(image, checking)
    if h.crypt_method or image.options.get("encrypt.format") is not None:
        from .encryption import open_encryption

        yield from open_encryption(image)
    yield from open_data_file(image)
    if h.extension(hd.EXT_BITMAPS) is not None:
        from .bitmaps.use import open_bitmaps

        yield from open_bitmaps(image)
        if image.directory is not None:
            image.reserve_structures()
    if image.writable and not image.refuse_io:
        yield from image.load_inactive()
    yield from _open_backing(image)
    return image


def open_writable(image: Qcow2) -> Procedure:
    """`open_image`; an image that is dirty gets its refcounts rebuilt.  Returns ``image``."""
    yield from open_image(image)
    if not (image.refuse_io or image.refuse_write or image.options.get("check")):
        if image.header.incompatible & hd.DIRTY:
            from .repair.rebuild import rebuild

            yield from rebuild(image)
        image.reannounce()
    return image


def read_header() -> Procedure:
    """Read and bound the header cluster; returns the Header."""
    (head,) = yield Read(SLOT, [(0, 512)])
    h = hd.parse_fields(head)
    # What follows the fixed fields ends with the backing file name, where there is one.
    end = h.backing_offset + h.backing_length if h.backing_offset else 1 << h.cluster_bits
    if end > len(head):
        (head,) = yield Read(SLOT, [(0, max(end, h.length))])
    hd.parse_tail(h, head)
    return h


def check_options(h: hd.Header, options: Mapping[str, Any]) -> None:
    """Raise UsageError for runtime options that contradict each other or the image."""
    if options.get("lazy-refcounts") and h.version == 2:
        raise UsageError(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
        )
    hd.check_level(h, options.get("compression-level"))
    if options.get("discard-no-unref") and h.version == 2:
        raise UsageError("discard-no-unref is only supported since qcow2 version 3")
    _check_caches(h, options)
    if not 0 <= options.get("cache-clean-interval", 0) <= _MOST_CLEAN_INTERVAL:
        raise UsageError("Cache clean interval too big")


def _check_caches(h: hd.Header, options: Mapping[str, Any]) -> None:
    """Memory is taken for tables that are in use alone; what QEMU's tools cannot count is refused
    as there."""
    names = ("l2-cache-size", "refcount-cache-size")
    whole, l2, blocks = (options.get(name) for name in ("cache-size", *names))
    if whole is not None:
        if l2 is not None and blocks is not None:
            raise UsageError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        for name, part in zip(names, (l2, blocks), strict=True):
            if part is not None and part > whole:
                raise UsageError(f"{name} may not exceed cache-size")
    cluster_size = 1 << h.cluster_bits
    entry = options.get("l2-cache-entry-size", cluster_size)
    if not is_power_of_two(entry) or not 512 <= entry <= cluster_size:
        raise UsageError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({cluster_size})"
        )
    extended = bool(h.incompatible & hd.EXTENDED_L2)
    every = hd.l1_entries(h.size, h.cluster_bits, extended) << h.cluster_bits
    if whole is not None and l2 is None:
        l2 = min(every, whole - (blocks or _LEAST_BLOCKS << h.cluster_bits))
    if whole is not None and blocks is None:
        blocks = whole - l2
    if min(l2 or 0, every) // entry > _MOST_CACHED:
        raise UsageError("L2 cache size too big")
    if (blocks or 0) >> h.cluster_bits > _MOST_CACHED:
        raise UsageError("Refcount cache size too big")


def refusals(h: hd.Header) -> tuple[str | None, str | None]:
    """The features that keep guest data from being read, and from being written."""
    read = write = None
    if h.nb_snapshots and h.incompatible & hd.DATA_FILE:
        write = "internal snapshots with an external data file"
    if h.crypt_method and h.size % SECTOR:  # no program makes them; sectors are encrypted whole
        write = f"writing to an encrypted disk of {h.size} bytes, which is no multiple of {SECTOR}"
    return read, write


def _read_tables(image: Image) -> Procedure:
    h = image.header
    if image.writable:
        for what, offset, count in (
            ("l1_table_offset", h.l1_offset, h.l1_size),
            ("refcount_table_offset", h.reftable_offset, 1),
        ):
            if not offset and count:
                raise MalformedImage(f"{what} is the header's place", field=what, offset=0)
    (raw,) = yield Read(SLOT, [(h.l1_offset, h.l1_size * 8)])
    image.l1 = big_endian_array(64, raw)
    (raw,) = yield Read(
        SLOT, [(h.reftable_offset, h.reftable_clusters << h.cluster_bits)], "reftable_load"
    )
    image.reftable = big_endian_array(64, raw)
    image.reserve_structures()


def _read_snapshots(image: Image, checking: bool) -> Procedure:
    """A table that breaks the specification keeps an image from being opened but for a check."""
    from .snapshots.table import read_table

    try:
        image.snapshot_table, image.snapshot_bytes = yield from read_table(image)
    except MalformedImage as error:
        if not checking:
            raise
        image.snapshot_damage = error
    image.reserve_structures()


def open_data_file(image: Image) -> Procedure:
    """Fill slot ``data-file`` by what the header names or, option ``data-file`` "given", by what
    the caller gives instead; with ``metadata-only`` guest data stay out of reach."""
    h = image.header
    given = image.options.get("data-file") is not None
    if not image.external:
        if given:
            raise UsageError("'data-file' can only be set for images with an external data file")
        if h.autoclear & hd.RAW_DATA_FILE:
            raise MalformedImage(
                "data-file-raw requires a data file", field="autoclear_features", offset=88
            )
        return
    if h.size > hd.MAX_OFFSET:
        raise MalformedImage("Image is too big for a data file", field="size", offset=24)
    if image.options.get("metadata-only"):
        image.refuse_io = image.refuse_io or "guest data of an image opened for its metadata"
        return
    name = image.data_file
    if name is None and not given:
        raise MalformedImage(
            "'data-file' is required for this image", field=f"{hd.EXT_DATA_FILE:#x}"
        )
    yield Open(DATA_SLOT, name or "", None, True)


def _open_backing(image: Image) -> Procedure:
    name = image.backing_file
    if "backing" in image.options:
        image.has_backing = image.options["backing"] is not None
    elif name:
        image.has_backing = True
        yield Open("backing", name, image.backing_format)
