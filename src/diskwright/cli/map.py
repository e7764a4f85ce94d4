"""``map``."""

from __future__ import annotations

from ..hints import TYPE_CHECKING
from .images import arguments, look, one_operand, output_format, spec, wants_picture
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, PICTURE, Opt
from .output import Call
from .sizes import bounded

if TYPE_CHECKING:
    from ..engine.kernel import BaseDriver
    from ..graph.status import Status
    from ..ops.images import ImageSpec

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("s", "start-offset", "OFFSET", "where to start (bytes, or with a suffix)"),
    Opt("l", "max-length", "LENGTH", "how much to show"),
    FORCE_SHARE,
    OUTPUT,
    *PICTURE,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Show what is where in an image."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Show what is where in an image.")
    if args is None:
        return 0
    wanted = output_format(args)
    start, most = args.get("start-offset"), args.get("max-length")
    offset = bounded("start offset", start) if start is not None else 0
    length = bounded("max length", most) if most is not None else None
    image = spec(args, one_operand(args))
    if wants_picture(args):
        from .picture import show as show_picture

        show_picture(call, args, image, offset, length)
        return 0
    show = _json if wanted == "json" else _human
    status: int = look(lambda driver: show(call, driver, image, offset, length))
    return status


async def _human(
    call: Call, driver: BaseDriver, image: ImageSpec, offset: int, length: int | None
) -> int:
    from ..graph.display import display_name
    from ..ops.images import close_all
    from ..ops.map import map_disk

    node = await image.open(driver)
    try:
        call.out(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}{'File'}")
        shown: Status | None = None

        def flush() -> None:
            if shown is not None and shown.node is not None:
                name = display_name(shown.node)
                call.out(f"{_hex(shown.start)}{_hex(shown.length)}{_hex(shown.offset)}{name}")

        async for part in map_disk(node, offset, length):
            if part.data and not part.zero and part.offset < 0:
                flush()
                call.error("File contains external, encrypted or compressed clusters.")
                return 1
            if not part.data or part.zero:
                continue
            if shown is not None and part.follows(shown._replace(depth=part.depth), shown.length):
                shown = shown._replace(length=shown.length + part.length)
                continue
            flush()
            shown = part
        flush()
    finally:
        await close_all([node])
    return 0


def _hex(value: int) -> str:
    return f"{value:#x}".ljust(16) if value else "0".ljust(16)


async def _json(
    call: Call, driver: BaseDriver, image: ImageSpec, offset: int, length: int | None
) -> int:
    from ..ops.images import close_all
    from ..ops.map import Extent, map_disk
    from .jsontext import line

    node = await image.open(driver)
    try:
        separator = "["
        async for part in map_disk(node, offset, length):
            call.out(separator + line(Extent.of(part).to_dict()), "")
            separator = ",\n"
        call.out("]")
    finally:
        await close_all([node])
    return 0
