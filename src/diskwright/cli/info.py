"""``info``."""

from __future__ import annotations

from ..hints import TYPE_CHECKING
from ..units import human
from .images import arguments, look, one_operand, output_format, spec, wants_picture
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, PICTURE, Opt
from .output import Call, UsageProblem

if TYPE_CHECKING:
    from ..ops.info import NodeInfo

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("b", "backing-chain", "", "also show all images below"),
    FORCE_SHARE,
    OUTPUT,
    *PICTURE,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Show what an image is."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Show what an image is.")
    if args is None:
        return 0
    wanted = output_format(args)
    image = spec(args, one_operand(args))
    from ..ops import info as ops

    picture = wants_picture(args)
    if picture and "backing-chain" not in args:
        raise UsageProblem("--picture and --svg need --backing-chain")
    if "backing-chain" in args:
        found = look(lambda driver: ops.info_chain(driver, image))
        if wanted == "json":
            call.out(dumps([entry.to_dict() for entry in found]))
        else:
            call.out("\n".join(text(entry) for entry in found), "")
        if picture:
            from .picture import show

            if "picture" in args:
                call.out("")
            show(call, args, image)
        return 0
    entry = look(lambda driver: ops.info(driver, image))
    if wanted == "json":
        call.out(dumps(entry.to_dict()))
    else:
        call.out(text(entry), "")
    return 0


def text(info: NodeInfo, path: str = "", indent: str = "") -> str:
    """What ``qemu-img info`` shows of a node; ``path`` are the slots that lead to it (empty: it is
    the disk itself)."""
    size = f"{human(info.virtual_size)} ({info.virtual_size} bytes)"
    disk = "unavailable" if info.actual_size is None else human(info.actual_size)
    if info.is_protocol and path:
        lines = [
            f"filename: {info.filename}",
            f"protocol type: {info.format}",
            f"file length: {size}",
            f"disk size: {disk}",
        ]
    else:
        lines = [
            f"image: {info.filename}",
            f"file format: {info.format}",
            f"virtual size: {size}",
            f"disk size: {disk}",
        ]
    if info.encrypted:
        lines.append("encrypted: yes")
    if info.cluster_size:
        lines.append(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        lines.append("cleanly shut down: no")
    lines += _backing(info)
    if info.snapshots:
        from .snapshot_list import snapshot_lines

        lines += snapshot_lines(info.snapshots)
    if info.specific:
        from ..ops.info import nested

        lines.append("Format specific information:")
        lines += nested(info.specific, "    ")
    shown = "".join(f"{indent}{line}\n" for line in lines)
    for slot, child in info.children:
        inner = f"{path}/{slot}"
        shown += f"{indent}Child node '{inner}':\n{text(child, inner, indent + '    ')}"
    return shown


def _backing(info: NodeInfo) -> list[str]:
    if info.backing_name is None:
        return []
    line = f"backing file: {info.backing_name}"
    if info.full_backing_name is None:
        line += " (cannot determine actual path)"
    elif info.full_backing_name != info.backing_name:
        line += f" (actual path: {info.full_backing_name})"
    lines = [line]
    if info.backing_format:
        lines.append(f"backing file format: {info.backing_format}")
    return lines
