"""``compare``."""

from __future__ import annotations

from ..hints import TYPE_CHECKING
from .images import arguments, cache_mode, output_format, run, spec
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, PROGRESS, QUIET, Opt
from .output import Call, UsageProblem, reason
from .progress import Progress

if TYPE_CHECKING:
    from ..engine.kernel import BaseDriver
    from ..ops.compare import Comparison
    from ..ops.images import ImageSpec

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT._replace(long="a-format", help="format of the first image"),
    Opt("F", "b-format", "FMT", "format of the second image"),
    IMAGE_OPTS,
    Opt("s", "strict", "", "sizes and allocation must be the same, too"),
    Opt("T", "cache", "CACHE", "cache mode (writeback)"),
    FORCE_SHARE,
    OUTPUT,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Compare two disks; the exit status is 0 (equal), 1 (not), 2 (not opened), 3 or 4 (could
    not be read)."""
    args = arguments(
        call, argv, OPTIONS, "FILENAME1 FILENAME2", "Tell whether two disks have the same content."
    )
    if args is None:
        return 0
    if len(args.operands) != 2:
        raise UsageProblem("Expecting two image file names")
    human = output_format(args) == "human"
    call.failure = 2
    progress = Progress.wanted(call, args)
    try:
        cache = cache_mode(args, "cache", "writeback", "Invalid source cache option")
        one, other = args.operands
        images = [
            spec(args, one, format_key="a-format", cache=cache),
            spec(args, other, format_key="b-format", cache=cache),
        ]
        from ..ops.compare import ReadFailed

        try:
            found = run(
                lambda driver: _compare(call, driver, images, "strict" in args, progress, human)
            )
        except ReadFailed as error:
            name = args.operands[error.side]
            text = reason(error.cause)
            if error.status_only:
                text = f"Sector allocation test failed for {name}: {text}"
            else:
                text = f"Error while reading offset {error.offset} of {name}: {text}"
            raise call.fail(text, error.exit_code) from error
        if human:
            _report(call, found, "strict" in args)
        else:
            call.out(dumps(found.to_dict()))
        return 0 if found.equal else 1
    finally:
        progress.finish(complete=False)


def _report(call: Call, found: Comparison, strict: bool) -> None:
    if strict and found.sizes_differ:
        call.out("Strict mode: Image size mismatch!")
    elif found.status_offset >= 0:
        call.out(f"Strict mode: Offset {found.status_offset} block status mismatch!")
    elif found.offset >= 0:
        call.out(f"Content mismatch at offset {found.offset}!")
    else:
        call.out("Images are identical.")


async def _compare(
    call: Call,
    driver: BaseDriver,
    images: list[ImageSpec],
    strict: bool,
    progress: Progress,
    human: bool,
) -> Comparison:
    from ..ops.compare import compare
    from ..ops.images import close_all

    def sizes_differ() -> None:
        call.out("Warning: Image size mismatch!")

    nodes = [await images[0].open(driver)]
    try:
        nodes.append(await images[1].open(driver, graph=None))
        return await compare(
            *nodes,
            strict=strict,
            on_progress=progress,
            on_sizes_differ=sizes_differ if human else None,
        )
    finally:
        await close_all(nodes)
