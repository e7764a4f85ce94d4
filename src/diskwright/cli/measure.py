"""``measure``."""

from __future__ import annotations

from ..errors import UsageError
from .convert import snapshot_of
from .create import collect, option_size
from .images import arguments, look, output_format, secrets, spec
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, Opt
from .output import Call
from .sizes import bounded

OPTIONS = (
    Opt("O", "target-format", "FMT", "format of the new image (raw)"),
    Opt("s", "size", "SIZE", "a disk of this size, nothing of it written"),
    Opt("o", "options", "OPTS", "creation options of the new image"),
    FORMAT,
    IMAGE_OPTS,
    Opt("l", "snapshot", "SNAPSHOT", "measure an internal snapshot: an id or name, or "
        "snapshot.id=ID,snapshot.name=NAME"),
    FORCE_SHARE,
    OUTPUT,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Tell how large a new image will be."""
    args = arguments(call, argv, OPTIONS, "[FILENAME]", "Tell how large a new image will be.")
    if args is None:
        return 0
    wanted = output_format(args)
    if len(args.operands) > 1:
        raise UsageError("At most one filename argument is allowed.")
    keys = secrets(args)
    if args.operands and "size" in args:
        raise UsageError("--size N cannot be used together with a filename.")
    if not args.operands and "size" not in args:
        raise UsageError("Either --size N or one filename must be specified.")
    text = args.get("size")
    size = None if text is None else bounded("image size", text)
    source = spec(args, args.operands[0]) if args.operands else None
    fmt = args.get("target-format") or "raw"
    snapshot = snapshot_of(call, args, "snapshot")
    from ..ops import measure as ops
    from ..ops.create import creatable

    creatable(fmt)
    given = collect(args.all("options"))
    if "size" in given:
        option_size("size", given.pop("size"))
    try:
        options = ops.check(fmt, given, keys)
    except UsageError as error:
        call.error(str(error))
        raise call.fail(f"Invalid options for file format '{fmt}'") from error
    if size is not None:
        found = ops.of_size(fmt, options, size)
    else:
        assert source is not None
        image = source
        found = look(lambda driver: ops.measure(driver, fmt, options, image, snapshot))
    if wanted == "json":
        call.out(dumps(found.to_dict()))
    else:
        call.out(f"required size: {found.required}")
        call.out(f"fully allocated size: {found.fully_allocated}")
        if found.bitmaps is not None:
            call.out(f"bitmaps size: {found.bitmaps}")
    return 0
