"""What a VMDK image says of itself, and whether its extents are in order."""

from __future__ import annotations

from ...contract import Procedure
from ...findings import CheckResult
from ...hints import TYPE_CHECKING, Any
from .descriptor import NO_CONTENT, NOACCESS

if TYPE_CHECKING:
    from .format import Vmdk

_ORDER = ("compressed", "virtual-size", "filename", "cluster-size", "format")


def info(image: Vmdk) -> dict[str, Any]:
    """The format-specific data, keyed as ``qemu-img info --output=json`` has them."""
    text = image.descriptor
    out: dict[str, Any] = {
        "cid": NO_CONTENT if text is None else text.cid,
        "parent-cid": NO_CONTENT if text is None else text.parent_cid,
        "create-type": "" if text is None else text.create_type,
    }
    own = str(image.options.get("file-name") or "")
    extents = []
    for part, name, access in zip(image.parts, image.names, image.access, strict=True):
        entry = dict(part.info())
        if part.slot == "file":
            entry["filename"] = own
            entry["format"] = ""  # as qemu-img has it for an extent that holds the descriptor
        else:
            entry["filename"] = "" if name is None else beside(own, name)
        if access != "RW":
            entry["access"] = access
        known = {key: entry.pop(key) for key in _ORDER if key in entry}
        extents.append({**known, **entry})
    out["extents"] = extents
    return out


def beside(own: str, name: str) -> str:
    """The path of an extent, which is relative to that of the descriptor."""
    if name.startswith(("/", "\\")) or name[1:2] == ":":
        return name
    return own[: own.rfind("/") + 1] + name


def check(image: Vmdk, fix: str) -> Procedure:
    """Check every extent that may be read; see `Vmdk.check`."""
    result = CheckResult()
    for number, part in enumerate(image.parts):
        if image.access[number] == NOACCESS:
            result.uncovered.append(f"extent {number} may not be read")
            continue
        # Errors found in one extent are repaired in that one alone.
        allowed = fix if image.access[number] == "RW" else ""
        yield from part.check(result, allowed)
    return result
