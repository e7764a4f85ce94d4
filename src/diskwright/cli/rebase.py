"""``rebase``."""

from __future__ import annotations

from .images import arguments, cache_mode, one_operand, run, spec, warn_if_guessed
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Opt
from .output import Call, UsageProblem
from .progress import Progress

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    Opt("t", "cache", "CACHE", "cache mode of FILENAME (writeback)"),
    Opt("b", "backing", "FILE", "the new backing file; '' for none"),
    Opt("F", "backing-format", "FMT", "format of the new backing file"),
    Opt("T", "backing-cache", "CACHE", "cache mode of the backing file (writeback)"),
    Opt("u", "backing-unsafe", "", "change the name alone, whatever the disk reads then"),
    Opt("c", "compress", "", "write compressed clusters"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Change an image's backing file."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Change an image's backing file.")
    if args is None:
        return 0
    name = one_operand(args)
    unsafe = "backing-unsafe" in args
    backing = args.get("backing")
    if backing is None and not unsafe:
        raise UsageProblem("Must specify backing file (-b) or use unsafe mode (-u)")
    cache = cache_mode(args, "cache", "writeback", "Invalid cache option")
    source = cache_mode(args, "backing-cache", "writeback", "Invalid source cache option")
    # The image itself is written to, so only its backing files can be shared.
    image = spec(args, name, cache=cache)._replace(force_share=False)
    from ..ops.rebase import rebase

    call.on_interrupt = (
        f"interrupted: '{name}' still has its old backing file and content; "
        "run the command again to finish"
    )
    progress = Progress.wanted(call, args)
    complete = False
    try:
        run(
            lambda driver: rebase(
                driver,
                image,
                backing or None,
                args.get("backing-format"),
                unsafe=unsafe,
                backing_cache=source,
                compress="compress" in args,
                on_open=lambda node: warn_if_guessed(call, name, node),
                on_progress=progress,
                on_warning=lambda text: call.warning(f"warning: {text}"),
            )
        )
        complete = True
    finally:
        progress.finish(complete)
    return 0
