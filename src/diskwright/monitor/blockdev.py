"""The options of nodes as QAPI has them, made from what the drivers declare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from ..declare import Option
from ..graph import registry
from .addresses import ADDRESSES
from .types import BOOL, INT, NULL, STR, Alternate, Enum, Member, Struct, Type, Union

DRIVERS = (
    "blkdebug", "compress", "file", "host_device", "luks", "memory", "nbd", "null-aio", "null-co",
    "qcow2", "raw", "vhdx", "vmdk",
)  # fmt: skip
"""Those that a command can open: all but the one that needs an object of Python's."""

_COMMON = (
    Member("node-name", STR, True),
    Member("discard", Enum("ignore", "unmap"), True),
    Member("cache", Struct((Member("direct", BOOL, True), Member("no-flush", BOOL, True))), True),
    Member("read-only", BOOL, True),
    Member("auto-read-only", BOOL, True),
    Member("force-share", BOOL, True),
    Member("detect-zeroes", Enum("off", "on", "unmap"), True),
)
_REQUIRED = ("filename",)
_TYPES: dict[str, Type] = {"str": STR, "int": INT, "size": INT, "bool": BOOL}
# blkdebug's rules are given by a file of them, and where an NBD server is by `server`.
_LEFT_OUT = ("inject-error", "set-state", "host", "path", "port")


def _options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    return "driver", (Member("driver", Enum(*DRIVERS)), *_COMMON), _Variants()


class _Variants(Mapping[str, Struct]):
    """The options of each driver, made when they are asked for: its module declares them."""

    def __init__(self) -> None:
        self._made: dict[str, Struct] = {}

    def __getitem__(self, name: str) -> Struct:
        if name not in self._made:
            if name not in DRIVERS:
                raise KeyError(name)
            self._made[name] = Struct(tuple(_members(name)))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(DRIVERS)

    def __len__(self) -> int:
        return len(DRIVERS)


OPTIONS = Union(_options)
REF = Alternate("BlockdevRef", OPTIONS, STR)
REF_OR_NULL = Alternate("BlockdevRefOrNull", OPTIONS, STR, NULL)

_OVERLAPS = (
    "main-header", "active-l1", "active-l2", "refcount-table", "refcount-block",
    "snapshot-table", "inactive-l1", "inactive-l2", "bitmap-directory",
)  # fmt: skip


@cache
def _special() -> dict[str, dict[str, Member]]:
    """What a declaration does not say: which options are nodes, and the two that are more than a
    word."""
    mode = Enum("none", "constant", "cached", "all")
    flags = (Member("template", mode, True), *(Member(name, BOOL, True) for name in _OVERLAPS))
    key = Struct((Member("key-secret", STR, True),))
    crypto = Union(
        lambda: ("format", (Member("format", Enum("aes", "luks")),), {"aes": key, "luks": key})
    )
    server = Union(lambda: ("type", (Member("type", Enum(*ADDRESSES)),), ADDRESSES))
    file, backing = Member("file", REF), Member("backing", REF_OR_NULL, True)
    return {
        "blkdebug": {"image": Member("image", REF)},
        "compress": {"file": file},
        "nbd": {"server": Member("server", server)},
        "luks": {"file": file, "header": Member("header", REF, True)},
        "raw": {"file": file},
        "vhdx": {"file": file, "backing": backing},
        "vmdk": {"file": file, "backing": backing},
        "qcow2": {
            "file": file,
            "backing": backing,
            "data-file": Member("data-file", REF, True),
            "encrypt": Member("encrypt", crypto, True),
            "overlap-check": Member(
                "overlap-check", Alternate("Qcow2OverlapChecks", Struct(flags), mode), True
            ),
        },
    }


def _members(driver: str) -> list[Member]:
    found = dict(_special().get(driver, {}))
    common = {member.name for member in _COMMON}
    for option in registry.driver(driver).options:
        outer = option.name.partition(".")[0]
        if outer not in found and outer not in common and option.name not in _LEFT_OUT:
            found[option.name] = Member(option.name, _type(option), option.name not in _REQUIRED)
    return list(found.values())


def _type(option: Option) -> Type:
    if option.type == "enum":
        return Enum(*option.choices)
    return _TYPES[option.type]
