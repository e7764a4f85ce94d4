"""Unlocking, making and changing encryption (qcow2 specification, "Data encryption" and "Full disk
encryption header pointer").

Method 1 is AES-128 in CBC, the key being the password itself; method 2 has a LUKS1 header in
clusters of its own.  The sector that a vector is made of is that of the guest in method 1, and that
of the file in method 2.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...contract import Compute, Procedure
from ...errors import MalformedImage, UsageError
from ...hints import TYPE_CHECKING, Any
from ...secrets import find
from ..luks1 import Header as Luks
from ..luks1_slots import Place, amend, area, make_keys, plan_header, read_header, unlock
from . import header as hd
from .machine.core import SLOT

if TYPE_CHECKING:
    from .format import Qcow2
    from .image import Image

NONE, AES, LUKS = range(3)
NAMES = {AES: "aes", LUKS: "luks"}
PREFIX = "encrypt."
LOCKED = "encrypted guest data of an image opened without its key"

_KEY_BYTES = 16
_MOST_HEADER = 16 << 20


def place_of(h: hd.Header) -> tuple[int, int]:
    """Offset and length of the encryption header.  Raises MalformedImage."""
    pointer = h.extension(hd.EXT_ENCRYPTION)
    field = f"{hd.EXT_ENCRYPTION:#x}"
    if pointer is None:
        raise MalformedImage("Header extension of the encryption header is missing", field=field)
    if len(pointer) != hd.POINTER.size:
        raise MalformedImage("Encryption header extension has a wrong length", field=field)
    offset, length = hd.POINTER.unpack(pointer)
    if not offset or offset % (1 << h.cluster_bits) or offset >= hd.MAX_OFFSET:
        raise MalformedImage(f"Encryption header offset {offset:#x} is invalid", field=field)
    if length > _MOST_HEADER:
        raise MalformedImage(f"Encryption header of {length} bytes is too large", field=field)
    return offset, length


def open_encryption(image: Image) -> Procedure:
    """Read the encryption header and unlock the image by ``encrypt.key-secret``.

    An image that is opened to be checked (and not to be read) stays locked: its metadata are not
    encrypted.
    """
    h, options = image.header, image.options
    asked = options.get("encrypt.format")
    if not h.crypt_method:
        if asked is not None:
            raise UsageError(
                f"No encryption in image header, but options specified format '{asked}'"
            )
        return
    if asked not in (None, NAMES[h.crypt_method]):
        raise UsageError(
            f"Header reported '{NAMES[h.crypt_method]}' encryption format but options specify "
            f"'{asked}'"
        )
    if h.crypt_method == LUKS:
        offset, length = place_of(h)
        image.luks = yield from read_header(Place(SLOT, offset), length)
    if options.get("check") and not options.get("unlock"):
        image.refuse_io = image.refuse_io or LOCKED
        return
    name = options.get("encrypt.key-secret")
    if name is None:
        raise UsageError("Parameter 'encrypt.key-secret' is required for cipher")
    passphrase = find(options.get("secrets"), str(name))
    from ..ciphering import SectorTransform, Spec

    if image.luks is None:
        spec, key = Spec("aes", "cbc", "plain64"), passphrase[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0")
    else:
        spec = image.luks.spec
        key = yield from unlock(image.luks, Place(SLOT, place_of(h)[0]), passphrase)
    cipher = yield Compute(spec.make, (key,))
    image.use_cipher(SectorTransform(cipher, by_host=h.crypt_method == LUKS), key)


def told(image: Image) -> dict[str, Any]:
    """What `info` tells, keyed and ordered as ``qemu-img info --output=json`` does."""
    kind = NAMES[image.header.crypt_method]
    if image.luks is None:
        return {"format": kind}
    out: dict[str, Any] = {}
    for name, value in image.luks.info().items():
        if name == "cipher-mode":
            out["format"] = kind
        out[name] = value
    return out


class NewEncryption:
    """What the options of a creation ask for."""

    def __init__(self, method: int, options: Mapping[str, Any]) -> None:
        self.method = method
        self._options = options
        self._luks: Luks | None = None
        self._passphrase = b""
        self.length = 0
        """Bytes of the header, without those to the end of its last cluster."""
        if method == LUKS:
            self._luks, self._passphrase = plan_header(options)
            self.length = area(self._luks)

    def pointer(self, offset: int) -> bytes:
        """The header extension for a header at ``offset``."""
        return hd.POINTER.pack(offset, self.length)

    def make(self) -> Procedure:
        """The header, up to the end of the first slot's key material; the rest of it is zeroes.
        Empty without one."""
        if self._luks is None:
            return b""
        header, material, _ = yield from make_keys(self._luks, self._passphrase, self._options)
        return header.encode().ljust(header.slots[0].offset, b"\0") + material


def new_encryption(options: Mapping[str, Any]) -> NewEncryption:
    """Check the options of a creation.

    Raises UsageError, and UnsupportedFeature by name for what is not implemented.
    """
    given = {
        key.removeprefix(PREFIX): value
        for key, value in options.items()
        if key.startswith(PREFIX) and value is not None
    }
    kind = given.pop("format", None)
    if options.get("encryption"):
        if kind is not None:
            raise UsageError(
                "'encrypt.format' and its alias 'encryption' can't be used at the same time"
            )
        kind = "aes"
    if kind is None:
        if given:
            raise UsageError("Parameter 'encrypt.format' is missing")
        return NewEncryption(NONE, {})
    methods = {name: method for method, name in NAMES.items()}
    if kind not in methods:
        raise UsageError(f"Parameter 'format' does not accept value '{kind}'")
    given |= {"secrets": options.get("secrets"), "prefix": PREFIX}
    if kind == "aes":
        for name in given.keys() - {"key-secret", "secrets", "prefix"}:
            raise UsageError(f"Parameter 'encrypt.{name}' is unexpected")
        if "key-secret" not in given:
            raise UsageError("Parameter 'encrypt.key-secret' is required for cipher")
        find(given["secrets"], str(given["key-secret"]))
    return NewEncryption(methods[kind], given)


def amend_encryption(image: Qcow2, options: Mapping[str, Any], force: bool) -> Procedure:
    """Add or erase key slots; see :func:`diskwright.formats.luks1_slots.amend`."""
    assert image.luks is not None
    given = {key.removeprefix(PREFIX): value for key, value in options.items()
             if key.startswith(PREFIX)}
    place = Place(SLOT, place_of(image.header)[0])
    secrets = image.options.get("secrets")
    image.luks = yield from amend(image.luks, place, image.key, given, secrets, force)
