"""``check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import NotSupported
from .images import arguments, cache_mode, one_image, output_format, run, spec, warn_if_guessed
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, QUIET, Opt
from .output import Call, UsageProblem, to_stderr

if TYPE_CHECKING:
    from ..findings import CheckResult
    from ..ops.check import Checked

OPTIONS = (
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    Opt("T", "cache", "MODE", "cache mode (writeback)"),
    Opt("r", "repair", "WHAT", "also repair: 'leaks' or 'all'"),
    FORCE_SHARE,
    OUTPUT,
    *GATE,
    OBJECT,
)

# The order in which qemu-img prints the keys (measured with 10.0).
KEYS = (
    "image-end-offset", "compressed-clusters", "total-clusters", "corruptions",
    "corruptions-fixed", "check-errors", "leaks", "leaks-fixed", "allocated-clusters",
)  # fmt: skip


def main(call: Call, argv: list[str]) -> int:
    """Check an image; the exit status is 0, 1 (not done), 2 (corrupt), 3 (leaks) or 63."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Check an image for damage.")
    if args is None:
        return 0
    wanted = output_format(args)
    repair = args.get("repair")
    if repair not in (None, "leaks", "all"):
        raise UsageProblem(f"--repair (-r) expects 'leaks' or 'all' not '{repair}'")
    name = one_image(args)
    cache = cache_mode(args, "cache", "writeback", "Invalid source cache option")
    image = spec(args, name, cache=cache)
    from ..ops.check import check

    if repair is not None:
        call.on_interrupt = f"interrupted: run the command again to finish repairing '{name}'"

    def opened(node: Any) -> None:
        if repair is not None:
            warn_if_guessed(call, name, node)

    try:
        done = run(lambda driver: check(driver, image, repair=repair, on_open=opened))
    except NotSupported as error:
        call.error(str(error))
        return error.exit_code
    for result in filter(None, (done.repaired, done.found)):
        for finding in result.findings:
            to_stderr(f"{finding}\n")
    if wanted == "json":
        call.out(dumps(_as_dict(done)))
    else:
        if done.repaired is not None:
            call.out(_repairs(done.repaired), "")
        call.out(_text(done.found), "")
    found = done.found
    if found.check_errors:
        return 1
    if found.corruptions:
        return 2
    return 3 if found.leaks else 0


def _as_dict(done: Checked) -> dict[str, Any]:
    known = done.found.as_dict()
    if done.repaired is not None:
        counts = done.repaired.corruptions_fixed, done.repaired.leaks_fixed
        for key, count in zip(("corruptions-fixed", "leaks-fixed"), counts, strict=True):
            if count:
                known[key] = count
    for key in ("image-end-offset", "total-clusters"):  # formats without such counts say none
        if not known.get(key):
            known.pop(key, None)
    out = {key: known.pop(key) for key in KEYS if key in known}
    fragmented = known.pop("fragmented-clusters", None)
    out.update(filename=done.name, format=done.format)
    if fragmented is not None:
        out["fragmented-clusters"] = fragmented
    out.update(known)
    return out


def _repairs(found: CheckResult) -> str:
    return (
        "The following inconsistencies were found and repaired:\n\n"
        f"    {found.leaks_fixed} leaked clusters\n"
        f"    {found.corruptions_fixed} corruptions\n\n"
        "Double checking the fixed image now...\n"
    )


def _text(found: CheckResult) -> str:
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
