"""``convert``."""

from __future__ import annotations

import sys

from ..errors import DiskError, UsageError
from ..hints import TYPE_CHECKING, Any
from .create import check_names, collect, creation_failed, list_options, overlay, wants_list
from .images import arguments, cache_mode, gate, run, spec
from .options import FORCE_SHARE, GATE, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, TRACE, Args, Opt
from .output import Call, reason, strerror, to_stderr
from .progress import Progress
from .sizes import INT64_MAX, bounded

if TYPE_CHECKING:
    from ..ops.digest import Digests
    from ..ops.images import ImageSpec
    from ..ops.pipes import Pipe
    from ..ops.resume import Resumed
    from ..ops.snapshots import Selector

OPTIONS = (
    QUIET,
    PROGRESS,
    Opt("f", "source-format", "FMT", "format of the sources (otherwise probed)"),
    IMAGE_OPTS,
    Opt("", "source-image-opts"),
    Opt("l", "source-snapshot", "SNAPSHOT", "copy an internal snapshot of the source: an id or "
        "name, or snapshot.id=ID,snapshot.name=NAME"),
    Opt("T", "source-cache", "CACHE", "cache mode of the sources (writeback)"),
    Opt("O", "target-format", "FMT", "format of the target (raw)"),
    Opt("", "target-image-opts", "", "TARGET is a list of options (needs -n)"),
    Opt("o", "target-options", "OPTS", "creation options of the target"),
    Opt("c", "compress", "", "write compressed data, where the target's format has them"),
    Opt("t", "target-cache", "CACHE", "cache mode of the target (unsafe)"),
    Opt("B", "backing", "FILE", "make the target an overlay over FILE"),
    Opt("F", "backing-format", "FMT", "format of that backing file"),
    Opt("n", "no-create", "", "write into a target that exists"),
    Opt("", "target-is-zero", "", "the existing target reads as zeroes already"),
    Opt("S", "sparse-size", "SIZE", "smallest run of zeroes to look for (4k); 0: allocate all"),
    Opt("", "bitmaps", "", "copy the persistent dirty bitmaps of the source as well"),
    Opt("", "skip-broken-bitmaps", "", "but not those that are inconsistent"),
    FORCE_SHARE,
    Opt("r", "rate", "RATE", "bytes a second, with suffix"),
    Opt("m", "parallel", "N", "parts in flight (1 to 16; 8)"),
    Opt("C", "copy-range-offloading", "", "let the host copy between plain files"),
    Opt("", "salvage", "", "write zeroes where a source cannot be read"),
    Opt("W", "oob-writes", "", "write out of order"),
    Opt("", "size", "SIZE", "how much comes when a raw SOURCE is '-'"),
    Opt("", "also", "FMT:FILE", "another target, made by the same reading (repeatable)"),
    Opt("", "digest", "ALGO", "print a digest of the disk: sha256 (default) or ... (repeatable)",
        ("sha256", "sha512", "sha1", "md5", "blake2b", "tree")),
    Opt("", "resume", "WHEN", "keep a journal, TARGET.resume, and go on by it where an earlier run "
        "stopped ('--resume=verify': compare digests of the source)", ("verify",)),
    TRACE,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Copy disks into a new image."""
    summary = (
        "Copy disks into a new image.  '-' is standard input (the only SOURCE) or standard output."
    )
    args = arguments(call, argv, OPTIONS, "SOURCE... TARGET", summary)
    if args is None:
        return 0
    if "source-image-opts" in args:
        args.options.append(("image-opts", ""))
    given = args.all("target-options")
    fmt = args.get("target-format") or "raw"
    if wants_list(given):
        return list_options(call, fmt, args.operands[-1] if args.operands else None)
    progress = Progress.wanted(call, args, sys.stderr if args.operands[-1:] == ["-"] else None)
    complete = False
    try:
        status = _convert(call, args, fmt, collect(given), progress)
        complete = status == 0
        return status
    finally:
        progress.finish(complete)


def _numbers(args: Args) -> dict[str, Any]:
    out: dict[str, Any] = {}
    text = args.get("sparse-size")
    if text is not None:
        sparse = bounded("buffer size for sparse output", text)
        if sparse % 512 or sparse > 16 << 20:
            raise UsageError(
                "Invalid buffer size for sparse output specified. Valid sizes are multiples of "
                f"512 up to {16 << 20}. Select 0 to disable sparse detection (fully allocates "
                "output)."
            )
        out["sparse"] = sparse
    text = args.get("parallel")
    if text is not None:
        out["workers"] = bounded("number of coroutines", text, 1, 16, suffixes=False)
    text = args.get("rate")
    if text is not None:
        out["rate"] = bounded("rate limit", text, 0, INT64_MAX)
    return out


def _refused(args: Args, fmt: str) -> None:
    """Raise for what this version does not do, and for what excludes each other."""
    if "target-image-opts" in args and "no-create" not in args:
        raise UsageError("--target-image-opts requires use of -n flag")
    if "target-is-zero" in args and "no-create" not in args:
        raise UsageError("--target-is-zero requires use of -n flag")
    if "copy-range-offloading" in args:
        if "sparse-size" in args:
            raise UsageError("Cannot enable copy offloading when -S is used")
        if "compress" in args:
            raise UsageError("Cannot enable copy offloading when -c is used")
        if "salvage" in args:
            raise UsageError("Cannot use copy offloading in salvaging mode")
    if "target-image-opts" in args and "target-format" in args:
        raise UsageError("--image-opts and --format are mutually exclusive")
    if "skip-broken-bitmaps" in args and "bitmaps" not in args:
        raise UsageError("Use of --skip-broken-bitmaps requires --bitmaps")
    if "no-create" in args and "target-options" in args:
        raise UsageError("-o has no effect when skipping image creation")


def snapshot_of(call: Call, args: Args, key: str) -> Selector | None:
    """The snapshot that option ``key`` selects; None without."""
    text = args.get(key)
    if text is None:
        return None
    from ..ops.snapshots import Selector

    try:
        return Selector.parse(text)
    except UsageError as error:
        call.error(str(error))
        raise call.fail(f"Failed in parsing snapshot param '{text}'") from error


def _convert(call: Call, args: Args, fmt: str, options: dict[str, Any], progress: Progress) -> int:
    numbers = _numbers(args)
    _refused(args, fmt)
    if len(args.operands) < 2:
        raise UsageError("Must specify image file name")
    *names, target_name = args.operands
    snapshot = snapshot_of(call, args, "source-snapshot")
    source_cache = cache_mode(args, "source-cache", "writeback", "Invalid source cache option")
    named = [spec(args, name, format_key="source-format", cache=source_cache) for name in names]
    sources: list[ImageSpec | Pipe] = list(named)
    if "-" in (*names, target_name):
        from . import pipes

        sources = [pipes.source(args, s) if s.reference == "-" else s for s in named]
    if "size" in args and "-" not in names:
        raise UsageError("--size tells how much comes through standard input ('-')")
    from ..ops import convert as ops
    from ..ops.create import creatable

    create = "no-create" not in args
    to_stdout = target_name == "-" and "target-image-opts" not in args
    also = [_further(args, text) for text in args.all("also")]
    for wanted in [*([fmt] if create else []), *(further.format for further in also)]:
        creatable(wanted or "")
    digests = list(dict.fromkeys(name or "sha256" for name in args.all("digest")))
    resume = "resume" in args
    call.on_interrupt = (
        f"interrupted: '{target_name}' is a valid image, but not complete; "
        + "run the command again to "
        + ("go on" if resume else "make it anew (with --resume it could go on)")
    )
    if to_stdout:
        call.on_interrupt = "interrupted: what was written to standard output is not complete"

    def prepared() -> None:
        """What is wrong with the target's options is told after what is wrong with the sources."""
        if create:
            overlay(options, args.get("backing"), None)
            if args.get("backing-format") is not None:
                options["backing_fmt"] = args.get("backing-format")
            if options.get("backing_file") and len(names) > 1:
                raise UsageError(ops.ONE_SOURCE)
            if options.get("backing_file") and fmt == "raw":
                raise UsageError("Backing file not supported for file format 'raw'")
            if options.get("backing_file") and not options.get("backing_fmt"):
                raise UsageError("Use of backing file requires explicit backing format")
            try:
                check_names(fmt, "disk" if to_stdout else target_name, options)
            except UsageError as error:
                if "cannot be used without" in str(error):
                    raise UsageError(
                        f"{target_name}: error while converting {fmt}: {error}"
                    ) from None
                raise
        cache_mode(args, "target-cache", "unsafe", "Invalid cache option")

    async def work(driver: Any) -> int:
        target = spec(
            args,
            target_name,
            format_key="" if "target-image-opts" in args else "target-format",
            opts_key="target-image-opts",
            cache=args.get("target-cache") or ("writeback" if resume else "unsafe"),
        )
        typed = gate(args, *filter(None, [args.get("backing")]))
        target = target._replace(force_share=False, gate=typed)
        if target.format is None and "target-image-opts" not in args:
            target = target._replace(format=fmt)
        into: ImageSpec | Pipe = pipes.target(target) if to_stdout else target
        settings = ops.Settings(
            options=options,
            create=create,
            overlay=bool(args.get("backing")),
            target_is_zero="target-is-zero" in args,
            in_order="oob-writes" not in args,
            offload="copy-range-offloading" in args,
            salvage="salvage" in args,
            compress="compress" in args,
            bitmaps="bitmaps" in args,
            skip_broken_bitmaps="skip-broken-bitmaps" in args,
            snapshot=snapshot,
            resume=resume,
            verify=args.get("resume") == "verify",
            **numbers,
        )
        await ops.convert(
            driver,
            sources,
            into,
            settings,
            also=also,
            digests=digests,
            on_sources=prepared,
            on_progress=progress,
            on_lost=lost,
            on_unknown=unknown,
            on_one_pass=one_pass,
            on_skipped_bitmap=skipped,
            on_digests=digested,
            on_spool=call.error,
            on_resumed=resumed,
            estimate=progress.mode == "off",
        )
        return 0

    def digested(found: Digests) -> None:
        if args.get("progress") == "json":
            import json

            lines = [json.dumps(found._replace(filename=target_name).to_dict())]
        else:
            lines = [f"{digest}  {target_name}" for digest in found.digests.values()]
        for line in lines:
            if to_stdout:
                to_stderr(line + "\n")
            else:
                call.out(line)

    def one_pass() -> None:
        call.on_interrupt = (
            f"interrupted: '{target_name}' was taken back, since it was not complete; "
            "run the command again to make it anew"
        )

    def resumed(used: Resumed) -> None:
        if used.finished:
            call.out(f"'{target_name}' is complete: it holds all of the source")
            return
        progress.begun(used.data)
        call.out(
            f"Going on with '{target_name}': {used.offset} bytes of the disk are used again "
            f"({used.data} bytes of data)"
        )
        sys.stdout.flush()

    def skipped(name: str) -> None:
        call.error(f"warning: Skipping inconsistent bitmap '{name}'")

    def lost(offset: int, error: OSError) -> None:
        call.error(f"warning: error while reading offset {offset}: {strerror(error)}")

    def unknown(offset: int, error: OSError) -> None:
        call.error(
            f"warning: error while reading block status at offset {offset}: {strerror(error)}"
        )

    try:
        status: int = run(work)
        return status
    except ops.TargetFailed as error:
        raise call.fail(
            f"{error.name}: error while converting {error.fmt}: {creation_failed(error.cause)}"
        ) from error
    except ops.CopyFailed as error:
        doing = "reading" if error.side == "read" else "writing"
        which = f"{error.name}: " if error.name else ""
        kept = "; run the command again to go on where it stopped" if resume else ""
        raise call.fail(
            f"{which}error while {doing} at byte {error.offset}: {_plain(error.cause)}{kept}"
        ) from error


def _further(args: Args, text: str) -> ImageSpec:
    """The target that ``--also`` describes."""
    fmt, _, name = text.partition(":")
    if not (fmt and name):
        raise UsageError(f"--also expects FORMAT:FILE, not '{text}'")
    cache = args.get("target-cache") or "unsafe"
    image = spec(args, name, format_key="", opts_key="", cache=cache)
    return image._replace(format=fmt, force_share=False)


def _plain(error: OSError | DiskError) -> str:
    """Why a part could not be moved; the file was named before."""
    if isinstance(error, OSError) and error.errno:
        return strerror(error)
    return reason(error)
