"""``bitmap``."""

from __future__ import annotations

from ..errors import UsageError
from .images import arguments, run, spec, warn_if_guessed
from .options import FORMAT, GATE, IMAGE_OPTS, OBJECT, Args, Opt
from .output import Call
from .sizes import INT64_MAX, bounded

_KINDS = ("add", "remove", "clear", "enable", "disable", "merge")

OPTIONS = (
    FORMAT,
    IMAGE_OPTS,
    Opt("", "add", "", "make BITMAP, which follows writes from now on"),
    Opt("g", "granularity", "SIZE", "bytes per bit of a bitmap that is made (64k)"),
    Opt("", "remove", "", "remove BITMAP"),
    Opt("", "clear", "", "forget what is dirty in BITMAP"),
    Opt("", "enable", "", "let BITMAP follow writes"),
    Opt("", "disable", "", "let BITMAP stay as it is"),
    Opt("", "merge", "SOURCE", "add what is dirty in the bitmap SOURCE"),
    Opt("b", "source-file", "FILE", "the image that SOURCE is in"),
    Opt("F", "source-format", "FMT", "format of that image"),
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Change the dirty bitmaps of an image."""
    args = arguments(
        call, argv, OPTIONS, "FILENAME BITMAP", "Change the dirty bitmaps of an image, in the "
        "order of the actions given."
    )
    if args is None:
        return 0
    from ..ops.bitmap import Action, bitmap

    granularity = None
    text = args.get("granularity")
    if text is not None:
        granularity = bounded("granularity", text, 0, INT64_MAX)
    actions = [Action(key, value) for key, value in args.options if key in _KINDS]
    _check(args, {action.kind for action in actions})
    filename, name = args.operands
    image = spec(args, filename)
    source = None
    path = args.get("source-file")
    if path is not None:
        plain = Args([o for o in args.options if o[0] != "image-opts"], [])
        source = spec(plain, path, format_key="source-format")
    run(
        lambda driver: bitmap(
            driver,
            image,
            name,
            actions,
            granularity=granularity or None,
            source=source,
            on_open=lambda node: warn_if_guessed(call, filename, node),
        )
    )
    return 0


def _check(args: Args, kinds: set[str]) -> None:
    if not kinds:
        raise UsageError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if "granularity" in args and "add" not in kinds:
        raise UsageError("granularity only supported with --add")
    if "source-file" in args and "merge" not in kinds:
        raise UsageError("Merge bitmap source file only supported with --merge")
    if "source-format" in args and "source-file" not in args:
        raise UsageError("-F only supported with -b")
    if len(args.operands) != 2:
        raise UsageError("Expecting filename and bitmap name")
