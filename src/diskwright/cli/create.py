"""``create``."""

from __future__ import annotations

import sys

from ..errors import DiskError, UsageError
from ..hints import TYPE_CHECKING, Any
from .images import arguments, gate, run, secrets
from .options import GATE, OBJECT, QUIET, Args, Opt
from .output import Call, UsageProblem, reason
from .sizes import bounded

if TYPE_CHECKING:
    from ..declare import Option
    from ..secrets import Secrets

OPTIONS = (
    QUIET,
    Opt("f", "format", "FMT", "format of the new image (raw)"),
    Opt("o", "options", "OPTS", "options of the format: a=b,c=d ('-o help' lists them)"),
    Opt("b", "backing", "FILE", "make an overlay over FILE"),
    Opt("F", "backing-format", "FMT", "format of the backing file"),
    Opt("u", "backing-unsafe", "", "do not look at the backing file"),
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Make a new image."""
    args = arguments(call, argv, OPTIONS, "FILENAME [SIZE]", "Make a new image.")
    if args is None:
        return 0
    fmt = args.get("format") or "raw"
    given = args.all("options")
    filename = args.operands[0] if args.operands else None
    if wants_list(given):
        return list_options(call, fmt, filename)
    if filename is None:
        raise UsageProblem("Expecting image file name")
    size = None
    if len(args.operands) > 1:
        size = bounded("image size", args.operands[1])
    if len(args.operands) > 2:
        raise UsageProblem(f"Unexpected argument: {args.operands[2]}")
    keys = secrets(args)
    try:
        _create(call, args, filename, fmt, given, size, keys)
    except (DiskError, OSError) as error:
        raise call.fail(f"{filename}: {creation_failed(error)}") from error
    return 0


def _create(
    call: Call,
    args: Args,
    filename: str,
    fmt: str,
    given: list[str],
    size: int | None,
    keys: Secrets | None,
) -> None:
    from ..ops import create as ops

    ops.creatable(fmt)
    options = collect(given)
    overlay(options, args.get("backing"), args.get("backing-format"))
    if options.get("backing_file") == "":
        raise UsageError("Expected backing file name, got empty string")
    check_names(fmt, filename, options)
    if "size" in options:
        if size is not None:
            raise UsageError("The image size must be specified only once")
        size = option_size("size", options.pop("size"))

    def ready(complete: dict[str, Any]) -> None:
        words = [f"Formatting '{filename}', fmt={fmt}"]
        for key, value in ops.shown(fmt, complete, options):
            words.append(f"{key}={value.replace(',', ',,')}")
        call.out(" ".join(words))
        sys.stdout.flush()  # before any error of the creation itself

    run(
        lambda driver: ops.create(
            driver,
            filename,
            fmt,
            size,
            options,
            gate=gate(args),
            look_at_backing="backing-unsafe" not in args,
            on_ready=ready,
            secrets=keys,
        )
    )


def wants_list(given: list[str]) -> bool:
    """Whether ``-o`` asks for the list of options.  Raises UsageError for one that is no list."""
    for text in given:
        tail = len(text) - len(text.rstrip(","))
        if text[:1] in ("", ",") or tail % 2:
            raise UsageError(f"Invalid option list: {text}")
    parts = [part for text in given for part in text.replace(",,", "").split(",")]
    return "help" in parts or "?" in parts


def list_options(call: Call, fmt: str, filename: str | None) -> int:
    """Print the creation options of ``fmt``, with those of the protocol where a name is known."""
    from ..ops import create as ops

    options = option_lines(call, ops.create_options(fmt, filename))
    if filename is None:
        call.out(f"Supported {fmt} options:")
        call.out(options)
        call.out("The protocol level may support further options.")
        call.out("Specify the target filename to include those options.")
    else:
        call.out("Supported options:")
        call.out(options, "")
    return 0


def option_lines(call: Call, options: tuple[Option, ...]) -> str:
    """One line each, sorted, as qemu-img lists them; under our own name with our own options."""
    theirs = call.name.startswith("qemu-")
    listed = [option for option in options if not (option.own and theirs)]
    return "".join(map(_option, sorted(listed, key=lambda option: option.name)))


def _option(option: Option) -> str:
    kinds = {"bool": "bool (on/off)", "int": "num", "size": "size"}
    left = f"{option.name}=<{kinds.get(option.type, 'str')}>"
    return f"  {left:<22} - {option.help}\n"


def collect(given: list[str]) -> dict[str, Any]:
    """All ``-o`` together; later ones win."""
    from ..ops.create import split_options

    options: dict[str, Any] = {}
    for text in given:
        options.update(split_options(text))
    return options


def overlay(options: dict[str, Any], backing: str | None, fmt: str | None) -> None:
    """Add what ``-b`` and ``-F`` say."""
    if backing is not None:
        options["backing_file"] = backing
    if fmt is not None:
        options["backing_fmt"] = fmt


def check_names(fmt: str, filename: str, options: dict[str, Any]) -> None:
    """Raise UsageError for an option that neither the format nor the protocol has, or that this
    version does not do."""
    from ..ops import create as ops

    known = {option.name: option for option in ops.create_options(fmt, filename)}
    for name in options:
        if name in known:
            if known[name].type == "size":
                option_size(name, options[name])
        elif name == "backing_file":
            raise UsageError(f"Backing file not supported for file format '{fmt}'")
        elif name == "backing_fmt":
            raise UsageError(f"Backing file format not supported for file format '{fmt}'")
        else:
            raise UsageError(f"Invalid parameter '{name}'")
    if options.get("backing_fmt") and not options.get("backing_file"):
        raise UsageError("Backing format cannot be used without backing file")


def option_size(name: str, text: str) -> int:
    """A size among options.  Raises UsageError worded as qemu-img words it."""
    from .sizes import BadNumber, number

    try:
        value = number(text)
    except BadNumber:
        raise UsageError(
            f"Parameter '{name}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        ) from None
    if not 0 <= value < 1 << 64:
        raise UsageError(f"Value '{text}' is out of range for parameter '{name}'")
    return value


def creation_failed(error: BaseException) -> str:
    """Why an image could not be made."""
    notes = getattr(error, "__notes__", ())
    if notes and not isinstance(error, UsageError):
        text = reason(error)
        for note in notes:
            text = text.replace(f"{note}: ", "", 1)
        return text + "".join(f"\n{note}." for note in notes)
    if isinstance(error, OSError) and error.filename is not None:
        return reason(error).replace("Could not open", "Could not create", 1)
    return reason(error)
