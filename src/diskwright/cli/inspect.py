"""``inspect``."""

from __future__ import annotations

import sys

from ..hints import TYPE_CHECKING
from ..units import human
from .images import arguments, look, one_operand, output_format
from .jsontext import dumps
from .options import OUTPUT, QUIET, Opt
from .output import Call, UsageProblem, printable

if TYPE_CHECKING:
    from ..abilities import Reference
    from ..ops.inspect import Inspection

OPTIONS = (
    QUIET,
    Opt("f", "format", "FMT", "exit with 2 unless this is the format"),
    Opt("", "require", "VERDICT", "exit with 2 unless the verdict is one of these: "
        "self-contained, refers, ambiguous, damaged, unknown, raw"),
    OUTPUT,
    Opt("", "json", "", "the same as --output=json"),
)  # fmt: skip

NOT_AS_REQUIRED = 2


def main(call: Call, argv: list[str]) -> int:
    """Tell what a file is, by its bytes alone."""
    summary = "Tell what a file ('-': standard input) is, opening nothing that it names."
    args = arguments(call, argv, OPTIONS, "FILENAME", summary)
    if args is None:
        return 0
    name = one_operand(args)
    wanted = "json" if "json" in args else output_format(args)
    from ..ops.inspect import VERDICTS, inspect

    required = [word for text in args.all("require") for word in text.split(",")]
    for word in required:
        if word not in VERDICTS:
            raise UsageProblem(f"--require expects one of {', '.join(VERDICTS)}, not '{word}'")
    source = sys.stdin.buffer if name == "-" else name
    found = look(lambda driver: inspect(driver, source))._replace(filename=name)
    if wanted == "json":
        call.out(dumps(found.to_dict()))
    else:
        call.out(text(found), "")
    format = args.get("format")
    if (required and found.verdict not in required) or format not in (None, found.format):
        return NOT_AS_REQUIRED
    return 0


def text(found: Inspection) -> str:
    """For people; what comes from the file is shown without control characters."""
    lines = [
        f"image: {printable(found.filename)}",
        f"file length: {human(found.length)} ({found.length} bytes)",
        f"verdict: {found.verdict}",
        f"file format: {found.format or 'not told: several match'}",
    ]
    if found.virtual_size is not None:
        lines.append(f"virtual size: {human(found.virtual_size)} ({found.virtual_size} bytes)")
    if found.matches:
        lines.append("matches:")
    for match in found.matches:
        where = f"{match.offset:#x}" if match.offset >= 0 else f"the end - {-match.offset}"
        lines.append(f"    {match.name} ({match.kind}, at {where})" + _behind(match.detail))
    if found.references:
        lines.append("names, none of which was opened:")
    lines += [f"    {_reference(reference)}" for reference in found.references]
    if found.features:
        lines.append("features:")
    for key, value in found.features.items():
        lines.append(f"    {key.replace('-', ' ')}: {printable(str(_plain(value)))}")
    if found.violations:
        lines.append("violations:")
    for bad in found.violations:
        field = f"field '{bad.field}'" if bad.field else ""
        place = f"offset {bad.offset:#x}" if bad.offset is not None else ""
        at = ", ".join(filter(None, (field, place)))
        lines.append(f"    {bad.format}: {printable(bad.detail)}" + (f" ({at})" if at else ""))
    lines += [f"not known here: {printable(what)}" for what in found.not_known]
    lines += [f"not seen: {length} bytes at {at:#x}" for at, length in found.not_seen]
    return "\n".join(lines) + "\n"


def _reference(reference: Reference) -> str:
    format = f" (format {printable(reference.format)})" if reference.format else ""
    return f"{reference.role}: {printable(reference.name)}{format}"


def _behind(detail: str) -> str:
    return f": {detail}" if detail else ""


def _plain(value: object) -> object:
    """A list of objects is told by its length: ``--json`` has all of it."""
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return len(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    return ("true" if value else "false") if isinstance(value, bool) else value
