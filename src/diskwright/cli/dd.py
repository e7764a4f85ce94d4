"""``dd``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .create import creation_failed
from .images import arguments, gate, run, spec
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, Opt
from .output import Call, reason
from .sizes import INT64_MAX, bounded

if TYPE_CHECKING:
    from ..ops.dd import Part

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("O", "output-format", "FMT", "format of the new image (raw)"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)
_OPERANDS = "[bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=SOURCE of=TARGET"
# What is said of a name that no format has; `convert` says more.
_UNKNOWN = "Unknown file format"
_NUMBERS: dict[str, Callable[[str], int]] = {
    "bs": lambda text: bounded("bs", text, 1, (1 << 31) - 1),
    "count": lambda text: bounded("count", text, 0, INT64_MAX, suffixes=False),
    "skip": lambda text: bounded("skip", text, 0, INT64_MAX, suffixes=False),
}


def main(call: Call, argv: list[str]) -> int:
    """Copy a part of a disk into a new image."""
    summary = (
        "Copy the first BLOCKS blocks of SIZE bytes (512) of a disk, but not those to be skipped, "
        "into a new image."
    )
    args = arguments(call, argv, OPTIONS, _OPERANDS, summary)
    if args is None:
        return 0
    names, part = _operands(args.operands)
    source_name, target_name = names.get("if"), names.get("of")
    if source_name is None or target_name is None:
        raise UsageError("Must specify both input and output files")
    source = spec(args, source_name)
    fmt = args.get("output-format") or "raw"
    target = spec(args, target_name, format_key="output-format", opts_key="")
    target = target._replace(format=fmt, force_share=False, gate=gate(args))
    from ..ops import dd as ops
    from ..ops.create import creatable

    call.on_interrupt = (
        f"interrupted: '{target_name}' is a valid image, but not complete; "
        "run the command again to make it anew"
    )

    def opened() -> None:
        try:
            creatable(fmt)
        except UsageError as error:
            text = str(error)
            raise UsageError(_UNKNOWN if text.startswith(_UNKNOWN) else text) from None

    def short() -> None:
        call.error(f"{source_name}: cannot skip to specified offset")

    async def work(driver: Any) -> int:
        return await ops.dd(driver, source, target, part, on_source=opened, on_short=short)

    try:
        run(work)
    except ops.OutputFailed as error:
        raise call.fail(
            f"{error.name}: error while creating output image: {creation_failed(error.cause)}"
        ) from error
    except ops.CopyFailed as error:
        what = "reading from input" if error.side == "read" else "writing to output"
        raise call.fail(f"error while {what} image file: {reason(error.cause)}") from error
    return 0


def _operands(words: list[str]) -> tuple[dict[str, str], Part]:
    """What ``name=value`` operands say; later ones win.  Raises UsageError."""
    from ..ops.dd import BLOCK, Part

    names: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in ("if", "of"):
            names[name] = value
        elif equals and name in _NUMBERS:
            numbers[name] = _NUMBERS[name](value)
        else:
            raise UsageError(f"unrecognized operand {name}")
    return names, Part(numbers.get("bs", BLOCK), numbers.get("count"), numbers.get("skip", 0))
