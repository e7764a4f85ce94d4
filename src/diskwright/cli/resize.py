"""``resize``."""

from __future__ import annotations

from ..errors import UsageError
from .create import option_size
from .images import arguments, run, spec, warn_if_guessed
from .options import FORMAT, GATE, IMAGE_OPTS, OBJECT, QUIET, Args, Opt
from .output import Call, UsageProblem

OPTIONS = (
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    Opt("", "shrink", "", "let the disk become smaller, which loses data"),
    Opt("", "preallocation", "PREALLOC", "how new space is allocated: off, metadata, falloc, full"),
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Change the size of a disk."""
    # A size such as -1G is an operand, although it looks like an option.
    size = argv.pop() if argv and _is_decrease(argv[-1]) else None
    args = arguments(call, argv, OPTIONS, "FILENAME [+|-]SIZE", "Change the size of a disk.")
    if args is None:
        return 0
    if size is not None:
        args.operands.append(size)
    return _resize(call, args)


def _is_decrease(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and word[1].isdigit()


def _resize(call: Call, args: Args) -> int:
    if len(args.operands) < 2:
        raise UsageProblem("Expecting image file name and size")
    if len(args.operands) > 2:
        raise UsageProblem("Extra argument(s) in command line")
    from ..ops.resize import PREALLOCATIONS, WouldShrink, resize

    preallocation = args.get("preallocation") or "off"
    if preallocation not in PREALLOCATIONS:
        raise UsageError(f"Invalid preallocation mode '{preallocation}'")
    name, text = args.operands
    relative = {"+": 1, "-": -1}.get(text[:1], 0)
    size = option_size("size", text[1:] if relative else text)
    image = spec(args, name)
    try:
        run(
            lambda driver: resize(
                driver,
                image,
                size,
                relative=relative,
                preallocation=preallocation,
                shrink="shrink" in args,
                on_open=lambda node: warn_if_guessed(call, name, node),
            )
        )
    except WouldShrink as error:
        call.error(str(error))
        call.error(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. "
            "Before performing such an operation, make sure there is no important data there."
        )
        return 1
    call.out("Image resized.")
    return 0
