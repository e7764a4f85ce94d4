"""``amend``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .create import collect, option_lines, option_size, wants_list
from .images import READ_CACHES, arguments, run, spec, warn_if_guessed
from .options import FORMAT, GATE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Args, Opt
from .output import Call, UsageProblem
from .progress import Progress

if TYPE_CHECKING:
    from ..ops.images import ImageSpec

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    Opt("o", "options", "OPTS", "what to change: a=b,c=d ('-o help' lists the options)"),
    Opt("t", "cache", "CACHE", "cache mode (writeback)"),
    Opt("", "force", "", "allow what may make data unreadable for good"),
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Change options of an image in place."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Change options of an image in place.")
    if args is None:
        return 0
    given = args.all("options")
    if not given:
        raise UsageProblem("Must specify options (-o)")
    if wants_list(given):
        return _list(call, args)
    name = _named(args)
    options = collect(given)
    if "size" in options:
        option_size("size", options["size"])
    image = _image(call, args, name)
    from ..ops.amend import amend

    call.on_interrupt = f"interrupted: '{name}' is whole, with some of the changes made"
    progress = Progress.wanted(call, args)
    complete = False
    try:
        run(
            lambda driver: amend(
                driver,
                image,
                options,
                force="force" in args,
                on_open=lambda node: warn_if_guessed(call, name, node),
                on_progress=progress,
            )
        )
        complete = True
    finally:
        progress.finish(complete)
    return 0


def _named(args: Args) -> str:
    if len(args.operands) != 1:
        raise UsageError("Expecting one image file name")
    return args.operands[0]


def _image(call: Call, args: Args, name: str) -> ImageSpec:
    cache = args.get("cache") or "writeback"
    if cache not in READ_CACHES:
        raise call.fail(f"Invalid cache option: {cache}")
    return spec(args, name, cache=cache)


def _list(call: Call, args: Args) -> int:
    """Print what can be changed: of the format that is named, or that the image has."""
    from ..ops.amend import amend_options, format_of

    fmt = args.get("format")
    if fmt is None:
        image = _image(call, args, _named(args))
        fmt = run(lambda driver: format_of(driver, image))
    lines = option_lines(call, amend_options(fmt))
    call.out(f"Amend options for '{fmt}':\n{lines}", "")
    return 0
