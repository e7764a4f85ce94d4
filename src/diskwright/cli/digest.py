"""``digest``."""

from __future__ import annotations

from ..hints import TYPE_CHECKING
from .images import arguments, cache_mode, one_operand, output_format, run, spec
from .jsontext import dumps
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, OUTPUT, PROGRESS, QUIET, Opt
from .output import Call
from .progress import Progress

if TYPE_CHECKING:
    from ..engine.kernel import BaseDriver
    from ..ops.digest import Digests
    from ..ops.images import ImageSpec

OPTIONS = (
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    Opt("a", "algorithm", "ALGO", "sha256 (default), sha512, sha1, md5, blake2b, or tree: of "
        "blocks, at the cost of the data (repeatable)"),
    Opt("T", "cache", "CACHE", "cache mode (writeback)"),
    FORCE_SHARE,
    OUTPUT,
    *GATE,
    OBJECT,
)  # fmt: skip


def main(call: Call, argv: list[str]) -> int:
    """Print digests of a disk's content, as sha256sum does of a raw disk."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Print digests of a disk's content.")
    if args is None:
        return 0
    name = one_operand(args)
    wanted = output_format(args)
    cache = cache_mode(args, "cache", "writeback", "Invalid source cache option")
    image = spec(args, name, cache=cache)
    algorithms = list(dict.fromkeys(args.all("algorithm"))) or ["sha256"]
    progress = Progress.wanted(call, args)
    try:
        found = run(lambda driver: _digest(driver, image, algorithms, progress))
    except BaseException:
        progress.finish(complete=False)
        raise
    progress.finish()
    if wanted == "json":
        call.out(dumps(found._replace(filename=name).to_dict()))
    else:
        for digest in found.digests.values():
            call.out(f"{digest}  {name}")
    return 0


async def _digest(
    driver: BaseDriver, image: ImageSpec, algorithms: list[str], progress: Progress
) -> Digests:
    from ..ops.digest import digest
    from ..ops.images import close_all

    node = await image.open(driver)
    try:
        return await digest(driver, node, algorithms, progress)
    finally:
        await close_all([node])
