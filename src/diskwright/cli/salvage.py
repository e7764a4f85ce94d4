"""``salvage``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import UsageError
from .create import collect
from .images import arguments, gate, run, spec
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, Opt
from .output import Call, UsageProblem
from .progress import Progress

if TYPE_CHECKING:
    from ..ops.salvage import Salvaged

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    Opt("O", "target-format", "FMT", "format of the target (raw)"),
    Opt("o", "target-options", "OPTS", "creation options of the target"),
    Opt("", "assume", "OPTS", "what the source does not say any more, as its creation options"),
    FORCE_SHARE,
    Opt("", "map", "FILE", "write what is lost and what is guessed, and why, to FILE"),
    Opt("", "map-format", "MAPFMT", "text (a mapfile of ddrescue, the default) or json"),
    Opt("", "force", "", "TARGET and FILE may exist and are replaced"),
    *GATE,
    OBJECT,
)
SOME = 3
"""Exit status when something is lost or guessed."""


def main(call: Call, argv: list[str]) -> int:
    """Copy what can be read; the exit status is 0 (all of it), 3 (some) or 1 (nothing)."""
    args = arguments(
        call, argv, OPTIONS, "SOURCE TARGET", "Copy what can be read out of a damaged image."
    )
    if args is None:
        return 0
    if len(args.operands) != 2:
        raise UsageProblem("Expecting a source and a target")
    name, target_name = args.operands
    kind = args.get("map-format") or "text"
    if kind not in ("text", "json"):
        raise UsageProblem(f"--map-format expects 'text' or 'json' not '{kind}'")
    path, force = args.get("map"), "force" in args
    if path is not None and os.path.lexists(path) and not force:
        raise UsageError(f"'{path}' exists already; --force lets it be replaced")
    from ..ops.images import ImageSpec
    from ..ops.salvage import salvage

    source = spec(args, name)
    fmt = args.get("target-format") or "raw"
    target = ImageSpec(target_name, target_name, fmt, gate=gate(args), secrets=source.secrets)
    options = collect(args.all("target-options"))
    assume = collect(args.all("assume"))
    call.on_interrupt = f"interrupted: '{name}' is as it was, '{target_name}' was taken back"
    progress = Progress.wanted(call, args)
    complete = False
    try:
        done = run(
            lambda driver: salvage(
                driver,
                source,
                target,
                options,
                assume=assume,
                force=force,
                on_progress=progress,
            )
        )
        complete = True
    finally:
        progress.finish(complete)
    if path is not None:
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as out:
            out.write(_map(done, kind))
    for remark in done.remarks:
        call.out(remark)
    if not done.map.parts:
        call.out(f"All {done.size} bytes were read.")
        return 0
    call.out(
        f"Of {done.size} bytes {done.lost} are lost and {done.guessed} are guessed, in "
        f"{len(done.map.parts)} ranges."
    )
    return SOME


def _map(done: Salvaged, kind: str) -> str:
    if kind == "text":
        return "\n".join(done.map.text(done.remarks)) + "\n"
    return dumps(done.to_dict()) + "\n"
