"""``bench``."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from .images import READ_CACHES, arguments, one_operand, run, spec
from .options import FORCE_SHARE, FORMAT, GATE, IMAGE_OPTS, OBJECT, QUIET, Args, Opt
from .output import Call, strerror
from .sizes import bounded

INT_MAX = (1 << 31) - 1

OPTIONS = (
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    Opt("t", "cache", "CACHE", "cache mode (writeback)"),
    Opt("c", "count", "COUNT", "requests in all (75000)"),
    Opt("s", "buffer-size", "SIZE", "bytes of each (4096)"),
    Opt("d", "depth", "DEPTH", "requests at a time (64)"),
    Opt("o", "offset", "OFFSET", "where the first one goes (0)"),
    Opt("S", "step-size", "SIZE", "how far the next one is behind it (SIZE of a request)"),
    Opt("i", "aio", "AIO", "threads, native or io_uring: how the host's file is accessed"),
    Opt("n", "native", "", "the same as --aio native"),
    Opt("w", "write", "", "write (otherwise read)"),
    Opt("", "pattern", "BYTE", "the byte that is written (0)"),
    Opt("", "flush-interval", "COUNT", "flush after so many writes"),
    Opt("", "no-drain", "", "do not wait for writes before a flush"),
    FORCE_SHARE,
    *GATE,
    OBJECT,
)


def main(call: Call, argv: list[str]) -> int:
    """Measure how fast an image is."""
    args = arguments(call, argv, OPTIONS, "FILENAME", "Measure how fast an image is.")
    if args is None:
        return 0
    from ..ops.bench import Workload, bench

    def limited(key: str, name: str, low: int, default: int) -> int:
        text = args.get(key)
        return default if text is None else bounded(name, text, low, INT_MAX)

    size = limited("buffer-size", "buffer size", 1, 4096)
    write = "write" in args
    offset = args.get("offset")
    pattern = limited_pattern(args)
    load = Workload(
        requests=limited("count", "request count", 1, 75000),
        size=size,
        depth=limited("depth", "queue depth", 1, 64),
        offset=0 if offset is None else bounded("offset", offset),
        step=limited("step-size", "step size", 0, size) or size,
        pattern=pattern if write else None,
        flush_interval=limited("flush-interval", "flush interval", 0, 0),
        drain="no-drain" not in args,
    )
    load.check()
    aio = "native" if "native" in args else args.get("aio")
    if aio not in (None, "threads", "native", "io_uring"):
        raise UsageError(f"Invalid aio option: {aio}")
    cache = args.get("cache") or "writeback"
    if cache not in READ_CACHES:
        raise UsageError("Invalid cache mode")
    image = spec(args, one_operand(args), cache=cache)

    async def timed(driver: Any) -> float:
        options = {"file": {"aio": aio}} if aio else None
        node = await image.open(driver, writable=write, options=options)
        from ..graph.opener import close_disk

        try:
            call.out(
                f"Sending {load.requests} {'write' if write else 'read'} requests, {size} bytes "
                f"each, {load.depth} in parallel (starting at offset {load.offset}, step size "
                f"{load.step})"
            )
            if load.flush_interval:
                call.out(f"Sending flush every {load.flush_interval} requests")
            return await bench(driver, node, load)
        except OSError as error:
            raise call.fail(f"Failed request: {strerror(error).split(':')[0]}") from error
        finally:
            await close_disk(node)

    seconds = run(timed)
    call.out(f"Run completed in {seconds:.3f} seconds.")
    return 0


def limited_pattern(args: Args) -> int:
    """The byte to write."""
    text = args.get("pattern")
    return 0 if text is None else bounded("pattern byte", text, 0, 255)
