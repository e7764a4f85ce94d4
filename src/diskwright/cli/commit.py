"""``commit``."""

from __future__ import annotations

from .images import arguments, cache_mode, one_operand, run, spec, warn_if_guessed
from .options import FORMAT, GATE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Opt
from .output import Call
from .progress import Progress
from .sizes import bounded

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    Opt("t", "cache", "CACHE", "cache mode (writeback)"),
    Opt("b", "base", "FILE", "write into this layer below instead (implies --drop)"),
    Opt("d", "drop", "", "do not empty the overlay afterwards"),
    Opt("r", "rate", "RATE", "at most so many bytes a second"),
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Write an overlay's data into its backing file."""
    args = arguments(
        call, argv, OPTIONS, "FILENAME", "Write an overlay's data into its backing file."
    )
    if args is None:
        return 0
    name = one_operand(args)
    cache = cache_mode(args, "cache", "writeback", "Invalid cache option")
    rate = args.get("rate")
    limit = 0 if rate is None else bounded("rate limit", rate)
    image = spec(args, name, cache=cache)
    from ..ops.commit import commit

    call.on_interrupt = (
        f"interrupted: '{name}' still has its content; run the command again to finish"
    )
    progress = Progress.wanted(call, args)
    complete = False
    try:
        run(
            lambda driver: commit(
                driver,
                image,
                base=args.get("base"),
                keep="drop" in args,
                rate=limit,
                on_open=lambda node: warn_if_guessed(call, name, node),
                on_progress=progress,
            )
        )
        complete = True
    finally:
        progress.finish(complete)
    call.out("Image committed.")
    return 0
