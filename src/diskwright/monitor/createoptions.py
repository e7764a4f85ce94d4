"""The options of ``blockdev-create`` as QAPI has them, made from what the drivers declare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..declare import Driver, Option
from ..graph import names, registry
from ..graph.create import create_options
from .blockdev import DRIVERS, REF
from .types import BOOL, INT, SIZE, STR, Array, Enum, Member, Struct, Type, Union

FORMATS = ("luks", "qcow2", "vhdx", "vmdk")
_TYPES: dict[str, Type] = {"str": STR, "int": INT, "size": SIZE, "bool": BOOL}
# Those that QAPI has under other names or as nodes, and those that it does not have.
_LEFT_OUT = (
    "size", "compat", "compat6", "data_file", "detached-header", "encryption", "parent",
)  # fmt: skip
_WORDS = {
    ("qcow2", "backing_fmt"): Enum(*DRIVERS),
    ("qcow2", "compression_type"): Enum("zlib", "zstd"),
    ("vhdx", "subformat"): Enum("dynamic", "fixed"),
    ("vmdk", "adapter_type"): Enum("ide", "buslogic", "lsilogic", "legacyESX"),
    ("vmdk", "subformat"): Enum(
        "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat",
        "streamOptimized",
    ),
}  # fmt: skip
_NODES = {
    "luks": (Member("file", REF, True), Member("header", REF, True)),
    "qcow2": (Member("file", REF), Member("data-file", REF, True)),
    "vhdx": (Member("file", REF),),
    "vmdk": (Member("file", REF), Member("extents", Array(REF), True)),
}
_VERSIONS = {"v2": "0.10", "v3": "1.1"}


def _options() -> tuple[str, tuple[Member, ...], Mapping[str, Struct]]:
    size = Member("size", SIZE)
    file = (Member("filename", STR), size, *_members(registry.driver("file")))
    variants = {"file": Struct(file)}
    for name in FORMATS:
        variants[name] = Struct((*_NODES[name], size, *_members(registry.driver(name))))
    return "driver", (Member("driver", Enum(*variants)),), variants


CREATE_OPTIONS = Union(_options)


def _members(driver: Driver) -> tuple[Member, ...]:
    found: dict[str, Member] = {}
    encrypt: list[Member] = []
    for option in driver.create_options:
        if option.own or option.name in _LEFT_OUT:
            continue
        outer, dot, name = option.name.partition(".")
        if not dot:
            found[outer] = Member(_hyphens(outer), _type(driver.name, option), True)
        elif name != "format":
            encrypt.append(Member(name, _type(driver.name, option), True))
    if driver.name == "vmdk":
        del found["backing_fmt"]  # it is vmdk
    if driver.name == "qcow2":
        found["version"] = Member("version", Enum(*_VERSIONS), True)
        methods = {"qcow": Struct((Member("key-secret", STR, True),)),
                   "luks": Struct(tuple(encrypt))}  # fmt: skip
        crypto = Union(lambda: ("format", (Member("format", Enum(*methods)),), methods))
        found["encrypt"] = Member("encrypt", crypto, True)
    return tuple(found.values())


def _type(driver: str, option: Option) -> Type:
    if (driver, option.name) in _WORDS:
        return _WORDS[driver, option.name]
    return Enum(*option.choices) if option.type == "enum" else _TYPES[option.type]


def _hyphens(name: str) -> str:
    return name.replace("_", "-")


def given(driver: Driver, options: Mapping[str, Any]) -> dict[str, Any]:
    """The driver's own creation options, complete.  Raises UsageError."""
    named = {_hyphens(option.name): option.name for option in driver.create_options}
    flat = names.flatten(options)
    found = {named[key]: value for key, value in flat.items() if key != "version"}
    if found.get("encrypt.format") == "qcow":
        found["encrypt.format"] = "aes"
    if "version" in flat:
        found["compat"] = _VERSIONS[flat["version"]]
    return create_options(driver, found)
