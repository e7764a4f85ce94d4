"""Making new images, and the options for that."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from ..declare import Option
from ..engine.kernel import BaseDriver
from ..errors import DiskError, NotSupported, UsageError
from ..graph import registry
from ..graph.create import prepare, write_image
from ..graph.gate import Gate
from ..graph.names import parse
from ..hints import Any
from ..units import SECTOR, align_up

JOURNAL = ".resume"
"""What the journal of a conversion that can be resumed is called behind the name of its target."""

# Formats that QEMU, too, can only read: here they get its words.
_READ_ONLY = ("bochs", "cloop", "dmg")

# What `Formatting` lines show, in qemu-img's order (measured with 10.0).
_COMMON = (
    "cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat",
    "backing_file", "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits",
    "nocow", "extent_size_hint",
)  # fmt: skip
_KEYS = (
    "key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg",
    "iter-time",
)  # fmt: skip
_ENCRYPTION = ("encryption", "encrypt.format", *(f"encrypt.{name}" for name in _KEYS))
_OF_PROTOCOLS = ("nocow", "extent_size_hint", "preallocation")
_ORDER = {
    "luks": ("size", *_KEYS, "detached-header"),
    "qcow2": (*_ENCRYPTION, *_COMMON),
    "vhdx": ("size", "log_size", "block_size", "subformat", "block_state_zero"),
    "vmdk": (
        "size", "adapter_type", "backing_file", "backing_fmt", "compat6", "hwversion",
        "toolsversion", "subformat", "zeroed_grain",
    ),
}  # fmt: skip
# Options that are shown only where they were given, and what is shown where nothing was.
_ONLY_GIVEN = {"preallocation", "compat", *_ENCRYPTION}
_UNSAID = {
    "qcow2": {"extended_l2": "off"},
    "vhdx": {"log_size": "1048576", "block_size": "0"},
    "vmdk": {"compat6": "off", "hwversion": "undefined"},
}


def shown(fmt: str, complete: Mapping[str, Any], given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The options that the ``Formatting`` line of a new image shows.

    ``complete``: all of them; ``given``: those that the caller named.
    """
    unsaid = _UNSAID.get(fmt, {})
    names = _ORDER.get(fmt) or tuple(sorted(_COMMON, key="preallocation".__eq__))
    told = fmt == "qcow2" or fmt not in _ORDER  # there also defaults are shown
    if not told:
        rest = [name for name in complete if name not in names and name not in _OF_PROTOCOLS]
        names = (*names, *rest, *_OF_PROTOCOLS)
    out = []
    for name in names:
        value = complete.get(name)
        asked = name in given or name in ("size", "backing_file", "backing_fmt")
        if not (asked or (told and name not in _ONLY_GIVEN)):
            value = None
        if value is None:
            value = unsaid.get(name)
        if isinstance(value, bool):
            value = "on" if value else "off"
        if value is not None:
            out.append((name, str(value)))
    return out


def split_options(text: str) -> dict[str, str]:
    """``a=1,b=2`` as a dict; a comma in a value is written twice, a name alone means ``on``.

    Raises UsageError for an empty name.
    """
    out: dict[str, str] = {}
    for part in text.replace(",,", "\0").split(","):
        name, equals, value = part.replace("\0", ",").partition("=")
        if not name:
            raise UsageError(f"Invalid option list: {text}")
        out[name] = value if equals else "on"
    return out


def creatable(name: str) -> Any:
    """The declaration of the format ``name``, which must be able to make images.

    Raises UsageError.
    """
    try:
        found = registry.driver(name)
    except NotSupported as error:
        if name in _READ_ONLY:
            raise UsageError(f"Format driver '{name}' does not support image creation") from None
        raise UsageError(str(error)) from None
    except DiskError:
        raise UsageError(f"Unknown file format '{name}'") from None
    if found.create is None:
        raise UsageError(f"Format driver '{name}' does not support image creation")
    return found


def create_options(fmt: str, filename: str | None) -> tuple[Option, ...]:
    """The creation options of a format; with ``filename`` also those of its protocol."""
    options = {option.name: option for option in creatable(fmt).create_options}
    if filename is not None:
        protocol = registry.driver(str(parse(filename)[0]["driver"]))
        for option in protocol.create_options:
            if option.name not in options or options[option.name].own:
                options[option.name] = option
    return tuple(options.values())


async def create(
    driver: BaseDriver,
    filename: str,
    fmt: str,
    size: int | None,
    options: Mapping[str, Any],
    *,
    gate: Gate | None = None,
    look_at_backing: bool = True,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
    on_new: Callable[[str], None] | None = None,
    secrets: Mapping[str, bytes] | None = None,
    keep_journal: bool = False,
) -> tuple[str, ...]:
    """Make an image; returns the names of the other files that were made for it.

    ``on_ready`` is told the complete options before anything is written, ``on_new`` each file that
    was not there before.  Unless ``keep_journal``, a journal of how an older image of this name was
    converted is removed: what it says would be believed of the new one.  See
    :func:`diskwright.graph.create.create_image`.
    """
    found, given, beside = await prepare(
        driver, filename, fmt, size, options, gate=gate, check_backing=look_at_backing
    )
    if on_ready is not None:
        on_ready({**given, **beside})
    given["size"] = align_up(given["size"], SECTOR)
    path = str(parse(filename)[0].get("filename", ""))
    if not keep_journal and path and os.path.lexists(path + JOURNAL):
        from .journal import forget

        forget(path)
    return await write_image(
        driver, filename, found, given, beside, on_new, secrets=secrets
    )
