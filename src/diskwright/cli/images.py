"""From the options of a verb to the disks that it names."""

from __future__ import annotations

from collections.abc import Callable, Coroutine

from ..errors import UsageError
from ..hints import TYPE_CHECKING, Any, TypeVar
from .options import BUDGETS, FORMAT, HELP, TRACE, Args, Opt, help_text, parse
from .output import Call, UsageProblem

if TYPE_CHECKING:
    from ..engine.budget import Budget
    from ..engine.kernel import Driver
    from ..graph.gate import Gate
    from ..graph.names import Reference
    from ..ops.images import ImageSpec
    from ..secrets import Secrets

T = TypeVar("T")

READ_CACHES = ("none", "off", "directsync", "writeback", "unsafe", "writethrough")


def arguments(
    call: Call, argv: list[str], declared: tuple[Opt, ...], operands: str, summary: str
) -> Args | None:
    """Parse the command line of a verb; None when help was asked for and given."""
    every = (HELP, *declared, *BUDGETS)
    args = parse(argv, every)
    if "help" in args:
        call.out(help_text(f"{call.title} [OPTIONS] {operands}", summary, every), "")
        return None
    call.quiet = "quiet" in args
    take_budget(args)
    if TRACE in declared:
        take_trace(args)
    return args


_budget: Budget | None = None
"""That of the command line that was parsed last; it begins when that is done."""


def take_budget(args: Args) -> None:
    """Hold the command to what the options ``--max-...`` say.  Raises UsageError."""
    global _budget
    found = [args.get(option.key) for option in BUDGETS]
    _budget = _budget_of(*found) if any(found) else None


def new_driver(worker: int | None = None) -> Driver:
    """A driver with the command's budget.  ``worker``: see :class:`.Tracer`."""
    from ..engine.kernel import Driver

    driver = Driver()
    driver.budget = _budget
    if _trace is not None:
        from ..engine.trace import Tracer

        driver.trace = Tracer(driver, *_trace, worker=worker)
    return driver


_trace: tuple[str | None, float | None] | None = None
"""The file and the time that ``--trace`` names; None without it."""


def begin_trace() -> None:
    """Empty the file that several processes will write to.  Raises OSError."""
    if _trace is not None and _trace[0] is not None:
        with open(_trace[0], "w"):
            pass


def take_trace(args: Args) -> None:
    """Trace requests as ``--trace`` says.  Raises UsageError."""
    global _trace
    _trace = None
    text = args.get("trace")
    if text is None:
        return
    path = slow = None
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name == "file" and value:
            path = value
        elif name == "slow":
            slow = seconds("--trace slow", value)
        elif part != "on":
            raise UsageError(f"--trace expects on, slow=SECONDS or file=PATH, not '{part}'")
    _trace = path, slow


def seconds(name: str, text: str) -> float:
    """A time above 0.  Raises UsageError."""
    try:
        found = float(text)
    except ValueError:
        found = 0
    if not 0 < found < 1e9:
        raise UsageError(f"{name} expects a number of seconds, not '{text}'")
    return found


def _budget_of(text: str | None, memory: str | None, metadata: str | None) -> Budget:
    from ..engine.budget import Budget
    from .sizes import bounded

    time = None if text is None else seconds("--max-time", text)
    return Budget(
        time,
        None if memory is None else bounded("--max-memory", memory, 1),
        None if metadata is None else bounded("--max-metadata", metadata, 1),
    )


def one_operand(args: Args, what: str = "one image file name") -> str:
    """The only operand; ``what`` it is."""
    if len(args.operands) != 1:
        raise UsageProblem(f"Expecting {what}")
    return args.operands[0]


def gate(args: Args, *typed: str) -> Gate:
    """The gate of this command; ``typed`` are references on the command line itself."""
    from ..ops.gates import Policy, gate_of, pairs

    paths = pairs(args.all("map-path"), "--map-path")
    policy = Policy(args.get("policy") or "", tuple(args.all("allow")), paths)
    return gate_of(policy, typed)


def secrets(args: Args) -> Secrets | None:
    """The secrets that ``--object`` defines; None without.  Raises UsageError."""
    given = args.all("object")
    if not given:
        return None
    from ..ops.secrets import secrets_of

    return secrets_of(given)


def spec(
    args: Args,
    name: str,
    *,
    format_key: str = FORMAT.key,
    opts_key: str = "image-opts",
    cache: str = "writeback",
    typed: tuple[str, ...] = (),
) -> ImageSpec:
    """The disk ``name`` as the options describe it.

    Raises UsageError for options that exclude each other.
    """
    from ..graph.names import parse_image_opts
    from ..ops.images import ImageSpec, OpenFailed

    keys = secrets(args)
    format = args.get(format_key)
    reference: Any = name
    if opts_key in args:
        if format is not None:
            raise UsageError("--image-opts and --format are mutually exclusive")
        try:
            reference = parse_image_opts(name)
        except UsageError as error:
            raise OpenFailed(name, error) from error
    shared = "force-share" in args
    return ImageSpec(name, reference, format, cache, shared, gate(args, *typed), keys)


def cache_mode(args: Args, key: str, default: str, message: str) -> str:
    """The cache mode that option ``key`` names.  Raises UsageError with ``message``."""
    mode = args.get(key)
    if mode is None:
        return default
    if mode not in READ_CACHES:
        raise UsageError(f"{message}: {mode}")
    return mode


def served(args: Args, image: str, default: str = "writeback") -> tuple[Reference, str]:
    """What a server opens, and its cache mode.  Raises UsageError in the words of qemu-nbd."""
    reference: Reference = image
    if "image-opts" in args:
        from ..graph.names import parse_image_opts

        if FORMAT.key in args:
            raise UsageError("--image-opts and -f are mutually exclusive")
        reference = parse_image_opts(image)
    cache = args.get("cache") or default
    if cache not in READ_CACHES:
        raise UsageError(f"Invalid cache mode `{cache}'")
    return reference, cache


def output_format(args: Args) -> str:
    """``human`` or ``json``."""
    wanted = args.get("output") or "human"
    if wanted not in ("human", "json"):
        raise UsageProblem(f"--output expects 'human' or 'json' not '{wanted}'")
    return wanted


def wants_picture(args: Args) -> bool:
    """Whether ``--picture`` or ``--svg`` asks for a picture, which is no JSON.  Raises
    UsageProblem."""
    wanted = "picture" in args or "svg" in args
    if wanted and output_format(args) == "json":
        raise UsageProblem("--picture and --svg exclude --output=json")
    return wanted


def look(make: Callable[[Driver], Coroutine[Any, Any, T]]) -> T:
    """Run the coroutine that ``make(driver)`` returns, and that only reads, on a driver of its own.

    Raises KeyboardInterrupt after Ctrl-C, which may stop it anywhere.
    """
    driver = new_driver()
    try:
        return driver.run(driver.in_time(make(driver)))
    finally:
        driver.close()


def run(make: Callable[[Driver], Coroutine[Any, Any, T]]) -> T:
    """Run the coroutine that ``make(driver)`` returns on a driver of its own.

    The first Ctrl-C cancels it: issued I/O ends and images are closed properly.  A second one
    ends the program at once.  Raises KeyboardInterrupt when it was cancelled.
    """
    import signal

    from ..engine.kernel import Cancelled

    driver = new_driver()
    interrupted = False

    async def main() -> T:
        task = driver.spawn(driver.in_time(make(driver)), "main")

        def cancel(number: int, frame: object) -> None:
            nonlocal interrupted
            interrupted = True
            signal.signal(number, signal.default_int_handler)
            driver.from_thread(task.cancel)

        try:
            before = signal.signal(signal.SIGINT, cancel)
        except ValueError:  # not the main thread
            return await task
        try:
            return await task
        finally:
            signal.signal(signal.SIGINT, before)

    try:
        return driver.run(main())
    except Cancelled:
        if interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        driver.close()


def warn_if_guessed(call: Call, name: str, node: Any) -> None:
    """Warn, as qemu-img does, when an image that is written to was only guessed to be raw."""
    from .output import to_stderr

    if node.probed:
        to_stderr(
            f"WARNING: Image format was not specified for '{name}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write "
            "operations on block 0 will be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions.\n"
        )
