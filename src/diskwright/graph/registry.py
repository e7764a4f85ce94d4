"""Drivers by name; each is imported when it is first asked for, and no other with it."""

from __future__ import annotations

import importlib

from ..declare import Driver
from ..errors import NotSupported, UsageError
from ..hints import TYPE_CHECKING
from ..records import NamedTuple
from .probe import SIGNATURES

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "diskwright.drivers"
"""The entry-point group where other packages offer drivers: the name of an entry is the driver's
name, and it loads to a :class:`~diskwright.declare.Driver`."""


class Entry(NamedTuple):
    """Where a built-in driver lives: its ``kind`` is known without importing ``module``."""

    kind: str
    module: str


BUILTIN: dict[str, Entry] = {
    "raw": Entry("format", "diskwright.formats.raw"),
    "qcow2": Entry("format", "diskwright.formats.qcow2"),
    "luks": Entry("format", "diskwright.formats.luks"),
    "vhdx": Entry("format", "diskwright.formats.vhdx"),
    "vmdk": Entry("format", "diskwright.formats.vmdk"),
    "file": Entry("protocol", "diskwright.protocols.file"),
    "host_device": Entry("protocol", "diskwright.protocols.file"),
    "file-object": Entry("protocol", "diskwright.protocols.fileobject"),
    "memory": Entry("protocol", "diskwright.protocols.memory"),
    "nbd": Entry("protocol", "diskwright.protocols.nbd"),
    "null-co": Entry("protocol", "diskwright.protocols.null"),
    "null-aio": Entry("protocol", "diskwright.protocols.null"),
    "blkdebug": Entry("filter", "diskwright.filters.blkdebug"),
    "compress": Entry("filter", "diskwright.filters.compress"),
}

_loaded: dict[str, Driver] = {}


def driver(name: str) -> Driver:
    """The driver called ``name``.

    Other packages' entry points are looked up only for a name that is not built in: reading the
    metadata of everything installed takes tens of milliseconds.  Raises UsageError for a name
    that nobody offers, NotSupported for a format that is known but has no driver.
    """
    found = _loaded.get(name)
    if found is None:
        entry = BUILTIN.get(name)
        found = _from_module(name, entry.module) if entry is not None else _third_party(name)
        if found is None:
            if any(name == signature.name for signature in SIGNATURES):
                raise NotSupported(f"The image format '{name}' is not supported by this version")
            raise UsageError(f"Unknown driver '{name}'")
        _loaded[name] = found
    return found


def register(found: Driver) -> None:
    """Make a driver known to this process under its own name (tests, embedding programs)."""
    _loaded[found.name] = found


def forget(name: str) -> None:
    """Take back :func:`register`."""
    _loaded.pop(name, None)


def known(name: str) -> bool:
    """True when some driver has this name."""
    if name in BUILTIN or name in _loaded:
        return True
    return any(point.name == name for point in _points())


def kind(name: str) -> str:
    """``format``, ``protocol`` or ``filter``, without importing a built-in driver."""
    entry = BUILTIN.get(name)
    if entry is not None and name not in _loaded:
        return entry.kind
    return driver(name).kind


def names(kind: str | None = None) -> list[str]:
    """All names of a kind (or all) in alphabetical order, other packages' and the registered ones
    included; imports no built-in driver."""
    found = {name for name, entry in BUILTIN.items() if kind in (None, entry.kind)}
    found.update(name for name, drv in _loaded.items() if kind in (None, drv.kind))
    for point in _points():
        other = driver(point.name) if point.name not in BUILTIN else None
        if other is not None and kind in (None, other.kind):
            found.add(point.name)
    return sorted(found)


def _from_module(name: str, module: str) -> Driver:
    loaded = importlib.import_module(module)
    several: dict[str, Driver] = getattr(loaded, "DRIVERS", {})
    found: Driver = several.get(name) or loaded.DRIVER
    return found if found.name == name else found._replace(name=name)


def _points() -> list[EntryPoint]:
    from importlib.metadata import entry_points

    return list(entry_points(group=ENTRY_POINTS))


def _third_party(name: str) -> Driver | None:
    for point in _points():
        if point.name == name:
            found = point.load()
            if not isinstance(found, Driver):
                raise UsageError(f"The entry point '{name}' of {ENTRY_POINTS} is not a driver")
            return found
    return None
