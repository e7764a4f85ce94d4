"""What can be kept of a header that does not parse."""

from __future__ import annotations

from .. import header as hd

_KNOWN = hd.DIRTY | hd.CORRUPT | hd.DATA_FILE | hd.COMPRESSION | hd.EXTENDED_L2
_MOST_SIZE = 1 << 56


def broken_header(head: bytes, length: int) -> tuple[hd.Header | None, list[str]]:
    """The header without the fields that cannot be right, and the names of those; None when too
    little is left to go by.  ``length`` is the file's in bytes.

    The backing file and the extensions are left out: read without them, a disk shows holes where
    its backing file would be, and never the bytes of a wrong one.
    """
    if len(head) < hd.V3_LENGTH:
        return None, []
    magic, version, _, _, bits, size, crypt, l1_size, l1_at, ref_at, refs, _, _ = (
        hd.V2.unpack_from(head)
    )
    if not 9 <= bits <= 21:
        return None, []
    dropped: list[str] = ["the backing file and the extensions"]
    h = hd.Header()
    h.cluster_bits = bits
    cluster = 1 << bits
    known = magic == hd.MAGIC
    if not known:
        dropped.append("the magic")
    if version in (2, 3):
        h.version = version
        known = True
    else:
        dropped.append("the version")
    if crypt in (0, 1, 2):
        h.crypt_method = crypt
    else:
        dropped.append("the encryption method")
    sound_l1 = (
        not l1_at % cluster
        and 0 < l1_at < length
        and 0 < 8 * l1_size <= min(hd.MAX_L1_BYTES, length)
    )
    if 0 < size <= _MOST_SIZE and hd.l1_entries(size, bits) * 8 <= hd.MAX_L1_BYTES:
        h.size = size
    elif sound_l1:
        h.size = l1_size << 2 * bits - 3
        dropped.append("the size (taken from the length of the L1 table)")
    else:
        return None, []
    if sound_l1:
        h.l1_offset = l1_at
        h.l1_size = max(l1_size, hd.l1_entries(h.size, bits))
    else:
        dropped.append("the place of the L1 table")
    if not ref_at % cluster and 0 < ref_at < length and 0 < refs <= max(1, (8 << 20) >> bits):
        h.reftable_offset, h.reftable_clusters = ref_at, refs
    else:
        dropped.append("the place of the refcount table")
    if h.version > 2:
        incompatible, _, _, order, header_length = hd.V3.unpack_from(head, hd.V2.size)
        if not incompatible & ~_KNOWN:
            h.incompatible = incompatible
        else:
            dropped.append("the incompatible features")
        if order <= 6:
            h.refcount_order = order
        if header_length >= 112 and h.incompatible & hd.COMPRESSION:
            h.tail = head[hd.V3_LENGTH : hd.V3_LENGTH + 8]
    return (h, dropped) if known and not size % 512 else (None, [])
