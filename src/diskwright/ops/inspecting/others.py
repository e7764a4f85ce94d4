"""What is told of images whose format has no driver here: sizes, names and the bounds that their
headers must keep.  From the formats' published descriptions; each function reads a few fields."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable

from ...graph.named import BACKING
from ...hints import Any
from .result import Facts
from .window import NotSeen, View

_MOST_NAME = 1023
_MOST_JSON = 4 << 20


def examine(name: str, view: View) -> Facts:
    """What is known of an image of the format ``name``."""
    facts = Facts(name)
    try:
        _KNOWN[name](view, facts)
    except struct.error:
        facts.violate("the header is cut off", offset=view.length)
    except NotSeen as missing:
        facts.unseen.append((missing.offset, missing.length))
    return facts


def _luks2(view: View, facts: Facts) -> None:
    """LUKS2 On-Disk Format Specification 1.1.1, 2.1 and 3."""
    (size,) = struct.unpack(">Q", view.read(8, 8))
    facts.features["version"] = 2
    facts.features["encrypted"] = True
    if not 16384 <= size <= _MOST_JSON or size & size - 1:
        facts.violate(f"a header of {size} bytes", "hdr_size", 8)
        return
    raw = view.read(4096, size - 4096).partition(b"\0")[0]
    try:
        tree = json.loads(raw)
        kinds = sorted({str(segment["type"]) for segment in tree["segments"].values()})
        facts.features["key-slots"] = len(tree["keyslots"])
        facts.features["segments"] = kinds
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        facts.violate("the JSON area is none", "JSON", 4096)
        return
    if kinds != ["crypt"]:
        facts.unknown.append(f"segments of type {', '.join(kinds)}")


def _qcow(view: View, facts: Facts) -> None:
    at, length, _, size, cluster, level, crypt = struct.unpack(
        ">QIIQBBxxI", view.read(8, 32)
    )
    facts.size = size
    facts.features.update({"cluster-size": 1 << min(cluster, 63), "encrypted": crypt != 0})
    if not 9 <= cluster <= 16:
        facts.violate(f"a cluster size of 2^{cluster}", "cluster_bits", 32)
    if not 6 <= level <= 13:
        facts.violate(f"an L2 table of 2^{level} entries", "l2_bits", 33)
    _backing(view, facts, at, length, ("backing_file_size", 16))


def _qed(view: View, facts: Facts) -> None:
    cluster, _, head, features = struct.unpack("<IIIQ", view.read(4, 20))
    (size, at, length) = struct.unpack("<QII", view.read(48, 16))
    facts.size = size
    facts.features.update({"cluster-size": cluster, "dirty": bool(features & 2)})
    if not 4096 <= cluster <= 1 << 26 or cluster & cluster - 1:
        facts.violate(f"a cluster size of {cluster}", "cluster_size", 4)
    if features & ~7:
        facts.unknown.append(f"feature bits {features & ~7:#x}")
    if features & 1:
        if at + length > head * cluster:
            facts.violate("the backing file's name is outside of the header", "", at)
        _backing(view, facts, at, length, ("backing_filename_size", 60))
    elif at:
        facts.violate("a backing file's name without its bit", "backing_filename_offset", 56)


def _cow(view: View, facts: Facts) -> None:
    (name,) = struct.unpack(">1024s", view.read(8, 1024))
    (facts.size,) = struct.unpack(">Q", view.read(1036, 8))
    name = name.partition(b"\0")[0]
    if name:
        facts.refer(BACKING, os.fsdecode(name))


def _backing(view: View, facts: Facts, at: int, length: int, field: tuple[str, int]) -> None:
    if not at:
        return
    if length > _MOST_NAME:
        facts.violate(f"a backing file's name of {length} bytes", *field)
        length = _MOST_NAME
    if at + length > view.length:
        facts.violate("the backing file's name is behind the end of the file", offset=at)
        return
    if length:
        facts.refer(BACKING, os.fsdecode(view.read(at, length)))


def _vpc(view: View, facts: Facts) -> None:
    """Microsoft's "Virtual Hard Disk Image Format Specification" 1.0."""
    raw = view.read(view.length - 512, 512)
    if not raw.startswith(b"conectix"):
        raw = view.read(view.length - 511, 511) + b"\0"  # as early versions wrote it
    if not raw.startswith(b"conectix"):
        facts.violate("there is no footer at the end of the file", offset=view.length - 512)
        raw = view.read(0, 512)
    _sum(facts, "footer", raw, 64)
    (place,) = struct.unpack_from(">Q", raw, 16)
    size, kind = struct.unpack_from(">Q4xI", raw, 48)
    facts.size = size
    kinds = {2: "fixed", 3: "dynamic", 4: "differencing"}
    facts.features["subformat"] = kinds.get(kind, f"type {kind}")
    if kind == 2:
        if size > view.length - 511:
            facts.violate(f"a disk of {size} bytes does not fit into the file", "current size", 48)
    elif kind in kinds:
        _vpc_dynamic(view, facts, place, kind == 4)
    else:
        facts.unknown.append(f"a disk of type {kind}")


def _vpc_dynamic(view: View, facts: Facts, at: int, differencing: bool) -> None:
    raw = view.read(at, 1024)
    if not raw.startswith(b"cxsparse") or len(raw) < 1024:
        facts.violate("there is no dynamic disk header", "data offset", at)
        return
    _sum(facts, "dynamic disk header", raw, 36)
    table, _, entries, block = struct.unpack_from(">QIII", raw, 16)
    facts.features["block-size"] = block
    if table + 4 * entries > view.length:
        facts.violate("the block table ends behind the end of the file", "table offset", at + 16)
    if not differencing:
        return
    name = raw[64:576].decode("utf-16-be", "replace").partition("\0")[0]
    if name:
        facts.refer(BACKING, name, "vpc")
    for entry in range(576, 768, 24):
        code, _, length, _, place = struct.unpack_from(">4sIIIQ", raw, entry)
        if code == bytes(4):
            continue
        if length > 4096 or place + length > view.length:
            facts.violate("a parent locator is outside of the file", "", at + entry)
            continue
        text = view.read(place, length)
        coding = {b"W2ru": "utf-16-le", b"W2ku": "utf-16-le"}.get(code, "utf-8")
        facts.refer(BACKING, text.decode(coding, "replace").rstrip("\0"), "vpc")
    if not facts.references:
        facts.violate("a differencing disk that names no parent")


def _sum(facts: Facts, what: str, raw: bytes, at: int) -> None:
    total = ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFFFFFF
    if total != int.from_bytes(raw[at : at + 4], "big"):
        facts.violate(f"the checksum of the {what} does not match", "checksum", at)


def _vdi(view: View, facts: Facts) -> None:
    raw = view.read(0, 512)
    version, _, kind = struct.unpack_from("<III", raw, 0x44)
    blocks_at, data_at = struct.unpack_from("<II", raw, 0x154)
    size, block, _, count, used = struct.unpack_from("<QIIII", raw, 0x170)
    facts.size = size
    kinds = {1: "dynamic", 2: "static", 3: "undo", 4: "differencing"}
    facts.features.update({"subformat": kinds.get(kind, f"type {kind}"), "block-size": block})
    if version >> 16 != 1:
        facts.unknown.append(f"version {version >> 16}.{version & 0xFFFF}")
        return
    if not block or count * block < size:
        facts.violate("the blocks do not hold the disk", "blocks_in_image", 0x180)
    if blocks_at + 4 * count > min(data_at, view.length):
        facts.violate("the block map does not end before the data", "offset_bmap", 0x154)
    if used > count:
        facts.violate("more blocks are in use than there are", "blocks_allocated", 0x184)
    parent = raw[0x1B8:0x1C8]
    if kind in (3, 4) or any(parent):
        facts.refer(BACKING, f"uuid:{_guid(parent)}", "vdi")


def _guid(raw: bytes) -> str:
    a, b, c = struct.unpack_from("<IHH", raw)
    return f"{a:08x}-{b:04x}-{c:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"


def _parallels(view: View, facts: Facts) -> None:
    version, _, _, tracks, entries, sectors, in_use, _, _, more = struct.unpack(
        "<IIIIIQIIIQ", view.read(16, 48)
    )
    if view.read(0, 16) == b"WithoutFreeSpace":
        sectors &= 0xFFFFFFFF
    facts.size = sectors * 512
    facts.features.update({"block-size": tracks * 512, "dirty": in_use == 0x746F6E59})
    if version != 2:
        facts.unknown.append(f"version {version}")
    if not tracks:
        facts.violate("blocks of no sectors", "tracks", 28)
    if 64 + 4 * entries > view.length:
        facts.violate("the block table ends behind the end of the file", "bat_entries", 32)
    if more:
        facts.unknown.append("a format extension")


def _bochs(view: View, facts: Facts) -> None:
    kind = view.read(32, 32).replace(b"\0", b" ").decode("ascii", "replace").split()
    facts.features["subformat"] = " ".join(kind)
    if kind != ["Redolog", "Growing"]:
        facts.unknown.append("a redo log over a disk that it does not name")


def _cloop(view: View, facts: Facts) -> None:
    block, count = struct.unpack(">II", view.read(128, 8))
    facts.size = block * count
    facts.features["block-size"] = block
    if not block or block % 512 or block > 64 << 20:
        facts.violate(f"a block size of {block}", "block_size", 128)
    if 136 + 8 * count > view.length:
        facts.violate("the block table ends behind the end of the file", "num_blocks", 132)


def _dmg(view: View, facts: Facts) -> None:
    raw = view.read(view.length - 512, 512)
    data_at, data = struct.unpack_from(">QQ", raw, 24)
    segments = struct.unpack_from(">I", raw, 60)[0]
    plist_at, plist = struct.unpack_from(">QQ", raw, 216)
    facts.size = 512 * struct.unpack_from(">Q", raw, 492)[0]
    for what, at, length in (("data fork", data_at, data), ("property list", plist_at, plist)):
        if at + length > view.length:
            facts.violate(f"the {what} ends behind the end of the file", offset=at)
    if segments > 1:
        facts.unknown.append(f"one segment of {segments}, the others of which it does not name")


_KNOWN: dict[str, Callable[[View, Facts], Any]] = {
    "luks": _luks2,
    "qcow": _qcow,
    "qed": _qed,
    "cow": _cow,
    "vpc": _vpc,
    "vdi": _vdi,
    "parallels": _parallels,
    "bochs": _bochs,
    "cloop": _cloop,
    "dmg": _dmg,
}
