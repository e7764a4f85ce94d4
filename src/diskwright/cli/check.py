"""``check``."""

from __future__ import annotations

from ..errors import NotSupported, UsageError
from ..hints import TYPE_CHECKING, Any
from .images import arguments, cache_mode, one_operand, output_format, run, spec, warn_if_guessed
from .jsontext import dumps
from .options import (
    FORCE_SHARE,
    FORMAT,
    GATE,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    PROGRESS,
    QUIET,
    Opt,
)
from .output import Call, UsageProblem, to_stderr
from .progress import Progress

if TYPE_CHECKING:
    from ..findings import CheckReport
    from ..ops.check import Checked

OPTIONS = (
    QUIET,
    PROGRESS,
    Opt("", "stats", "", "tell how often the tables were gone through, and the bytes read"),
    FORMAT,
    IMAGE_OPTS,
    Opt("T", "cache", "CACHE", "cache mode (writeback)"),
    Opt("r", "repair", "REPAIR", "also repair: 'leaks' or 'all'"),
    Opt("", "dry-run", "", "with -r: show what would be written, and write nothing"),
    Opt("", "undo-file", "FILE", "with -r: keep in the new FILE what takes the repair back"),
    Opt("", "force", "", "FILE may exist and is replaced"),
    Opt("", "undo", "FILE", "take the repair back that wrote FILE, to the byte"),
    FORCE_SHARE,
    OUTPUT,
    *GATE,
    OBJECT,
)

def main(call: Call, argv: list[str]) -> int:
    """Check an image; the exit status is 0, 1 (not done), 2 (corrupt), 3 (leaks) or 63."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Check an image for damage.")
    if args is None:
        return 0
    wanted = output_format(args)
    repair = args.get("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageProblem(f"--repair (-r) expects 'leaks' or 'all' not '{repair}'")
    name = one_operand(args)
    cache = cache_mode(args, "cache", "writeback", "Invalid source cache option")
    image = spec(args, name, cache=cache)
    undo_file, dry_run, stats = args.get("undo-file"), "dry-run" in args, "stats" in args
    if "undo" in args:
        if repair is not None or undo_file is not None or dry_run:
            raise UsageError("--undo takes a repair back, and excludes the other options of one")
        return _undo(call, image, args.get("undo") or "", wanted)
    from ..ops.check import check

    if repair is not None and not dry_run:
        call.on_interrupt = f"interrupted: run the command again to finish repairing '{name}'"

    def opened(node: Any) -> None:
        if repair is not None and not dry_run:
            warn_if_guessed(call, name, node)

    progress = Progress.wanted(call, args)
    complete = False
    try:
        done = run(
            lambda driver: check(
                driver,
                image,
                progress,
                repair=repair,
                on_open=opened,
                dry_run=dry_run,
                undo_file=undo_file,
                force="force" in args,
            )
        )
        complete = True
    except NotSupported as error:
        call.error(str(error))
        return error.exit_code
    finally:
        progress.finish(complete)
    said = (done.repaired, done.after if dry_run else done.found)
    for result in dict.fromkeys(filter(None, said)):
        for finding in result.findings:
            to_stderr(f"{finding}\n")
    if wanted == "json":
        call.out(dumps(done.to_dict(stats=stats or not call.name.startswith("qemu-"))))
    elif done.plan is not None:
        call.out(_planned(done), "")
    else:
        if done.undo_size is not None and not done.undo_size:
            call.out(f"Nothing was changed, so '{undo_file}' was not written.")
        if done.repaired is not None:
            call.out(_repairs(done.repaired), "")
        call.out(_text(done.found), "")
    found = done.found
    if found.passes and wanted != "json" and (stats or progress.mode == "live"):
        # Only who asks for it, or sits at a terminal: scripts read qemu-img's lines.
        tell = call.out if stats else lambda line: to_stderr(f"{line}\n")
        if done.repaired is not None:
            tell(_stats("repair", done.repaired))
        tell(_stats("check", found))
    if found.check_errors:
        return 1
    if found.corruptions:
        return 2
    return 3 if found.leaks else 0


def _stats(what: str, found: CheckReport) -> str:
    from ..units import human

    times = "once" if found.passes == 1 else f"{found.passes} times"
    return f"The {what} went through the tables {times} and read {human(found.bytes_read)}."


def _undo(call: Call, image: Any, undo_file: str, wanted: str) -> int:
    """Take a repair back."""
    from ..ops.undoing import undo

    call.on_interrupt = f"interrupted: run the command again to finish undoing '{image.name}'"
    done = run(lambda driver: undo(driver, image, undo_file))
    if wanted == "json":
        call.out(dumps(done.to_dict()))
    elif done.places or done.lengths:
        call.out(
            f"The repair was undone: {done.bytes} bytes in {done.places} places and the length of "
            f"{done.lengths} files are what they were before."
        )
    else:
        call.out("The image is what it was before the repair already.")
    return 0


def _planned(done: Checked) -> str:
    """What a repair would do, in words."""
    plan, found, after = done.plan, done.repaired, done.after
    assert plan is not None and found is not None and after is not None
    lines = []
    if found.leaks_fixed or found.corruptions_fixed:
        lines += [
            "The following inconsistencies would be repaired:",
            "",
            f"    {found.leaks_fixed} leaked clusters",
            f"    {found.corruptions_fixed} corruptions",
            "",
        ]
    if plan.writes:
        lines += ["It would be written, in this order:", ""]
    for change in plan.changes:
        what = f": {change.what}" if change.what else ""
        if change.action == "resize":
            lines.append(
                f"    {change.file}: the length becomes {change.offset} bytes "
                f"(it is {change.length} then)"
            )
            continue
        kind = "zeroes" if change.action == "zero" else "bytes"
        lines.append(f"    {change.file}: {change.length} {kind} at {change.offset:#x}{what}")
    if len(plan.changes) < plan.writes:
        lines.append(f"    ... and {plan.writes - len(plan.changes)} more")
    if plan.writes:
        lines += ["", f"{plan.writes} changes, {plan.bytes} bytes."]
    left = f"{after.corruptions} corruptions and {after.leaks} leaked clusters would be left."
    if after.corruptions or after.leaks or after.check_errors:
        lines.append(left)
    else:
        lines.append("The image would be sound then." if plan.writes else "Nothing is to be done.")
    lines.append("Nothing was written: this is the image as it is.")
    return "\n".join(lines) + "\n\n" + _text(done.found)


def _repairs(found: CheckReport) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {found.leaks_fixed} leaked clusters\n"
        f"    {found.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now...\n"
    )


def _text(found: CheckReport) -> str:
    lines = []
    if not (found.corruptions or found.leaks or found.check_errors):
        lines.append("No errors were found on the image.")
    if found.corruptions:
        lines += [
            "",
            f"{found.corruptions} errors were found on the image.",
            "Data may be corrupted, or further writes to the image may corrupt it.",
        ]
    if found.leaks:
        lines += [
            "",
            f"{found.leaks} leaked clusters were found on the image.",
            "This means waste of disk space, but no harm to data.",
        ]
    if found.check_errors:
        lines += ["", f"{found.check_errors} internal errors have occurred during the check."]
    if found.total_clusters and found.allocated_clusters:
        used = found.allocated_clusters
        lines.append(
            f"{used}/{found.total_clusters} = {used * 100 / found.total_clusters:.2f}% allocated, "
            f"{found.fragmented_clusters * 100 / used:.2f}% fragmented, "
            f"{found.compressed_clusters * 100 / used:.2f}% compressed clusters"
        )
    if found.image_end_offset:
        lines.append(f"Image end offset: {found.image_end_offset}")
    lines += [f"Not checked: {what}" for what in found.uncovered]
    return "\n".join(lines) + "\n"
