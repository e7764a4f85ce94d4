"""Ciphers of disks by the names that headers and options give them, and as transforms of extents.

The names are those of Linux's dm-crypt, as LUKS1 headers have them: ``aes`` and ``xts-plain64``,
``cbc-essiv:sha256``.
"""

from __future__ import annotations

import hashlib

from ..abilities import Buffer, Places
from ..codecs.aes import KEY_BYTES, SECTOR, Cbc, Essiv, Plain, Runs, Vectors
from ..errors import UnsupportedFeature, UsageError
from ..hints import Protocol
from ..records import NamedTuple

HASHES = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
"""Hashes that LUKS1 headers may name; the last one only where the system's library has it."""
MODES = ("xts", "cbc")
VECTORS = ("plain", "plain64", "essiv")
OTHER_CIPHERS = ("3des", "cast5", "des", "serpent", "sm4", "twofish")
"""Ciphers that disks of others have, and that are refused by name."""


class SectorCipher(Protocol):
    """Whole sectors of 512 bytes there and back."""

    def encrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """Fill ``into`` (which may be ``data``) with the sectors of ``runs``, which follow each
        other in ``data``, as they are stored."""

    def decrypt(self, runs: Runs, data: Buffer, into: memoryview) -> None:
        """The other way round."""


class Spec(NamedTuple):
    """A cipher with all that belongs to it but the key."""

    cipher: str
    mode: str
    vectors: str
    vectors_hash: str | None = None

    @property
    def text(self) -> str:
        """The mode as a header has it."""
        out = f"{self.mode}-{self.vectors}"
        return out if self.vectors_hash is None else f"{out}:{self.vectors_hash}"

    def algorithm(self, key_bytes: int) -> str:
        """The cipher with the length of its key: ``aes-256``."""
        bits = 8 * key_bytes // (2 if self.mode == "xts" else 1)
        return f"{self.cipher}-{bits}"

    def check(self, key_bytes: int) -> None:
        """Raise UnsupportedFeature by name for a cipher that cannot be used with such a key."""
        if self.cipher != "aes":
            raise UnsupportedFeature(f"cipher '{self.cipher}'")
        if self.mode not in MODES:
            raise UnsupportedFeature(f"cipher mode '{self.mode}'")
        if self.vectors not in VECTORS:
            raise UnsupportedFeature(f"IV generator '{self.vectors}'")
        if key_bytes not in [(2 if self.mode == "xts" else 1) * length for length in KEY_BYTES]:
            raise UnsupportedFeature(f"{self.cipher}-{self.mode} with {8 * key_bytes} bits of key")
        if self.vectors == "essiv":
            if self.vectors_hash is None:
                raise UnsupportedFeature("IV generator 'essiv' without a hash")
            length = digest_bytes(self.vectors_hash)
            if length not in KEY_BYTES:
                raise UsageError(f"No AES cipher with key size {length} available")

    def make(self, key: bytes) -> SectorCipher:
        """The cipher with its key.  Raises UnsupportedFeature."""
        self.check(len(key))
        vectors: Vectors
        if self.vectors == "essiv":
            assert self.vectors_hash is not None
            vectors = Essiv(hashlib.new(self.vectors_hash, key).digest())
        else:
            vectors = Plain(64 if self.vectors == "plain64" else 32)
        if self.mode == "cbc":
            return Cbc(key, vectors)
        from ..codecs.xts import Xts

        return Xts(key, vectors)


def parse_spec(cipher: str, text: str) -> Spec:
    """The spec that a header's two fields name (known or not)."""
    mode, _, rest = text.partition("-")
    vectors, colon, name = rest.partition(":")
    return Spec(cipher, mode, vectors, name if colon else None)


def spec_of(
    algorithm: str, mode: str, vectors: str, vectors_hash: str | None
) -> tuple[Spec, int]:
    """The spec that creation options name, and the bytes of the key.

    Raises UsageError for a value that does not exist, UnsupportedFeature for one that is not
    implemented.
    """
    cipher, _, bits = algorithm.rpartition("-")
    if (cipher or bits) in OTHER_CIPHERS:
        raise UnsupportedFeature(f"cipher '{algorithm}'")
    if cipher != "aes" or bits not in ("128", "192", "256"):
        raise UsageError(f"Parameter 'cipher-alg' does not accept value '{algorithm}'")
    if mode in ("ecb", "ctr"):
        raise UnsupportedFeature(f"cipher mode '{mode}'")
    if mode not in MODES:
        raise UsageError(f"Parameter 'cipher-mode' does not accept value '{mode}'")
    if vectors not in VECTORS:
        raise UsageError(f"Parameter 'ivgen-alg' does not accept value '{vectors}'")
    if vectors == "essiv" and vectors_hash is None:
        vectors_hash = "sha256"
    if vectors_hash is not None:
        check_hash("ivgen-hash-alg", vectors_hash)
    spec = Spec(cipher, mode, vectors, vectors_hash)
    key_bytes = int(bits) // 8 * (2 if mode == "xts" else 1)
    spec.check(key_bytes)
    return spec, key_bytes


def check_hash(option: str, name: str) -> None:
    """Raise UsageError for a hash that does not exist, UnsupportedFeature for one that this
    system does not have."""
    if name not in (*HASHES, "md5", "sm3"):
        raise UsageError(f"Parameter '{option}' does not accept value '{name}'")
    digest_bytes(name)


def digest_bytes(name: str) -> int:
    """The length of a hash's value.  Raises UnsupportedFeature by name."""
    if name in HASHES:
        try:
            return hashlib.new(name).digest_size
        except ValueError:
            pass
    raise UnsupportedFeature(f"hash '{name}'")


class SectorTransform:
    """The transform of extents and steps (see :class:`diskwright.abilities.Transform`).

    ``by_host``: sectors are counted from the start of the file, otherwise from that of the disk.
    """

    def __init__(self, cipher: SectorCipher, by_host: bool) -> None:
        self._cipher = cipher
        self._column = 1 if by_host else 0

    def decode(self, places: Places, data: Buffer, into: memoryview) -> None:
        """The guest's bytes."""
        self._cipher.decrypt(self._runs(places), data, into)

    def encode(self, places: Places, data: Buffer, into: memoryview) -> None:
        """The bytes for the file."""
        self._cipher.encrypt(self._runs(places), data, into)

    def _runs(self, places: Places) -> list[tuple[int, int]]:
        column = self._column
        return [(place[column] // SECTOR, place[2] // SECTOR) for place in places]
