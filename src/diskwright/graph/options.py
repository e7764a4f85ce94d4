"""Options of drivers: checked against their declaration, and those that every node has."""

from __future__ import annotations

from collections.abc import Mapping

from ..declare import Driver, Option
from ..errors import UsageError
from ..hints import Any
from ..records import NamedTuple
from .names import Options, flatten
from .registry import kind

CACHE_MODES = {
    # mode: (direct, no-flush, writethrough)
    "writeback": (False, False, False),
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writethrough": (False, False, True),
    "unsafe": (False, True, False),
}

FILES = ("data-file", "header")
"""Options that are a node each, beside those that every format has."""
NUMBERED = {"extents": "extent."}
"""Options that are lists of nodes, and how the slots begin that these fill."""

COMMON = ("cache", "auto-read-only", "read-only", "force-share", "discard", "detect-zeroes")
"""The options that every node has, beside its name."""

_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_TRUE = (True, "on", "yes", "true", "y")
_FALSE = (False, "off", "no", "false", "n")


class Mode(NamedTuple):
    """How a node is opened; children inherit it."""

    writable: bool = False
    direct: bool = False
    no_flush: bool = False
    discard: str = "ignore"
    force_share: bool = False
    detect_zeroes: str = "off"
    writethrough: bool = False
    within: tuple[str, ...] = ()
    """Folders that the files must be below, as an image named them; empty: anywhere."""
    auto_read_only: bool = False
    """Open a file for writing only while somebody writes."""
    exact: bool = False
    """For a program that goes on with single nodes: each does what its own options say, and is
    refused where it cannot."""
    said: Mapping[str, Any] = {}
    """The options among :data:`COMMON` that the node was given itself."""

    @property
    def cache(self) -> str:
        """The mode of the caches of a file, by its name."""
        return "unsafe" if self.no_flush else "none" if self.direct else "writeback"

    def below(self) -> Mode:
        """What the children of a node in this mode inherit."""
        discard = "unmap" if self.exact else self.discard  # formats ask for it where they may
        return self._replace(detect_zeroes="off", writethrough=False, discard=discard)


def mode_of(cache: str, **named: Any) -> Mode:
    """The mode for a cache mode's name (:data:`CACHE_MODES`)."""
    if cache not in CACHE_MODES:
        raise UsageError(f"Invalid cache option: {cache}")
    direct, no_flush, writethrough = CACHE_MODES[cache]
    return Mode(direct=direct, no_flush=no_flush, writethrough=writethrough, **named)


def take_common(options: Options, mode: Mode) -> tuple[Mode, str]:
    """Take the options that every node has out of ``options``.

    Returns the node's mode (``mode`` where nothing is said) and its name, empty when not given.
    """
    name = options.pop("node-name", "")
    mode = mode._replace(said={key: options[key] for key in COMMON if key in options})
    cache = options.pop("cache", None) or {}
    if not isinstance(cache, dict) or cache.keys() - {"direct", "no-flush", "writeback"}:
        raise UsageError("'cache' takes 'direct', 'no-flush' and 'writeback'")
    if "direct" in cache:
        mode = mode._replace(direct=boolean("cache.direct", cache["direct"]))
    if "no-flush" in cache:
        mode = mode._replace(no_flush=boolean("cache.no-flush", cache["no-flush"]))
    if "writeback" in cache:
        mode = mode._replace(writethrough=not boolean("cache.writeback", cache["writeback"]))
    if "auto-read-only" in options:
        auto = boolean("auto-read-only", options.pop("auto-read-only"))
        mode = mode._replace(auto_read_only=auto)
    if "read-only" in options:
        wanted = not boolean("read-only", options.pop("read-only"))
        mode = mode._replace(writable=wanted if mode.exact else wanted and mode.writable)
    if "force-share" in options:
        mode = mode._replace(force_share=boolean("force-share", options.pop("force-share")))
    if "discard" in options:
        mode = mode._replace(discard=discard_mode(options.pop("discard")))
    if "detect-zeroes" in options:
        mode = mode._replace(detect_zeroes=str(options.pop("detect-zeroes")))
    if mode.detect_zeroes not in ("off", "on", "unmap"):
        raise UsageError(f"Invalid parameter '{mode.detect_zeroes}'")
    if mode.detect_zeroes == "unmap" and mode.discard != "unmap":
        raise UsageError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to "
            "unmap"
        )
    return mode, str(name)


def take_children(options: Options) -> dict[str, Any]:
    """Take the options that stand for other nodes (beside ``file`` and ``backing``) out of
    ``options``, by slot: ``extents.3`` is slot ``extent.3``."""
    found: dict[str, Any] = {}
    for slot in FILES:
        if isinstance(options.get(slot), dict | str):
            found[slot] = options.pop(slot)
    for option, prefix in NUMBERED.items():
        value = options.get(option)
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            continue
        for number in value:
            if not str(number).isdecimal() or len(str(number)) > 9:
                raise UsageError(f"'{option}' is a list: '{option}.{number}' is not in it")
        found.update({f"{prefix}{int(number)}": child for number, child in value.items()})
        del options[option]
    return found


def numbered(option: str) -> bool:
    """True for an option that fills one slot of many, ``extents.3``."""
    return option.partition(".")[0] in NUMBERED


def child_option(slot: str) -> str:
    """The option that fills ``slot``; see :func:`take_children`."""
    for option, prefix in NUMBERED.items():
        if slot.startswith(prefix):
            return f"{option}.{slot[len(prefix) :]}"
    return slot


def lacks_file(options: Options) -> bool:
    """True when a backing file's options say how to open it, but not which file it is."""
    if "file" in options or "filename" in options:
        return False
    driver = options.get("driver")
    return driver is None or kind(str(driver)) == "format"


def discard_mode(value: Any) -> str:
    """``unmap`` or ``ignore``, from the words that qemu takes."""
    words = {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"}
    if value not in words:
        raise UsageError("Invalid discard option")
    return words[value]


def boolean(name: str, value: Any) -> bool:
    """An on/off option."""
    if (value in _TRUE and not isinstance(value, int | float)) or value is True:
        return True
    if (value in _FALSE and not isinstance(value, int | float)) or value is False:
        return False
    raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")


def size(name: str, value: Any) -> int:
    """A size in bytes: a number, or text with a suffix of 1024's powers (k, M, G, T, P, E)."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value
    import re

    text = "" if isinstance(value, float) else str(value).lower()
    if re.fullmatch(r"-[0-9]+", text):
        raise UsageError(f"Value '{value}' is out of range for parameter '{name}'")
    match = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)([bkmgtpe]?)", text)
    if match is not None:
        digits, suffix = match.groups()
        scale = 1 << _SUFFIXES[suffix]
        found = (
            int(float(digits) * scale)
            if "." in digits
            else int(digits, 16 if digits.startswith("0x") else 10) * scale
        )
        if found < 1 << 64:
            return found
    raise UsageError(
        f"Parameter '{name}' expects a non-negative number below 2^64\n"
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
        "and exabytes, respectively."
    )


def checked(driver: Driver, options: Mapping[str, Any]) -> Options:
    """``options`` converted to the types that ``driver`` declares.

    Raises UsageError for an option that it does not have.  A declared option that holds a dict or
    a list is passed on as it is.
    """
    declared = {option.name: option for option in driver.options}
    out: Options = {}
    for key, value in options.items():
        if key in declared:
            plain = not isinstance(value, dict | list)
            out[key] = convert(declared[key], value) if plain else value
            continue
        inner = flatten({key: value})
        for name, part in inner.items():
            if name not in declared:
                word = "format" if driver.kind == "format" else "protocol"
                verb = "does not" if driver.kind == "format" else "doesn't"
                raise UsageError(f"Block {word} '{driver.name}' {verb} support the option '{name}'")
            out[name] = convert(declared[name], part)
    return out


def convert(option: Option, value: Any) -> Any:
    """One value in the type that its declaration gives."""
    if option.type == "object":
        return value
    if option.type == "bool":
        return boolean(option.name, value)
    if option.type == "size":
        return size(option.name, value)
    if option.type == "int":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        try:
            return int(str(value), 0)
        except ValueError:
            raise UsageError(f"Parameter '{option.name}' expects a number") from None
    if not isinstance(value, str):
        raise UsageError(f"Parameter '{option.name}' expects a string")
    if option.choices and value not in option.choices:
        raise UsageError(f"Invalid parameter '{value}' for '{option.name}'")
    return value
