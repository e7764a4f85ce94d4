"""What images name: which of the names is opened, and whether it is what the image means."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import ImageError, Refused, UsageError
from ..hints import Any
from . import names
from .display import base_of, display_name
from .gate import Gate, Leave
from .graph import leaf_of, primary
from .node import Node
from .registry import kind

BACKING = "backing file"

_OTHER_MACHINE = "a path of the machine that wrote it"


def role_of(slot: str) -> str:
    """What a node in ``slot`` is called in messages: ``extent.3`` is an extent."""
    name = slot.partition(".")[0]
    return BACKING if name == "backing" else name.replace("-", " ")


def backing_names(node: Node) -> list[str]:
    """All names that the image in ``node`` gives for its backing file, in the order in which they
    are tried."""
    format: Any = getattr(node, "format", None)
    found = list(getattr(format, "backing_names", None) or ())
    shown = getattr(format, "backing_file", None)
    return found or ([shown] if shown else [])


def located(gate: Gate, node: Node, wanted: Sequence[str], role: str = BACKING) -> Leave:
    """What to open for what the image in ``node`` calls ``wanted``: the first of these
    names that the gate admits and that exists.

    Nothing is looked at before the gate admitted it.  Raises Refused when none that it admits
    exists, and ImageError, which tells all that was tried, when it admits all of them.
    """
    by, folder = display_name(node), _folder_of(node)
    refused: Refused | None = None
    tried: list[str] = []
    unmapped: list[str] = []
    choices = [(name, spelt) for name in wanted for spelt in _spellings(name)]
    for name, spelt in choices:
        target = gate.mapped(spelt)
        if target is None:
            if names.foreign(spelt):
                tried.append(f"'{name}' ({_OTHER_MACHINE})")
                unmapped.append(name)
                continue
            try:
                target = _beside(node, spelt)
            except UsageError:
                if len(choices) == 1:
                    raise
                tried.append(f"'{name}' (relative to no directory)")
                continue
        try:
            found = gate.admit(name, by, resolved=target, role=role, folder=folder)
        except Refused as error:
            refused = refused or error
            continue
        if len(choices) == 1 or _exists(found.reference):
            return found
        tried.append(f"'{found.reference}'")
    if refused is not None:
        raise refused
    told = ", ".join(dict.fromkeys(tried))
    detail = f"no {role} that it names is there: {told}" if tried else f"it names no {role}"
    for name in dict.fromkeys(map(_folder, unmapped)):
        detail += f"; --map-path '{name}=DIRECTORY' says where that is here"
    problem = ImageError(detail, file=by)
    problem.add_note(f"Could not open {role}")
    raise problem


def _folder(name: str) -> str:
    from .paths import folder_of

    return folder_of(name)


def meaning(node: Node, name: str) -> str:
    """What ``name`` means from the image in ``node`` (a Windows path only itself).

    Raises UsageError where there is no directory that it could be relative to.
    """
    return name if names.foreign(name) else _beside(node, name)


def identity_of(node: Node) -> str | None:
    """What a child records of the image in ``node``; None where its format has no such thing."""
    found: str | None = getattr(getattr(_image(node), "format", None), "identity", None)
    return found


def sector_size_of(node: Node) -> int | None:
    """Logical sectors of the image in ``node`` in bytes; None where its format has none."""
    found: int | None = getattr(getattr(_image(node), "format", None), "sector_size", None)
    return found


def check_identity(node: Node, below: Node) -> None:
    """Raise ImageError unless ``below`` is what ``node`` recorded as its backing file."""
    format: Any = getattr(node, "format", None)
    recorded: str | None = getattr(format, "parent_identity", None)
    if recorded is None:
        return
    parent, present = _image(below), identity_of(below)
    if present == recorded or present in getattr(format, "parent_identities", ()):
        return
    by, base = display_name(node), display_name(parent)
    if present is None:
        what = (
            f"it was made over an image with the identity {recorded}, but its backing file "
            f"'{base}' is opened as {parent.driver_name}, which has none; the format it was made "
            "over must be given"
        )
    else:
        what = (
            f"it was made over a backing file with the identity {recorded}, but that of '{base}' "
            f"is {present}: this is another image, or was written to since; if its content is the "
            "right one, 'rebase -u' records it"
        )
    raise ImageError(f"{what}. Without its backing file the image can be opened still", file=by)


def _spellings(name: str) -> list[str]:
    """``name`` as it may be meant: a relative path of Windows has backslashes."""
    if "\\" not in name or name.startswith("/") or names.foreign(name) or names.protocol_of(name):
        return [name]
    return [name, name.replace("\\", "/")]


def _beside(node: Node, name: str) -> str:
    if name.startswith("/") or names.protocol_of(name):
        return name
    return names.resolve(base_of(node), name)


def _folder_of(node: Node) -> str | None:
    """The folder of the file that the image in ``node`` is in; None where it is in none."""
    leaf = leaf_of(node)
    if leaf.driver_name not in ("file", "host_device") or "filename" not in leaf.options:
        return None
    return os.path.dirname(str(leaf.options["filename"]))


def _exists(reference: str) -> bool:
    """Whether there is such a file; of other references only opening them tells."""
    try:
        where, plain = names.parse(reference)
        if not plain or where.get("driver") != "file":
            return True
        os.stat(where["filename"])
    except PermissionError:
        return True  # opening it will tell
    except (OSError, UsageError, ValueError):
        return False
    return True


def _image(node: Node) -> Node:
    """The image below filters."""
    while kind(node.driver_name) == "filter":
        below = primary(node)
        if below is None:
            break
        node = below
    return node
