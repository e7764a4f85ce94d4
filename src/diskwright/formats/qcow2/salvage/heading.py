"""The header of a damaged image: read, mended, or made up from what the tables speak for."""

from __future__ import annotations

from collections import Counter

from ....contract import DataRanges, Procedure, Progress, Read
from ....errors import ImageError, MalformedImage, UnsupportedFeature, UsageError
from ....hints import TYPE_CHECKING
from .. import header as hd
from ..encryption import LUKS, open_encryption, place_of
from ..machine.core import SLOT
from ..opening import read_header
from .assumed import Assumed
from .evidence import Kind, vote
from .reading import read_some
from .torn import broken_header

if TYPE_CHECKING:
    from .opening import Salvage

_WINDOW = 1 << 20
_LOOK = 1 << 30
_SECTOR = 512
_DEFAULT_BITS = 16
_ZSTD = b"\x28\xb5\x2f\xfd"
_MOST_LUKS = 16 << 20


def find_header(salvage: Salvage) -> Procedure:
    """Returns the header; ``salvage.has_header`` tells whether it was there."""
    said = salvage.assumed
    try:
        h = yield from read_header()
    except (OSError, ImageError) as error:
        if isinstance(error, UnsupportedFeature) and not error.feature.startswith("version"):
            raise
        head, _ = yield from read_some(SLOT, 0, _SECTOR)
        h, dropped = broken_header(head, salvage.length)
        if h is not None and not said.contradicts(h):
            salvage.say(f"The header is damaged ({error}); left out: {', '.join(dropped)}")
    if h is None or said.contradicts(h):
        salvage.has_header = False
        h = yield from _made_up(salvage, said)
    said.into(h)
    if h.incompatible & hd.EXTENDED_L2 and h.cluster_bits < hd.LEAST_EXTENDED_BITS:
        raise UsageError("Extended L2 entries need clusters of at least 16 KiB")
    return h


def _made_up(salvage: Salvage, said: Assumed) -> Procedure:
    """A header of what most that looks like tables speaks for, unless all of that is said."""
    h = hd.Header()
    if said.bits is not None and said.extended is not None:
        salvage.say("The header is lost, or not believed; its fields are those that were given")
        return h
    votes: Counter[Kind] = Counter()
    length = salvage.length
    for offset in range(0, length, _LOOK):
        ranges = yield DataRanges(SLOT, offset, min(_LOOK, length - offset))
        last = 0
        for start, count in ranges:
            for at in range(max(start - start % _WINDOW, last), start + count, _WINDOW):
                last = at + _WINDOW
                size = min(_WINDOW, length - at) & -_SECTOR
                if size:
                    data, _ = yield from read_some(SLOT, at, size)
                    vote(data, at, length, votes)
                    yield Progress(at, length)
    fitting = [
        (count, kind)
        for kind, count in votes.items()
        if said.bits in (None, kind.bits)
        and said.extended in (None, kind.extended)
        and said.external in (None, kind.external)
    ]
    kind = max(fitting)[1] if fitting else Kind(said.bits or _DEFAULT_BITS, False, False)
    how = "as most tables speak for" if fitting else "as is usual, for nothing speaks for one"
    h.cluster_bits = kind.bits
    words = ""
    if kind.extended:
        h.incompatible |= hd.EXTENDED_L2
        words += " with subclusters"
    if kind.external:
        h.incompatible |= hd.DATA_FILE
        words += " in an external data file"
        if said.external is None:
            raise UsageError(
                f"The header is lost, and its tables ({1 << kind.bits} bytes a cluster) are those "
                "of an image with an external data file: which one it is must be said (data_file)"
            )
    salvage.say(
        f"The header is lost; the clusters are taken for {1 << kind.bits} bytes{words}, "
        f"{how}"
    )
    return h


def unlock(salvage: Salvage) -> Procedure:
    """Unlock an image whose header tells how; True when that is done, or not needed."""
    image = salvage.image
    h = image.header
    if h.crypt_method == LUKS:
        try:
            place_of(h)
        except MalformedImage as error:
            salvage.say(f"The place of the encryption header is lost: {error}")
            return False
    if h.crypt_method:
        yield from open_encryption(image)
    return bool(h.crypt_method) or salvage.has_header or salvage.assumed.method is not None


def unlock_by_search(salvage: Salvage) -> Procedure:
    """Unlock an image by the encryption header that was found among what nothing names: one that
    a guest made for a disk of its own is named by the tables."""
    image = salvage.image
    h = image.header
    found = [cluster for cluster in salvage.found.keys if not image.marks.used(cluster)]
    if not found:
        if h.crypt_method:
            raise MalformedImage("Its encryption header was not found: nothing can be decrypted")
        return
    offset = found[0] << h.cluster_bits
    if image.options.get("encrypt.key-secret") is None:
        raise UsageError(
            f"At {offset:#x} is an encryption header that nothing names: if it is this image's, "
            "its key must be given (encrypt.key-secret), and otherwise encrypt.format=none"
        )
    salvage.say(f"An encryption header was found at {offset:#x}")
    length = min(_MOST_LUKS, salvage.length - offset)
    h.crypt_method = LUKS
    h.set_extension(hd.EXT_ENCRYPTION, hd.POINTER.pack(offset, length))
    yield from open_encryption(image)
    assert image.luks is not None
    ends = [slot.offset + image.luks.material(slot) for slot in image.luks.slots]
    salvage.use_region(offset, max(ends))


def find_codec(salvage: Salvage) -> Procedure:
    """Without a header most of a few compressed clusters tell by what they were compressed."""
    if salvage.has_header or salvage.assumed.zstd is not None or not salvage.packed:
        return
    heads = yield Read(SLOT, [(at, len(_ZSTD)) for at in salvage.packed])
    if 2 * heads.count(_ZSTD) > len(heads):
        h = salvage.image.header
        h.incompatible |= hd.COMPRESSION
        h.tail = b"\1" + h.tail[1:]
        salvage.say("The clusters are taken for compressed by zstd, as they look like")
