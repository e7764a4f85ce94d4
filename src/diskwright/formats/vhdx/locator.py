"""The parent locator: where a differencing image says that its parent is (MS-VHDX 2.6.2.6).

A path relative to the image is written wherever there is one.  What the caller typed as an
absolute path stands in ``absolute_win32_path`` as it was typed, a POSIX path too: readers that
look there first find it, the order of the specification tries the relative path before it, and an
own key would leave an image without any of the three that the specification asks for.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from ...errors import MalformedImage, UnsupportedFeature, UsageError
from ...ondisk import Fields
from ...records import NamedTuple

VHDX_TYPE = bytes.fromhex("b7ef4ab09ed1814ab78925b8e9445913")
"""Locator type {B04AEFB7-D19E-4A81-B789-25B8E9445913} as it is stored."""

MOST_BYTES = 1 << 20
"""Largest metadata item (2.6.1.2)."""

LINKAGE, LINKAGE2 = "parent_linkage", "parent_linkage2"
RELATIVE, VOLUME, ABSOLUTE = "relative_path", "volume_path", "absolute_win32_path"
PATHS = (RELATIVE, VOLUME, ABSOLUTE)
"""The keys of paths in the order in which they are tried (2.6.2.6.3)."""

HEADER = Fields("<", "LocatorType:16s Reserved:H KeyValueCount:H")
ENTRY = Fields("<", "KeyOffset:I ValueOffset:I KeyLength:H ValueLength:H")
_FIELD = "parent locator"


class Locator(NamedTuple):
    """A locator item: its type (a stored GUID) and its entries in their order.

    Values are kept as they are stored (UTF-16LE), so that keys of others survive a rewrite.
    """

    kind: bytes
    entries: tuple[tuple[str, bytes], ...]

    def raw(self, key: str) -> bytes | None:
        """The stored value of ``key``."""
        return next((value for name, value in self.entries if name == key), None)

    def text(self, key: str) -> str | None:
        """The value of ``key``.  Raises MalformedImage where it is no text that a name can be."""
        raw = self.raw(key)
        if raw is None:
            return None
        text = _decoded(raw, key).rstrip("\0")  # some writers count a terminator
        if "\0" in text:
            raise MalformedImage(f"the value of '{key}' has a NUL in it", field=_FIELD)
        return text or None

    @property
    def linkages(self) -> tuple[str, ...]:
        """What the parent's DataWriteGuid may be, in lower case with braces."""
        found = [self.text(key) for key in (LINKAGE, LINKAGE2)]
        return tuple(text.lower() for text in found if text)

    @property
    def names(self) -> tuple[str, ...]:
        """The parent's names in the order in which they are to be tried.

        The relative one has slashes, and no ``./`` unless a colon asks for it; the others are as
        they are stored, and mean something only where ``C:`` and volume names do, unless they
        begin with ``/``.
        """
        found: list[str] = []
        for key in PATHS:
            text = self.text(key)
            if text is None:
                continue
            name = _from_windows(text) if key == RELATIVE else text
            if name and name not in found:
                found.append(name)
        return tuple(found)


def parse(data: bytes) -> Locator:
    """Decode a locator item.

    Raises MalformedImage for fields that leave the item, for keys that are there twice, and for
    entries that together are longer than an item can be; UnsupportedFeature for a locator of
    another type.
    """
    if not HEADER.size <= len(data) <= MOST_BYTES:
        raise MalformedImage(f"the item has {len(data)} bytes", field=_FIELD)
    kind, _, count = HEADER.unpack_from(data)
    if kind != VHDX_TYPE:
        raise UnsupportedFeature("a parent that is no VHDX file (parent locator type)")
    table = HEADER.size + count * ENTRY.size
    if table > len(data):
        raise MalformedImage(f"{count} entries do not fit into the item", field=_FIELD)
    entries: dict[str, bytes] = {}
    weight = 0
    for number in range(count):
        key_at, value_at, key_length, value_length = ENTRY.unpack_from(
            data, HEADER.size + number * ENTRY.size
        )
        if not key_length or min(key_at, value_at) < HEADER.size:
            raise MalformedImage(f"entry {number} has no key or no place", field=_FIELD)
        if max(key_at + key_length, value_at + value_length) > len(data):
            raise MalformedImage(f"entry {number} leaves the item", field=_FIELD)
        # Entries may lie over each other, so their number says nothing about their sum.
        weight += key_length + value_length
        if weight > MOST_BYTES:
            raise MalformedImage("the entries are longer than the item", field=_FIELD)
        key = _decoded(data[key_at : key_at + key_length], f"key {number}").rstrip("\0")
        if key in entries:
            raise MalformedImage(f"the key '{key}' is there twice", field=_FIELD)
        entries[key] = data[value_at : value_at + value_length]
    return Locator(kind, tuple(entries.items()))


def encode(locator: Locator) -> bytes:
    """The item's bytes.  Raises UsageError when a value or the whole is too long."""
    at = HEADER.size + len(locator.entries) * ENTRY.size
    table, strings = [], []
    for key, value in locator.entries:
        name = key.encode("utf-16-le", "surrogatepass")
        if len(name) > 0xFFFF or len(value) > 0xFFFF:
            raise UsageError("The parent's name is too long for a parent locator")
        table.append(ENTRY.pack(at, at + len(name), len(name), len(value)))
        strings += [name, value]
        at += len(name) + len(value)
    if at > MOST_BYTES or len(locator.entries) > 0xFFFF:
        raise UsageError("The parent's names are too long for a parent locator")
    return b"".join([HEADER.pack(locator.kind, 0, len(locator.entries)), *table, *strings])


def locate(
    name: str,
    identities: Sequence[str],
    file_name: str | None = None,
    old: Locator | None = None,
) -> Locator:
    """A locator for the parent ``name``, as the caller typed it: relative to the image, absolute,
    or as Windows writes it.

    The parent's DataWriteGuid, in braces, is one of ``identities`` (at most two); ``file_name`` is
    the image's own path.
    Entries of ``old`` that name no parent stay.  Raises UsageError for a name that cannot be
    stored.
    """
    paths = _paths(name, file_name)
    if not paths:
        raise UsageError(f"'{name}' cannot be the name of a parent")
    linkages = zip((LINKAGE, LINKAGE2), identities, strict=False)
    given = {key: identity.lower() for key, identity in linkages} | paths
    entries = [(key, _encoded(value)) for key, value in given.items()]
    if old is not None and old.kind == VHDX_TYPE:
        ours = (LINKAGE, LINKAGE2, *PATHS)
        entries += [(key, value) for key, value in old.entries if key not in ours]
    return Locator(VHDX_TYPE, tuple(entries))


def _paths(name: str, file_name: str | None) -> dict[str, str]:
    """The paths to store for ``name``, in the order in which they are tried."""
    if not name or "\0" in name:
        return {}
    if name.startswith("\\\\?\\Volume{"):
        return {VOLUME: name}
    if name.startswith("\\\\") or name[1:3] in (":\\", ":/"):
        return {ABSOLUTE: name}
    if name.startswith("/"):
        relative = _relative(name, file_name)
        return {RELATIVE: relative, ABSOLUTE: name} if relative else {ABSOLUTE: name}
    if _has_protocol(name):
        return {ABSOLUTE: name}
    if "\\" in name and "/" not in name:
        return {RELATIVE: name}
    relative = _to_windows(name)
    return {RELATIVE: relative} if relative else {}


def _relative(name: str, file_name: str | None) -> str | None:
    """The way from the image's directory to ``name``, where both are absolute."""
    if not file_name or not file_name.startswith("/"):
        return None
    return _to_windows(posixpath.relpath(name, posixpath.dirname(file_name)))


def _to_windows(name: str) -> str | None:
    """A relative path as it is stored; None for one that has a backslash in a name."""
    if "\\" in name:
        return None
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return (name if name.startswith("../") else f"./{name}").replace("/", "\\") if name else None


def _from_windows(text: str) -> str:
    name = text.replace("\\", "/")
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    # What stands before a colon would be read as a protocol.
    return f"./{name}" if _has_protocol(name) else name


def _has_protocol(name: str) -> bool:
    return ":" in name.partition("/")[0]


def _decoded(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise MalformedImage(f"'{what}' is no UTF-16 text", field=_FIELD) from error


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-16-le")
    except UnicodeEncodeError as error:
        # Bytes of a POSIX name that are not UTF-8: the format has no way to say them.
        raise UsageError("The parent's name is no Unicode text") from error
