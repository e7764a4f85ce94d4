"""What a caller says of an image whose header does not say it, or not rightly."""

from __future__ import annotations

from collections.abc import Mapping

from ....errors import UsageError
from ....hints import Any
from ....records import NamedTuple
from ....units import is_power_of_two
from .. import header as hd

_VERSIONS = {"v2": 2, "0.10": 2, "v3": 3, "1.1": 3}
_METHODS = {"none": 0, "aes": 1, "luks": 2}


class Assumed(NamedTuple):
    """Each None where nothing was said."""

    bits: int | None
    size: int | None
    version: int | None
    zstd: bool | None
    extended: bool | None
    external: bool | None
    method: int | None
    """Of the encryption, as in the header."""

    def contradicts(self, h: hd.Header) -> bool:
        """True when ``h`` is of another geometry, so that nothing in it can be believed."""
        extended = bool(h.incompatible & hd.EXTENDED_L2)
        return self.bits not in (None, h.cluster_bits) or self.extended not in (None, extended)

    def into(self, h: hd.Header) -> None:
        """Put it into a header."""
        if self.bits is not None:
            h.cluster_bits = self.bits
        if self.size is not None:
            h.size = self.size
            h.l1_size = max(h.l1_size, hd.l1_bytes(h, h.size) // 8)
        if self.version is not None:
            h.version = self.version
        if self.method is not None:
            h.crypt_method = self.method
        for flag, value in (
            (hd.EXTENDED_L2, self.extended),
            (hd.DATA_FILE, self.external),
            (hd.COMPRESSION, self.zstd),
        ):
            if value is not None:
                h.incompatible = h.incompatible | flag if value else h.incompatible & ~flag
        if self.zstd is not None:
            h.tail = bytes([self.zstd]) + (h.tail[1:] or bytes(7))


def assumed(options: Mapping[str, Any]) -> Assumed:
    """From the options of the format.  Raises UsageError."""
    given: Mapping[str, Any] = options.get("assumed") or {}
    bits = version = None
    if (size := given.get("cluster_size")) is not None:
        if not is_power_of_two(size) or not 512 <= size <= 2 << 20:
            raise UsageError("Cluster size must be a power of two between 512 and 2048k")
        bits = size.bit_length() - 1
    if (word := given.get("compat")) is not None:
        if word not in _VERSIONS:
            raise UsageError(f"Invalid compatibility level: '{word}'")
        version = _VERSIONS[word]
    kind = given.get("encrypt.format", options.get("encrypt.format"))
    if kind is not None and kind not in _METHODS:
        raise UsageError(f"Parameter 'encrypt.format' does not accept value '{kind}'")
    zstd = given.get("compression_type")
    return Assumed(
        bits,
        given.get("size"),
        version,
        None if zstd is None else zstd == "zstd",
        given.get("extended_l2"),
        True if options.get("data-file") is not None else None,
        None if kind is None else _METHODS[kind],
    )
