"""Names for people and for overlays: the shortest text that describes an open node."""

from __future__ import annotations

from ..errors import ImageError, UsageError
from ..hints import Any
from .graph import leaf_of, primary
from .names import directory_of, protocol_of
from .node import Node
from .options import FILES, child_option, numbered

# Options that change how a disk is handled, never what it holds: a name need not tell them.
# Drivers that are not listed tell all of theirs.
_WEAK: dict[str, frozenset[str] | None] = {
    "vhdx": None,  # None: all of them are weak
    "vmdk": None,
    "file": None,
    "host_device": None,
    "nbd": frozenset(
        {"reconnect-delay", "open-timeout", "connections", "timeout", "x-dirty-bitmap"}
    ),
    "null-co": frozenset({"latency-ns"}),
    "null-aio": frozenset({"latency-ns"}),
}
# The reverse: of these drivers only what opens an encrypted disk is told.
_STRONG = {"qcow2": frozenset({"encrypt.key-secret"})}
# What qemu-img writes behind `driver` and behind the children (measured with 10.0).
_BEHIND_DRIVER, _LAST = frozenset({"size"}), frozenset({"key-secret"})
_COMMON = frozenset({"driver", "force-share", "node-name", "filename"})


def strong_options(node: Node) -> dict[str, Any]:
    """The options of ``node`` that a name must tell (children not counted)."""
    strong = _STRONG.get(node.driver_name)
    if strong is not None:
        return {key: value for key, value in node.options.items() if key in strong}
    weak = _WEAK.get(node.driver_name, frozenset())
    if weak is None:
        return {}
    left = {key: value for key, value in node.options.items() if key not in _COMMON | weak}
    return {
        key: value for key, value in left.items() if key not in node.children and not numbered(key)
    }


def plain_name(node: Node) -> str | None:
    """The file name that opens the same disk (given the same format); None if there is none."""
    strong = strong_options(node)
    if node.driver_name == "file-object":
        return str(node.options.get("label", "a file object"))
    if "filename" in node.options and not node.children:
        name = str(node.options["filename"])
        return f"./{name}" if protocol_of(name) and node.driver_name == "file" else name
    if node.driver_name == "nbd":
        return _nbd_name(node, strong)
    if node.driver_name in ("null-co", "null-aio"):
        return None if strong else f"{node.driver_name}://"
    if node.driver_name == "blkdebug":
        config = strong.pop("config", "")
        image = node.child("image")
        below = plain_name(image) if image is not None and not strong else None
        return None if below is None else f"blkdebug:{config}:{below}"
    file = node.child("file")
    if file is None or strong or any(map(_fills_slot, node.options)):
        return None
    # A format directly over a protocol is what a file name means; more layers it cannot tell.
    return plain_name(file) if "file" not in file.children else None


# What an NBD name tells, beside all that begins with `server.`; the rest is asked of no server.
_NBD_NAMED = frozenset({"export", "path", "host", "port", "tls"})
_NBD_TLS = frozenset(
    {"tls-hostname", "tls-certificates", "tls-psk-file", "tls-username", "tls-verify-peer"}
)
_NBD_UNNAMED = frozenset(
    f"server.{key}" for key in ("ipv4", "ipv6", "to", "abstract", "tight", "str")
)


def _nbd_name(node: Node, strong: dict[str, Any]) -> str | None:
    named = _NBD_NAMED | (_NBD_TLS if strong.get("tls") else frozenset())
    if any(key not in named and not key.startswith("server.") for key in strong):
        return None
    if not _NBD_UNNAMED.isdisjoint(strong):
        return None
    from ..protocols.nbd import normalised
    from ..wire.nbd_uri import uri

    return uri(normalised(node.options))


def description(node: Node) -> dict[str, Any]:
    """The options that open the same disk."""
    if node.driver_name == "file" and not node.children:
        return {"driver": "file", "filename": plain_name(node)}
    strong = strong_options(node)
    behind = {key: strong.pop(key) for key in _BEHIND_DRIVER & strong.keys()}
    last = {key: strong.pop(key) for key in _LAST & strong.keys()}
    found = {**strong, "driver": node.driver_name, **behind}
    if "filename" in node.options:
        found["filename"] = node.options["filename"]
    if "server.port" in found:
        found["server.port"] = str(found["server.port"])  # of an address it is a text
    named = hasattr(node, "format")
    for slot, edge in node.children.items():
        if slot == "file" or not named or child_option(slot) in node.options:
            found[child_option(slot)] = description(edge.child)
    if "backing" in node.options and "backing" not in node.children:
        found["backing"] = None
    return {**found, **last}


def _fills_slot(option: str) -> bool:
    """True for an option of a format that is a child, given where the image may name one."""
    return option in ("backing", *FILES) or numbered(option)


def display_name(node: Node) -> str:
    """The plain name where it suffices, a ``json:`` name otherwise."""
    plain = plain_name(node)
    if plain is not None:
        return plain
    import json

    return "json:" + json.dumps(description(node), ensure_ascii=False)


def base_of(node: Node) -> str:
    """What relative names in the image ``node`` are relative to: its own file's name.

    Raises UsageError where there is no directory.
    """
    below = primary(node)
    leaf = leaf_of(node) if below is not None else node
    if "filename" not in leaf.options:
        raise UsageError(f"Cannot generate a base directory for {leaf.driver_name} nodes")
    name = str(leaf.options["filename"])
    if leaf.driver_name in ("file", "host_device"):
        return name if "/" in name else f"./{name}" if protocol_of(name) else name
    return directory_of(name)


def say_file(error: BaseException, node: Node) -> None:
    """Say which file an error is about, where it does not know."""
    if isinstance(error, ImageError) and not error.file:
        error.file = display_name(node)
    elif isinstance(error, OSError) and error.filename is None and error.errno is not None:
        error.filename = display_name(node)
