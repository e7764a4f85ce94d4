"""Replacing the header cluster so that a crash leaves one header or the other."""

from __future__ import annotations

from ...contract import Barrier, MetaWrite, Procedure, Write
from ...hints import TYPE_CHECKING
from ...units import align_up
from . import header as hd
from .header import Header
from .machine.core import SLOT

if TYPE_CHECKING:
    from .format import Qcow2

_SECTOR = 512


def replace_header(image: Qcow2, new: Header) -> Procedure:
    """Write ``new`` in the place of the image's header and take it for the image's own.

    What it refers to must be durable.  Only the first sector can be switched in one step, so a
    header that is longer goes by way of one whose extensions stand farther back in the cluster
    (its length says so), out of the way of both the old and the new one.  Raises UsageError when
    the new header does not fit into a cluster; nothing is written then.
    """
    old = image.header
    data = new.encode()
    end = max(_end(old), len(data))
    if len(data) <= _SECTOR:
        yield Write([MetaWrite(SLOT, 0, data.ljust(min(end, _SECTOR), b"\0"))])
        yield Barrier()
        if end > _SECTOR:
            yield Write([MetaWrite(SLOT, _SECTOR, bytes(end - _SECTOR))])
            yield Barrier()
    else:
        interim = _moved(new if new.version > 2 else old, align_up(end, _SECTOR))
        if interim is None:
            interim = _shortened(new, align_up(end, _SECTOR))
        if interim is not None:
            yield Write([MetaWrite(SLOT, interim[1], interim[2])])
            yield Barrier()
            yield Write([MetaWrite(SLOT, 0, interim[0])])
            yield Barrier()
        yield Write([MetaWrite(SLOT, _SECTOR, data[_SECTOR:].ljust(end - _SECTOR, b"\0"))])
        yield Barrier()
        yield Write([MetaWrite(SLOT, 0, data[:_SECTOR])])
        yield Barrier()
        if interim is not None:
            yield Write([MetaWrite(SLOT, interim[1], bytes(len(interim[2])))])
            yield Barrier()
    image.use_header(new)


def _end(h: Header) -> int:
    """Where the header with its extensions and the backing file's name ends.  What fills its
    cluster has no end mark."""
    extensions = sum(8 + align_up(len(data), 8) for _, data in h.extensions)
    end = max(h.backing_offset + h.backing_length, h.length + 8 + extensions)
    return min(end, 1 << h.cluster_bits)


def _moved(h: Header, start: int) -> tuple[bytes, int, bytes] | None:
    """The first sector of ``h`` with all extensions from ``start`` on: (that sector, ``start``,
    what goes there).  None where there is no room, or the version has no header length."""
    if h.version == 2 or start + _end(h) - h.length > 1 << h.cluster_bits:
        return None
    moved = h.copy()
    moved.tail = h.tail + bytes(start - h.length)
    data = moved.encode()
    return data[:_SECTOR], start, data[start:]


def _shortened(h: Header, spare: int) -> tuple[bytes, int, bytes] | None:
    """The same for version 2: a header without extensions but the backing format (those that this
    version has beside it tell nothing that is needed), and the name at ``spare``."""
    name = h.backing_file or b""
    if h.version > 2 or spare + len(name) > 1 << h.cluster_bits:
        return None
    short = h.copy()
    short.backing_offset = spare if name else 0
    head = short.fields()
    fmt = h.extension(hd.EXT_BACKING_FORMAT)
    if fmt is not None and len(head) + 16 + align_up(len(fmt), 8) <= _SECTOR:
        head += hd.EXTENSION.pack(hd.EXT_BACKING_FORMAT, len(fmt))
        head += fmt.ljust(align_up(len(fmt), 8), b"\0")
    return head.ljust(_SECTOR, b"\0"), spare, name
