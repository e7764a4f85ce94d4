"""Names of disks: file names with protocols, ``json:`` objects, option strings.

Inside, a disk is described by one thing: a nested dict of options, where a child stands under its
slot as a dict of its own (or as a string, the name of a node that is there already) and numbered
keys are lists.  File names stay ``str`` with surrogates for bytes that are not UTF-8.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ..errors import UsageError
from ..hints import Any

Options = dict[str, Any]
Reference = str | Mapping[str, Any]

_DEPTH = 64
"""Deepest nesting of a description that is taken."""


def protocol_of(name: str) -> str:
    """The protocol that ``name`` selects: what stands before a ``:`` that comes before any
    ``/``; empty for a plain path."""
    for i, char in enumerate(name):
        if char == "/":
            return ""
        if char == ":":
            return name[:i]
    return ""


def foreign(name: str) -> bool:
    """True for a name that only Windows can follow: by drive, share, volume or device."""
    drive = name[:1].isascii() and name[:1].isalpha() and name[1:2] == ":"
    return name.startswith(("\\\\", "//?/", "//./")) or (drive and name[2:3] in ("", "\\", "/"))


def is_json(name: str) -> bool:
    """True for the pseudo-protocol ``json:``."""
    return name.startswith("json:")


def parse(reference: Reference) -> tuple[Options, bool]:
    """The options that ``reference`` stands for.

    The second value is True for a file name: it describes a protocol, on which a format is still
    to be laid; ``json:`` and option dicts describe the disk itself.
    """
    if not isinstance(reference, str):
        return nest(flatten(reference)), False
    if is_json(reference):
        return parse_json(reference[5:]), False
    return from_filename(reference), True


def from_filename(name: str) -> Options:
    """The options of the protocol that a file name selects (``json:`` is its object)."""
    if is_json(name):
        return parse_json(name[5:])
    if not name:
        raise UsageError("The 'file' block driver requires a file name")
    check_path(name)
    protocol = protocol_of(name)
    rest = name[len(protocol) + 1 :]
    if protocol in ("", "file"):
        path = rest if protocol else name
        return {"driver": "file", "filename": check_path(path)}
    if protocol == "blkdebug":
        config, colon, image = rest.partition(":")
        if not colon:
            raise UsageError("blkdebug requires both config file and image path")
        options: Options = {"driver": "blkdebug", "image": from_filename(image)}
        if config:
            options["config"] = config
        return options
    if protocol in ("null-co", "null-aio"):
        if rest != "//":
            raise UsageError(f"The only allowed filename for this driver is '{protocol}://'")
        return {"driver": protocol}
    if protocol.startswith("nbd"):
        from ..wire import nbd_uri

        if protocol in nbd_uri.SCHEMES:
            return {"driver": "nbd", **nbd_uri.parse(name)}
    from .registry import known

    if not known(protocol):
        raise UsageError(f"Unknown protocol '{protocol}'")
    return {"driver": protocol, "filename": name}


def check_path(name: Any) -> str:
    """``name`` if it can be a file's; raises UsageError otherwise."""
    try:
        if isinstance(name, str) and name and b"\0" not in os.fsencode(name):
            return name
    except UnicodeError:  # half a surrogate pair, which no file system can mean
        pass
    raise UsageError(f"{name!r} cannot be the name of a file")


def parse_json(text: str) -> Options:
    """The object of a ``json:`` name; its keys may be dotted, nested or both.

    Strings may stand in single quotes, as qemu's tools take them.
    """
    from ..wire.qjson import JsonError, loads

    try:
        value = loads(text)
    except JsonError as error:
        raise UsageError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("Invalid JSON object given")
    return nest(flatten(value))


def parse_image_opts(text: str) -> Options:
    """Options as one string: ``driver=qcow2,file.driver=file,file.filename=x``.

    A comma in a value is written twice.  A word without ``=`` switches an option on, with ``no``
    before it off.
    """
    flat: Options = {}
    for i, (key, value) in enumerate(pairs(text)):
        if not key:
            raise UsageError(f"Expected parameter name in '{text}'")
        if value is None:
            if i == 0:
                raise UsageError(f"Cannot find device='{key}' nor node-name='{key}'")
            if key.startswith("no") and len(key) > 2:
                key, value = key[2:], "off"
            else:
                value = "on"
        flat[key] = value
    return nest(flat)


def pairs(text: str) -> Iterator[tuple[str, str | None]]:
    """``key=value`` parts between commas; None for a part without ``=``."""
    position = 0
    while position < len(text):
        equals = text.find("=", position)
        comma = text.find(",", position)
        if equals < 0 or 0 <= comma < equals:
            end = comma if comma >= 0 else len(text)
            yield text[position:end], None
            position = end + 1
            continue
        key = text[position:equals]
        value = []
        position = equals + 1
        while position < len(text):
            comma = text.find(",", position)
            if comma < 0:
                comma = len(text)
            value.append(text[position:comma])
            position = comma + 1
            if text[position : position + 1] != ",":
                break
            value.append(",")
            position += 1
        yield key, "".join(value)


def flatten(options: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Options:
    """Dotted keys only: ``{"file": {"driver": "file"}}`` becomes ``{"file.driver": "file"}``."""
    if depth > _DEPTH:
        raise UsageError("The options are nested too deeply")
    flat: Options = {}
    for key, value in options.items():
        if isinstance(value, (list, tuple)):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}.", depth + 1))
        else:
            flat[prefix + str(key)] = {} if isinstance(value, Mapping) else value
    return flat


# Options that have a value and parts of their own; the value then has the empty name.
_ALSO_PLAIN = frozenset({"overlap-check"})


def nest(flat: Mapping[str, Any]) -> Options:
    """The reverse of :func:`flatten`; numbered keys that count from 0 become lists."""
    nested: Options = {}
    for key, value in flat.items():
        parts = key.split(".")
        if len(parts) > _DEPTH:
            raise UsageError("The options are nested too deeply")
        inner = nested
        for part in parts[:-1]:
            if part in _ALSO_PLAIN and isinstance(inner.get(part), str):
                inner[part] = {"": inner[part]}
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise UsageError(f"'{key}' conflicts with the value given for '{part}'")
        if isinstance(inner.get(parts[-1]), dict):
            if parts[-1] in _ALSO_PLAIN:
                inner[parts[-1]][""] = value
                continue
            raise UsageError(f"'{key}' conflicts with its own parts")
        inner[parts[-1]] = value
    return {key: _lists(value) for key, value in nested.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(part) for key, part in value.items()}
    if inner and list(inner) == [str(i) for i in range(len(inner))]:
        return list(inner.values())
    return inner


def merged(options: Options, explicit: Mapping[str, Any] | None) -> Options:
    """``options`` with ``explicit`` ones (dotted or nested) winning over them."""
    return nest({**flatten(options), **flatten(explicit)}) if explicit else options


def directory_of(name: str) -> str:
    """What a relative name beside ``name`` starts with: up to the last ``/``, or the protocol."""
    slash = name.rfind("/")
    if slash >= 0:
        return name[: slash + 1]
    protocol = protocol_of(name)
    return name[: len(protocol) + 1] if protocol else ""


def resolve(base: str, name: str) -> str:
    """``name`` as the image ``base`` means it: absolute paths (Windows ones too) and names with a
    protocol as they are, others in the directory of ``base`` (neither is normalised: symbolic links
    count)."""
    if name.startswith("/") or foreign(name) or protocol_of(name):
        return name
    return directory_of(base) + name


def identity(options: Options) -> str:
    """What makes a layer of a chain the same as another: its file."""
    if options.get("driver") == "file" and "filename" in options:
        return file_identity(str(options["filename"]))
    return repr(sorted(flatten(options).items(), key=lambda item: item[0]))


def file_identity(name: str) -> str:
    """What is the same for all names of one file."""
    try:
        found = os.stat(name)
    except (OSError, ValueError):
        return name
    return f"{found.st_dev}:{found.st_ino}"
